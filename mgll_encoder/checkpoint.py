"""Opening weight files: their first bytes tell what they are, never their names; nothing is unpickled.

Only headers are read on opening. Tensors are read (memory-mapped) when asked for, so that the optimizer states
of a training checkpoint cost nothing.
"""

import argparse
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mgll_encoder.common.errors import UserError

FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""Weight files of a model folder, in the order in which they are looked for."""

_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Names under which training checkpoints keep the weights."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

_MAPPED = 256 << 20
"""Bytes that are read of a mapped file before it is mapped anew: the pages that were read are let go then."""

_BROKEN = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OSError, struct.error,
)  # fmt: skip
"""What zipfile and torch's restricted unpickler raise on damaged or foreign bytes."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, not read yet.

    Attributes:
        path: The file or folder that was asked for.
        files: The weight files, shards in order.
        headers: Every tensor on the ``meta`` device: dtype and shape without data.
        wrapper: Keys beside the weights in a training checkpoint, e.g. ``optimizer``, ``epoch``, ``args``.
    """

    path: Path
    files: tuple[Path, ...]
    headers: Mapping[str, Tensor]
    wrapper: frozenset[str] = frozenset()
    _readers: Mapping[str, Callable[[str], Tensor]] = field(default_factory=dict, repr=False)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors by name, on the CPU, in their stored dtype."""
        return {name: self._readers[name](name) for name in names}


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a weight file, or the weights of a model folder (single file or shards).

    Args:
        path: A ``.pt``/``.pth``/``.bin``/``.safetensors`` file, or a folder with one of ``FOLDER_FILES``.

    Raises:
        UserError: the path is missing, empty, truncated, no checkpoint, or holds objects other than tensors.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: check the path of the tower")
    if path.is_file():
        return _open_file(path)
    weights = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    if weights is None:
        present = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise UserError(
            f"folder {path} holds no weights (found: {present}): expected one of {', '.join(FOLDER_FILES)}; "
            "or pass the weight file itself"
        )
    if weights.suffix != ".json":
        opened = _open_file(weights)
        return Checkpoint(path, opened.files, opened.headers, opened.wrapper, opened._readers)
    return _open_shards(path, weights)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is unreadable, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}: expected an object")
    return content


def _open_shards(folder: Path, index: Path) -> Checkpoint:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not all(isinstance(v, str) for v in weight_map.values())
        or not weight_map
    ):
        raise UserError(
            f"{index}: field 'weight_map' is missing or empty: expected tensor names with their shards"
        )
    shards: dict[str, Checkpoint] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(
                f"{index} names the shard '{name}', which is not in {folder}: complete the download"
            )
        shards[name] = _open_file(folder / name)
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard].headers:
            raise UserError(f"{index} expects '{tensor}' in {shard}, which lacks it: complete the download")
    headers = {tensor: shards[shard].headers[tensor] for tensor, shard in weight_map.items()}
    readers = {tensor: shards[shard]._readers[tensor] for tensor, shard in weight_map.items()}
    return Checkpoint(folder, tuple(folder / name for name in shards), headers, _readers=readers)


def _open_file(path: Path) -> Checkpoint:
    try:
        with path.open("rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if not head:
        raise UserError(f"{path} is empty (0 bytes): copy or download it again")
    if head[8:9] == b"{":  # eight bytes of header length, then the JSON header
        return _open_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):  # torch's zip, or the bare pickle that it wrote before 1.6
        return _open_torch(path, zipped=head.startswith(b"PK"))
    raise UserError(f"{path} is not a checkpoint: expected safetensors or a file written by torch.save")


def _open_safetensors(path: Path) -> Checkpoint:
    headers = {}
    try:
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - no dict: it cannot be iterated
                part = stream.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise UserError(f"{path}: tensor '{name}' has dtype {part.get_dtype()}: expected floats")
                headers[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged: {error}; copy or download it again") from None
    return Checkpoint(path, (path,), headers, _readers=dict.fromkeys(headers, _SafetensorsReader(path).read))


class _SafetensorsReader:
    """The tensors of a safetensors file; however much is read of it, little stays in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: Any = None
        self._read = 0

    def read(self, name: str) -> Tensor:
        if self._opened is None or self._read > _MAPPED:
            self._opened, self._read = safe_open(self._path, framework="pt"), 0
        tensor: Tensor = self._opened.get_tensor(name)
        self._read += tensor.nbytes
        return tensor


def _open_torch(path: Path, zipped: bool) -> Checkpoint:
    if zipped:
        _check_archive(path)
    content = _load(path, zipped)
    state, wrapper = _state_dict(content)
    if not state:
        found = type(content).__name__
        if isinstance(content, Mapping):
            found += f" with {', '.join(str(key) for key in list(content)[:5]) or 'nothing'}"
        raise UserError(
            f"{path} holds no weights (found a {found}): expected a dict of tensors, or one under "
            f"{', '.join(repr(name) for name in _WRAPPERS)}"
        )
    headers = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    reader = _TorchReader(path, zipped)
    return Checkpoint(path, (path,), headers, wrapper, dict.fromkeys(headers, reader.read))


class _TorchReader:
    """The tensors of a file written by ``torch.save``; however much is read of it, little stays in memory.

    (Of the bare pickles of before torch 1.6, which cannot be mapped, the whole file does.)
    """

    def __init__(self, path: Path, zipped: bool) -> None:
        self._path = path
        self._zipped = zipped
        self._state: dict[str, Tensor] = {}
        self._read = 0

    def read(self, name: str) -> Tensor:
        if not self._state or (self._zipped and self._read > _MAPPED):
            self._state, self._read = _state_dict(_load(self._path, self._zipped))[0], 0
        tensor = self._state[name]
        self._read += tensor.nbytes
        return tensor


def _load(path: Path, zipped: bool) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", mmap=zipped or None, weights_only=True)
    except _BROKEN as error:
        raise _refusal(path, zipped, error) from None


def _state_dict(content: object) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The weights in what was loaded, and the names of what stands beside them."""
    if not isinstance(content, Mapping):
        return {}, frozenset()
    wrapped = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
    state = content if wrapped is None else wrapped
    tensors = {k: v.detach() for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return tensors, frozenset() if wrapped is None else frozenset(str(key) for key in content)


def _check_archive(path: Path) -> None:
    """Refuse zip files that ``torch.load`` would run or misread; only the table of contents is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).name for name in archive.namelist()}
    except (zipfile.BadZipFile, *_BROKEN):
        raise UserError(f"{path} is truncated or damaged: copy or download it again") from None
    if "constants.pkl" in names:
        raise UserError(
            f"{path} is a TorchScript archive, which holds code: expected weights only; save its state_dict() with "
            "torch.save, or use the same tower from a transformers folder"
        )
    if "data.pkl" not in names:
        raise UserError(f"{path} is a zip file, not a checkpoint: expected a file written by torch.save")


def _refusal(path: Path, zipped: bool, error: Exception) -> UserError:
    """Say in one line why torch's restricted unpickler gave up."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in text:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        found = ", ".join(sorted(set(names) - {"argparse.Namespace"})) or "other objects"
        return UserError(
            f"{path} wants to create objects other than tensors on loading ({found}); refused, nothing was run: "
            "expected tensors, numbers, text and argparse.Namespace only"
        )
    reason = text.rpartition("WeightsUnpickler error:")[
        2
    ].strip()  # without torch's advice to unpickle anyway
    first = next(iter(reason.splitlines()), type(error).__name__)
    return UserError(f"{path} is damaged or no checkpoint ({first[:120]}): copy or download it again")
