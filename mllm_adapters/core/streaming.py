"""Writes safetensors files tensor by tensor, with one tensor in memory instead of one shard.

Format: README of huggingface/safetensors, section Format (8-byte little-endian header length, JSON header padded
with spaces, then the tensors' bytes in the order of their offsets).
"""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from errno import EIO
from hashlib import sha256
from mmap import ACCESS_READ, MADV_DONTNEED, PAGESIZE, mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mgll_encoder.weights.spans import Span
from mllm_adapters.checkpoints.file_copy import copy_range
from mllm_adapters.core.operations import Step

DTYPE_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


def nbytes(step: Step) -> int:
    """Return the bytes of a step's target tensor."""
    total: int = torch.Size(step.shape).numel() * getattr(torch, step.dtype).itemsize
    return total


_BLOCK = 512 << 10

_HELD = 64 << 20
"""Maximum bytes of tensors in memory that wait for their check."""


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as stored in a file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_safetensors(
    path: Path, steps: Sequence[Step], tensors: Iterable[tuple[Step, Tensor | Span]]
) -> dict[str, str]:
    """Write the tensors of ``steps`` one by one; a thread hashes them and reads them back in parallel.

    Args:
        path: File to write; the caller must sync it to disk.
        steps: The steps, in order.
        tensors: The same steps with their values, on any device, or with their location in a file.

    Returns:
        The SHA-256 of each tensor that was given by value.

    Raises:
        ValueError: a value's shape or dtype differs from its step.
        OSError: it cannot be written, or reads back differently.
    """
    header, size = _header(steps)
    with path.open("w+b") as stream, ExitStack() as opened:
        stream.truncate(size)  # a file cannot be mapped past its end
        checks = opened.enter_context(_Checks(stream, path, size))
        sources: dict[Path, BinaryIO] = {}
        buffer = bytearray(_BLOCK)
        stream.write(header)
        for step, value in tensors:
            if isinstance(value, Span):
                if value.file not in sources:
                    sources[value.file] = opened.enter_context(value.file.open("rb"))
                copy_range(sources[value.file], stream, value.start, value.length)
                continue
            if tuple(value.shape) != step.shape or value.dtype != getattr(torch, step.dtype):
                raise ValueError(
                    f"{step.name} was computed as {value.dtype} {list(value.shape)}, planned was "
                    f"{step.dtype} {list(step.shape)}"
                )
            data, start = raw_bytes(value), stream.tell()
            _write(stream, data, buffer)
            checks.add(step.name, data, start)
        return checks.hashes()


def _write(stream: BinaryIO, data: memoryview, buffer: bytearray) -> None:
    """Write bytes through a warm buffer, because the kernel copies more slowly from a mapped file."""
    for start in range(0, len(data), len(buffer)):
        block = data[start : start + len(buffer)]
        buffer[: len(block)] = block
        stream.write(memoryview(buffer)[: len(block)])
    stream.flush()


def _header(steps: Sequence[Step]) -> tuple[bytes, int]:
    """Return the header bytes of a file with these tensors, and its final size."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for step in steps:
        start, end = end, end + nbytes(step)
        entries[step.name] = {
            "dtype": DTYPE_CODES[step.dtype],
            "shape": step.shape,
            "data_offsets": [start, end],
        }
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, 8 + len(encoded) + end


class _Checks:
    """Hashes tensors and compares the file with the computed values, in a thread parallel to the writing."""

    def __init__(self, stream: BinaryIO, path: Path, size: int) -> None:
        self._path = path
        self._written = mmap(stream.fileno(), size, access=ACCESS_READ)
        self._aside = ThreadPoolExecutor(1)
        self._pending: dict[str, tuple[int, Future[str]]] = {}
        self._hashes: dict[str, str] = {}

    def __enter__(self) -> "_Checks":
        return self

    def __exit__(self, *_: object) -> None:
        self._aside.shutdown(cancel_futures=True)
        self._written.close()

    def add(self, name: str, data: memoryview, start: int) -> None:
        """Check a tensor that was written at ``start``; waits while earlier ones occupy much memory."""
        self._pending[name] = len(data), self._aside.submit(self._check, name, data, start)
        while len(self._pending) > 1 and sum(size for size, _ in self._pending.values()) > _HELD:
            self._finish(next(iter(self._pending)))

    def hashes(self) -> dict[str, str]:
        """Wait for all checks: tensor name -> SHA-256."""
        for name in list(self._pending):
            self._finish(name)
        return self._hashes

    def _finish(self, name: str) -> None:
        self._hashes[name] = self._pending.pop(name)[1].result()

    def _check(self, name: str, data: memoryview, start: int) -> str:
        digest = sha256()
        for offset in range(0, len(data), _BLOCK):  # small enough for both to fit into the CPU's cache
            block = data[offset : offset + _BLOCK]
            found = np.frombuffer(self._written, np.uint8, len(block), start + offset)
            if not np.array_equal(found, np.frombuffer(block, np.uint8)):
                raise OSError(
                    EIO, f"tensor {name} reads back differently from how it was written", str(self._path)
                )
            digest.update(block)
        page = start - start % PAGESIZE
        # Otherwise the whole file would count as memory of this process.
        self._written.madvise(MADV_DONTNEED, page, start + len(data) - page)
        return digest.hexdigest()
