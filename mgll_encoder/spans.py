"""Where the bytes of a tensor are in a file, and reading them from there.

Not from a mapping of the file: where somebody cuts a mapped file short, touching it ends the process (SIGBUS), while a
read only comes back with less.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mgll_encoder.common.errors import BadDataError, UserError

_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class Span:
    """The bytes of a tensor in a file."""

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


def cut_short(file: str | Path) -> UserError:
    """What to say of a file that ends before what it holds does."""
    return BadDataError(f"{file} has been cut short while it was read: copy or download it again")


def read_span(span: Span, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A tensor out of its bytes.

    Raises:
        UserError: the file has been cut short.
    """
    tensor = torch.empty(shape, dtype=dtype)
    target = tensor.reshape(-1).view(torch.uint8).numpy().data
    descriptor = os.open(span.file, os.O_RDONLY)
    try:
        done = 0
        while done < span.length:
            count = os.preadv(descriptor, [target[done:]], span.start + done)
            if not count:
                raise cut_short(span.file)
            done += count
    finally:
        os.close(descriptor)
    return tensor


def unmapped(tensor: Tensor, file: Path) -> Tensor:
    """A tensor whose values lie in a mapping of a file, read into memory.

    Raises:
        UserError: the file has been cut short.
    """
    if not tensor.is_contiguous():
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        values = unmapped(whole, file).untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(
            values, tensor.storage_offset(), tensor.shape, tensor.stride()
        )
    offset = _offset(tensor.data_ptr(), file) if tensor.numel() else None
    if offset is None:  # in memory already, or there is no /proc to tell
        return tensor
    return read_span(Span(file, offset, tensor.nbytes), tensor.dtype, tensor.shape)


def _offset(address: int, file: Path) -> int | None:
    """What offset of a mapped file an address shows."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    known = (str(file.stat().st_ino), str(file.resolve()))  # layered file systems show another number
    for line in lines:
        span, _, offset, _, *shown = line.split(maxsplit=5)
        start, _, end = span.partition("-")
        if int(start, 16) <= address < int(end, 16):
            return address - int(start, 16) + int(offset, 16) if set(known) & set(shown) else None
    return None
