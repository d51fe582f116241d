"""Writing safetensors files tensor by tensor, so that memory holds one tensor and not one shard.

Format: README of huggingface/safetensors, section Format (8-byte little-endian header length, JSON header padded
with spaces, then the tensors' bytes in the order of their offsets).
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mllm_adapters.contract import Step

DTYPE_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


def nbytes(step: Step) -> int:
    """Bytes of a step's target tensor."""
    return torch.Size(step.shape).numel() * getattr(torch, step.dtype).itemsize


def write_safetensors(path: Path, steps: Sequence[Step], tensors: Iterable[tuple[Step, Tensor]]) -> None:
    """Write the tensors of ``steps`` as they come.

    Args:
        path: File to write.
        steps: What will come, in order.
        tensors: The same steps with their values, on any device.

    Raises:
        ValueError: a value's shape or dtype is not what its step says.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for step in steps:
        start, end = end, end + nbytes(step)
        header[step.name] = {
            "dtype": DTYPE_CODES[step.dtype],
            "shape": step.shape,
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for step, tensor in tensors:
            if tuple(tensor.shape) != step.shape or tensor.dtype != getattr(torch, step.dtype):
                raise ValueError(
                    f"{step.name} came out as {tensor.dtype} {list(tensor.shape)}, planned was "
                    f"{step.dtype} {list(step.shape)}"
                )
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
