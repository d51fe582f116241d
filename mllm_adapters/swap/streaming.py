"""Writing safetensors files tensor by tensor, so that memory holds one tensor and not one shard.

Format: README of huggingface/safetensors, section Format (8-byte little-endian header length, JSON header padded
with spaces, then the tensors' bytes in the order of their offsets).
"""

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from errno import EIO
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mllm_adapters.contract import Step
from mllm_adapters.swap.transfer import copy_range

DTYPE_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


def nbytes(step: Step) -> int:
    """Bytes of a step's target tensor."""
    return torch.Size(step.shape).numel() * getattr(torch, step.dtype).itemsize


_BLOCK = 4 << 20


@dataclass(frozen=True)
class Span:
    """The bytes of a tensor in a file, to be copied as they are."""

    file: Path
    start: int
    length: int


def spans(file: Path) -> dict[str, Span]:
    """Where the tensors of a safetensors file lie in it.

    Raises:
        OSError: it cannot be read.
        ValueError: its header is damaged.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    data = 8 + length
    return {
        name: Span(file, data + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a file holds them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_safetensors(
    path: Path, steps: Sequence[Step], tensors: Iterable[tuple[Step, Tensor | Span]]
) -> dict[str, str]:
    """Write the tensors of ``steps`` as they come.

    Args:
        path: File to write.
        steps: What will come, in order.
        tensors: The same steps with their values, on any device, or with the place where these lie.

    Returns:
        The SHA-256 of each tensor that was given by value.

    Raises:
        ValueError: a value's shape or dtype is not what its step says.
        OSError: it cannot be written, or reads back differently.
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
    hashes: dict[str, str] = {}
    with path.open("w+b") as stream, ThreadPoolExecutor(1) as aside, ExitStack() as opened:
        sources: dict[Path, BinaryIO] = {}
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for step, value in tensors:
            if isinstance(value, Span):
                if value.file not in sources:
                    sources[value.file] = opened.enter_context(value.file.open("rb"))
                copy_range(sources[value.file], stream, value.start, value.length)
                continue
            if tuple(value.shape) != step.shape or value.dtype != getattr(torch, step.dtype):
                raise ValueError(
                    f"{step.name} came out as {value.dtype} {list(value.shape)}, planned was "
                    f"{step.dtype} {list(step.shape)}"
                )
            data = raw_bytes(value)
            hashing = aside.submit(sha256, data)  # beside the writing
            stream.write(data)
            stream.flush()
            _check_tail(stream, data, path, step.name)
            hashes[step.name] = hashing.result().hexdigest()
        stream.flush()
        os.fsync(stream.fileno())
    return hashes


def _check_tail(stream: BinaryIO, data: memoryview, path: Path, name: str) -> None:
    """Read back what was written last: the bytes in the file must be those that were computed."""
    end = os.lseek(stream.fileno(), 0, os.SEEK_CUR)
    for start in range(0, len(data), _BLOCK):
        block = bytes(data[start : start + _BLOCK])  # two memoryviews would be compared item by item
        if os.pread(stream.fileno(), len(block), end - len(data) + start) != block:
            raise OSError(EIO, f"tensor {name} reads back differently from how it was written", str(path))
