"""Locating the bytes of a tensor in a file, and reading them.

Files are read, not memory-mapped: if a mapped file is truncated, an access kills the process (SIGBUS), while a read
only returns fewer bytes.
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
    """A file that is opened once and can be read at any position by any thread; closed with the object.

    Attributes:
        path: Its path.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def head(self, length: int) -> bytes:
        """Read the first bytes, or fewer if the file is shorter."""
        return os.pread(self._descriptor, length, 0)

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """Yield the file as a stream from its beginning; only one at a time."""
        with os.fdopen(os.dup(self._descriptor), "rb") as stream:
            stream.seek(0)
            yield stream

    def tensor(self, span: Span, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """Read a tensor from its bytes.

        Raises:
            UserError: the file was truncated.
        """
        tensor = torch.empty(shape, dtype=dtype)
        target = tensor.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < span.length:
            count = os.preadv(self._descriptor, [target[done:]], span.start + done)
            if not count:
                raise truncated(self.path)
            done += count
        return tensor

    def spans(self) -> dict[str, Span]:
        """Return the spans of this file, as `spans`."""
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
    """Return the position of each tensor in a safetensors file.

    Raises:
        OSError: it cannot be read.
        ValueError: its header is damaged.
    """
    return OpenFile(file).spans()


def truncated(file: str | Path) -> UserError:
    """Return the error for a file that ends before its tensors do."""
    return BadDataError(f"{file} was truncated while it was read: copy or download it again")


@dataclass(frozen=True)
class MappedTensor:
    """The position of a tensor in a mapped file, and its view of the bytes there.

    Attributes:
        span: The tensor's bytes or, if it is not contiguous, those of its whole storage.
        dtype: Its dtype.
        shape: Its shape.
        strides: Its strides, in elements; None if it is contiguous.
        offset: Its first element in its storage; 0 if it is contiguous.
    """

    span: Span
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...] | None = None
    offset: int = 0

    def read(self, file: OpenFile) -> Tensor:
        """Read the tensor into memory.

        Raises:
            UserError: the file was truncated.
        """
        if self.strides is None:
            return file.tensor(self.span, self.dtype, self.shape)
        storage = file.tensor(self.span, torch.uint8, torch.Size([self.span.length])).untyped_storage()
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)


def places(tensors: Mapping[str, Tensor], file: Path) -> dict[str, MappedTensor]:
    """Locate the values of tensors whose memory is a mapping of a file.

    Tensors that are not in the file are omitted: those already in memory, or all if there is no /proc.
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
    """Return the addresses at which a file is mapped: start, end (exclusive), offset of the start in the file."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    known = {str(file.stat().st_ino), str(file.resolve())}  # layered file systems show a different number
    found = []
    for line in lines:
        span, _, offset, _, *shown = line.split(maxsplit=5)
        if known & set(shown):
            start, _, end = span.partition("-")
            found.append((int(start, 16), int(end, 16), int(offset, 16)))
    return found


def _offset(address: int, ranges: Iterable[tuple[int, int, int]]) -> int | None:
    """Return the offset in a mapped file that an address belongs to."""
    return next((address - start + offset for start, end, offset in ranges if start <= address < end), None)
