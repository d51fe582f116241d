"""The device that something is computed on: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ..., and its number format."""

import os
from typing import TYPE_CHECKING, Final, Literal

from mgll_encoder.common.errors import InvalidArgumentError, NotFoundError, unknown_name

if TYPE_CHECKING:
    import torch

AUTO: Final = "auto"

Precision = Literal["auto", "float32", "bfloat16", "float16"]
"""Number formats, as all options and arguments name them."""

_VISIBLE = "CUDA_VISIBLE_DEVICES"

_only: list[str] = []
"""The GPU that `train_on` has made the only visible one, as it was named."""


def find_device(name: str = AUTO) -> "torch.device":
    """Return a device by name.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` is the accelerator if there is one (under torchrun and similar
            that of this process), else the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    here = torch.accelerator.current_accelerator(check_available=True)
    if name == AUTO:
        if here is None:
            return torch.device("cpu")
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
        return torch.device(here.type, local % count) if count > 1 else torch.device(here.type)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown_name("`device`", name, [AUTO, "cpu", "cuda", "cuda:1"]) from None
    if device.type == "cpu":
        return torch.device("cpu")
    if here is None or device.type != here.type:
        found = f"torch finds no {device.type} device on this machine"
        raise NotFoundError(f"`device={name}`: {found}; use cpu{f' or {here.type}' if here else ''}")
    count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        last = f"{here.type}:{count - 1}"
        raise NotFoundError(f"`device={name}`: this machine has {count} ({here.type}:0 to {last})")
    return device


def train_on(name: str = AUTO) -> bool:
    """Make transformers' Trainer use one device, and return whether that is the CPU.

    The Trainer takes all GPUs that it sees, the first of them first. A single one is therefore made the only visible
    one, which is possible until the process has used a GPU.

    Args:
        name: See `find_device`.

    Raises:
        UserError: this machine has no such device, several processes train together (their launcher gives each its
            GPU), or the process has used a GPU already.
    """
    import torch

    if name in _only:
        return False
    device = find_device(name)
    if device.type != "cuda" or name == AUTO:
        return device.type == "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InvalidArgumentError(
            f"`device={name}`: the launcher gives each process its GPU; leave `device` out"
        )
    if torch.cuda.device_count() == 1:
        return False
    if torch.cuda.is_initialized():
        raise InvalidArgumentError(
            f"`device={name}`: this process uses a GPU already; set {_VISIBLE} before it starts"
        )
    index = device.index or 0
    visible = [one for one in os.environ.get(_VISIBLE, "").split(",") if one.strip()]
    os.environ[_VISIBLE] = visible[index].strip() if visible else str(index)
    _only.append(name)
    return False
