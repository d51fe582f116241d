"""Where the bytes of a tensor are in a file, and reading them from there.

Not from a mapping of the file: where somebody cuts a mapped file short, touching it ends the process (SIGBUS), while a
read only comes back with less.
"""

import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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


class OpenFile:
    """A file that is opened once, and read at any place by any thread; closed with the object.

    Attributes:
        path: Where it lies.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def head(self, length: int) -> bytes:
        """The first bytes, or fewer where the file ends."""
        return os.pread(self._descriptor, length, 0)

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """The file as a stream from its beginning; one at a time."""
        with os.fdopen(os.dup(self._descriptor), "rb") as stream:
            stream.seek(0)
            yield stream

    def tensor(self, span: Span, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """A tensor out of its bytes.

        Raises:
            UserError: the file has been cut short.
        """
        tensor = torch.empty(shape, dtype=dtype)
        target = tensor.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < span.length:
            count = os.preadv(self._descriptor, [target[done:]], span.start + done)
            if not count:
                raise cut_short(self.path)
            done += count
        return tensor

    def spans(self) -> dict[str, Span]:
        """As `spans`, of this file."""
        with self.stream() as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        data = 8 + length
        return {
            name: Span(self.path, data + start, end - start)
            for name, (start, end) in (
                (name, entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"
            )
        }


def spans(file: Path) -> dict[str, Span]:
    """Where the tensors of a safetensors file lie in it.

    Raises:
        OSError: it cannot be read.
        ValueError: its header is damaged.
    """
    return OpenFile(file).spans()


def cut_short(file: str | Path) -> UserError:
    """What to say of a file that ends before what it holds does."""
    return BadDataError(f"{file} has been cut short while it was read: copy or download it again")


@dataclass(frozen=True)
class MappedTensor:
    """Where a tensor of a mapped file lies in it, and how it views the bytes there.

    Attributes:
        span: The tensor's own bytes or, where it is not contiguous, those of its whole storage.
        dtype: The tensor's.
        shape: Likewise.
        strides: Likewise, in elements; None where it is contiguous.
        offset: Its first element in its storage; 0 where it is contiguous.
    """

    span: Span
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...] | None = None
    offset: int = 0

    def read(self, file: OpenFile) -> Tensor:
        """The tensor, read into memory.

        Raises:
            UserError: the file has been cut short.
        """
        if self.strides is None:
            return file.tensor(self.span, self.dtype, self.shape)
        storage = file.tensor(self.span, torch.uint8, torch.Size([self.span.length])).untyped_storage()
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)


def places(tensors: Mapping[str, Tensor], file: Path) -> dict[str, MappedTensor]:
    """Where the values of tensors lie whose memory is a mapping of a file.

    Those that are not in the file are left out: what is in memory already, or all where there is no /proc to tell.
    """
    ranges = _mapped(file)
    found = {name: _place(tensor, file, ranges) for name, tensor in tensors.items()}
    return {name: place for name, place in found.items() if place is not None}


def _place(tensor: Tensor, file: Path, ranges: Sequence[tuple[int, int, int]]) -> MappedTensor | None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return None
    if not tensor.numel():
        return MappedTensor(Span(file, 0, 0), tensor.dtype, tensor.shape)
    storage = tensor.untyped_storage()
    own = tensor.is_contiguous()
    address, length = (tensor.data_ptr(), tensor.nbytes) if own else (storage.data_ptr(), storage.nbytes())
    start = _offset(address, ranges)
    if start is None:
        return None
    span = Span(file, start, length)
    if own:
        return MappedTensor(span, tensor.dtype, tensor.shape)
    return MappedTensor(span, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _mapped(file: Path) -> list[tuple[int, int, int]]:
    """The addresses at which a file is mapped: first, one after the last, offset of the first in the file."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    known = {str(file.stat().st_ino), str(file.resolve())}  # layered file systems show another number
    found = []
    for line in lines:
        span, _, offset, _, *shown = line.split(maxsplit=5)
        if known & set(shown):
            start, _, end = span.partition("-")
            found.append((int(start, 16), int(end, 16), int(offset, 16)))
    return found


def _offset(address: int, ranges: Iterable[tuple[int, int, int]]) -> int | None:
    """What offset of a mapped file an address shows."""
    return next((address - start + offset for start, end, offset in ranges if start <= address < end), None)
