"""Check of weights for NaN and infinity."""

import torch
from torch import Tensor

FLOATS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
"""Dtypes of towers -> integer dtype of the same size, and the mask of the exponent bits in it."""

_BLOCK = 1 << 17
"""Numbers checked at a time: they fit into the processor's cache."""


def all_finite(tensor: Tensor) -> bool:
    """Return whether no exponent has all bits set; in one pass and one thread, as a swap needs the other threads."""
    bits, exponent = FLOATS[tensor.dtype]
    values = tensor.detach().cpu().contiguous().reshape(-1).view(bits).numpy()
    blocks = range(0, len(values), _BLOCK)
    return all((values[start : start + _BLOCK] & exponent).max() < exponent for start in blocks)
