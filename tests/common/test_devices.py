"""The device by name, on a machine without a GPU; with one, the same names are found."""

import pytest
import torch

from mgll_encoder.common.devices import find_device, train_on
from mgll_encoder.common.errors import NotFoundError, UnknownNameError

GPU = torch.cuda.is_available()


def test_the_cpu_is_always_there() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert train_on("cpu")
    assert train_on("auto") is not GPU
    assert find_device("auto").type == ("cuda" if GPU else "cpu")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown `device` 'gpu7'"):
        find_device("gpu7")
    with pytest.raises(NotFoundError, match="`device=cuda:99`"):
        find_device("cuda:99")
    with pytest.raises(NotFoundError, match="`device=cuda:99`"):
        train_on("cuda:99")
