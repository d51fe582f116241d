"""Modules are watched and changed while a block runs, and are themselves again afterwards."""

import pytest
import torch
from torch import nn

from mgll_encoder.common.hooks import hooked


def test_inputs_and_outputs_are_seen_and_may_be_changed() -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    seen: list[tuple[str, float]] = []

    def before(name: str, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        seen.append((name, float(given[0])))
        return (given[0] + 1,) if name == "first" else None

    def after(name: str, output: torch.Tensor) -> torch.Tensor | None:
        seen.append((name, float(output)))
        return output * 10 if name == "second" else None

    modules = {"first": model[0], "second": model[1]}
    with hooked(modules, before=before, after=after):
        assert model(torch.tensor(1.0)) == 20
    assert seen == [("first", 1), ("first", 2), ("second", 2), ("second", 2)]
    assert model(torch.tensor(1.0)) == 1


def test_nothing_stays_hooked_after_an_error() -> None:
    model = nn.Identity()

    def stop(name: str, given: tuple[torch.Tensor, ...]) -> None:
        raise LookupError(name)

    with pytest.raises(LookupError, match="only"), hooked({"only": model}, before=stop):
        model(torch.tensor(1.0))
    assert model(torch.tensor(1.0)) == 1
