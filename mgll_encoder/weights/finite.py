"""Whether weights are numbers."""

import torch
from torch import Tensor

FLOATS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
"""Dtypes that a tower may have -> integers of their size, and in them the bits of the exponent."""

_BLOCK = 1 << 17
"""Numbers that are looked at together: they stay in the processor's cache."""


def all_finite(tensor: Tensor) -> bool:
    """Whether no exponent has all its bits set; in one pass and one thread, because a swap has work for the others."""
    bits, exponent = FLOATS[tensor.dtype]
    values = tensor.detach().cpu().contiguous().reshape(-1).view(bits).numpy()
    blocks = range(0, len(values), _BLOCK)
    return all((values[start : start + _BLOCK] & exponent).max() < exponent for start in blocks)
