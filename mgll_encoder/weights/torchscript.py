"""Tensors of a TorchScript archive, such as OpenAI's ``ViT-L-14.pt``; its code is not even read.

Such an archive is a zip file with a pickle of nested modules, whose classes are defined by the archive's own code, and
one file per storage. The pickle is read by an unpickler that knows a few names, all of plain data.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from mgll_encoder.weights.spans import OpenFile

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip

_CODE = "__torch__"
"""First component of the names of classes that the archive's own code defines."""

_MOST = 100_000
"""Limit on modules, more than any model has: modules that contain each other would never end."""


class _Module:
    """A module of the archive: its attributes only, nothing callable."""

    def __init__(self) -> None:
        self.attributes: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    size: int


@dataclass(frozen=True)
class _View:
    """A tensor as a view of a storage, not read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _view(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _View:
    """Replace ``torch._utils._rebuild_tensor_v2``."""
    view = _View(storage, offset, tuple(shape), tuple(stride))
    numbers = (view.offset, *view.shape, *view.stride)
    if not (isinstance(storage, _Storage) and all(isinstance(n, int) and n >= 0 for n in numbers)):
        raise pickle.UnpicklingError("a tensor is not described by numbers")
    last = offset + sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
    if prod(view.shape) and last >= storage.size:
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return view


def _itself(value: Any, *_: Any) -> Any:
    """Replace ``torch._utils._rebuild_parameter`` and the functions that TorchScript uses to tag lists."""
    return value


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_parameter"): _itself,
    ("collections", "OrderedDict"): OrderedDict,
    **{
        ("torch.jit._pickle", name): _itself
        for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
    },
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == _CODE:
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(size, int):
            raise pickle.UnpicklingError("a storage is not described by a type and a size")
        return _Storage(dtype, str(key), size)


def is_torchscript(names: list[str]) -> bool:
    """Return whether the members of a zip file are those of a TorchScript archive."""
    return any(name.endswith("/constants.pkl") for name in names)


def open_archive(file: OpenFile) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """Return the tensors of an archive on the ``meta`` device, by state dict name, and a function that reads one.

    Raises:
        pickle.UnpicklingError: the archive would create objects other than modules and tensors, or is damaged.
    """
    with file.stream() as stream, zipfile.ZipFile(stream) as archive:
        member = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if member is None:
            raise pickle.UnpicklingError("there is no data.pkl in it")
        with archive.open(member) as pickled:
            views = dict(_named_views(_Unpickler(pickled).load()))
        if not views:
            raise pickle.UnpicklingError("no module in it has a tensor")
        root = member.removesuffix("data.pkl")
        for name, view in views.items():
            _check_stored(archive, f"{root}data/{view.storage.key}", name, view)

    def read(name: str) -> Tensor:
        view = views[name]
        with file.stream() as stream, zipfile.ZipFile(stream) as archive:
            content = bytearray(archive.read(f"{root}data/{view.storage.key}"))
        if not content:
            return torch.empty(view.shape, dtype=view.storage.dtype)
        whole = torch.frombuffer(content, dtype=view.storage.dtype)
        return whole.as_strided(view.shape, view.stride, view.offset).clone()

    headers = {n: torch.empty(v.shape, dtype=v.storage.dtype, device="meta") for n, v in views.items()}
    return headers, read


def _named_views(root: Any) -> Iterator[tuple[str, _View]]:
    """Yield the tensors in nested modules, with their attribute paths."""
    waiting: list[tuple[str, Any]] = [("", root)]
    for _ in range(_MOST):
        if not waiting:
            return
        prefix, module = waiting.pop()
        for name, value in module.attributes.items() if isinstance(module, _Module) else ():
            if isinstance(value, _View):
                yield f"{prefix}{name}", value
            elif isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value))
    raise pickle.UnpicklingError("its modules contain each other endlessly")


def _check_stored(archive: zipfile.ZipFile, member: str, name: str, view: _View) -> None:
    info = archive.getinfo(member)
    expected = view.storage.size * view.storage.dtype.itemsize
    if info.file_size != expected or info.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"tensor {name} has {info.file_size} bytes, expected {expected}")
