"""Files written by ``torch.save``: tensors are read; other objects are skipped or refused, and never run."""

import errno
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mgll_encoder.common.errors import BadDataError, UserError
from mgll_encoder.weights.spans import OpenFile, places
from mgll_encoder.weights.torchscript import is_torchscript, open_archive

WeightSet = Literal["raw", "ema"]
"""Which of two sets of weights in one file: those updated by the optimizer, or their moving average."""

RAW_SETS = ("model", "state_dict", "model_state_dict", "module")
"""Keys of the weights in training checkpoints."""

EMA_SETS = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema")
"""Keys of a moving average of the weights (timm, DeiT, OpenMMLab and others)."""

_BROKEN = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OSError, struct.error, ArithmeticError, MemoryError, NotImplementedError, zipfile.BadZipFile,
)  # fmt: skip
"""Exceptions of zipfile and torch's restricted unpickler for damaged or foreign bytes."""


class _Skipped:
    """Replaces an object that is not needed: accepts any arguments, stores nothing and does nothing."""

    def __new__(cls, *_: Any) -> "_Skipped":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


SKIPPED = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta")),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    ),
    *(
        f"{module}.{name}"
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("scalar", "_reconstruct")
    ),
    "numpy.dtype",
    "numpy.ndarray",
)
"""Objects that training scripts store with the weights, by the names in the pickle. Each is replaced by an object that
does nothing: the functions of these names are never called."""

_STAND_INS: list[Any] = [(_Skipped, name) for name in SKIPPED]

_CONSOLIDATE = (
    "run `python zero_to_fp32.py . consolidated` in the checkpoint's folder (DeepSpeed writes that script there), and "
    "pass the file that it writes"
)


@dataclass(frozen=True)
class TorchFile:
    """The tensors of a file, not read yet.

    Attributes:
        headers: Every tensor, on the ``meta`` device.
        read: Reads a tensor by name.
        wrapper: Keys of the objects stored with the weights.
        sets: The sets of weights in the file, with their keys; empty for a bare state dict.
        taken: The set that ``headers`` describes.
    """

    headers: Mapping[str, Tensor]
    read: Callable[[str], Tensor]
    wrapper: frozenset[str] = frozenset()
    sets: Mapping[WeightSet, str] = field(default_factory=dict)
    taken: WeightSet = "raw"


def open_torch(file: OpenFile, zipped: bool, weights: WeightSet | None = None) -> TorchFile:
    """Open a file that ``torch.save`` or ``torch.jit.save`` wrote.

    Args:
        file: The file.
        zipped: Whether it is a zip file (since torch 1.6) or a bare pickle.
        weights: Which of two sets of weights to read; None reads the raw ones if there are both.

    Raises:
        UserError: it is damaged, would create objects other than tensors, or does not contain these weights.
    """
    path = file.path
    if zipped and is_torchscript(_members(file)):
        try:
            return TorchFile(*open_archive(file))
        except _BROKEN as error:
            raise _refusal(path, zipped=False, error=error) from None
    content = _load(path, zipped)
    found = _sets(content)
    taken: WeightSet = weights or ("raw" if "raw" in found or not found else "ema")
    state = _tensors(content, found.get(taken)) if found else _tensors(content, None)
    _check_held(path, content, state, found, weights)
    headers = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    wrapper = frozenset(map(str, content)) if found and isinstance(content, Mapping) else frozenset()
    reader = _Reader(file, zipped, found.get(taken), state)
    return TorchFile(headers, reader.read, wrapper, found, taken)


class _Reader:
    """The tensors of a file. It is mapped once to locate them; values are read on demand.

    Files that cannot be mapped are loaded completely for the first value and stay in memory: bare pickles from before
    torch 1.6, and files named as another format.
    """

    def __init__(self, file: OpenFile, zipped: bool, name: str | None, state: Mapping[str, Tensor]) -> None:
        self._file, self._zipped, self._name = file, zipped, name
        self._places = places(state, file.path) if _can_be_mapped(file.path, zipped) else {}
        self._loaded: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        if name in self._places:
            return self._places[name].read(self._file)
        if not self._loaded:
            self._loaded = _tensors(_load(self._file.path, self._zipped), self._name)
        return self._loaded[name]


def _can_be_mapped(path: Path, zipped: bool) -> bool:
    return zipped and path.suffix != ".safetensors"  # torch relies on this suffix, whatever is in the file


def _load(path: Path, zipped: bool) -> object:
    mapped = _can_be_mapped(path, zipped)
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            # about unusual protocols and empty storages; what matters is checked here
            warnings.simplefilter("ignore")
            if mapped:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            with path.open("rb") as stream:
                return torch.load(stream, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        raise _refusal(path, zipped, error) from None


def _sets(content: object) -> dict[WeightSet, str]:
    """Return the sets of weights in a loaded file; empty for a bare state dict, or without weights."""
    if not isinstance(content, Mapping):
        return {}
    choices: Mapping[WeightSet, tuple[str, ...]] = {"raw": RAW_SETS, "ema": EMA_SETS}
    found: dict[WeightSet, str] = {}
    for kind, names in choices.items():
        name = next((n for n in names if isinstance(content.get(n), Mapping)), None)
        if name is not None:
            found[kind] = name
    if list(found) == ["ema"] and not _tensors(content, found["ema"]):
        return {}
    return found


def _tensors(content: object, name: str | None) -> dict[str, Tensor]:
    """Return the tensors of a bare state dict, or of the set with this key."""
    state = content.get(name) if name is not None and isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        return {}
    own = {k: v.detach() for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    inner = next((n for n in RAW_SETS if isinstance(state.get(n), Mapping)), None)
    return own if own or name is None or inner is None else _tensors(state, inner)


def _check_held(
    path: Path,
    content: object,
    state: Mapping[str, Tensor],
    found: Mapping[WeightSet, str],
    weights: WeightSet | None,
) -> None:
    """Refuse a file without the requested weights."""
    _check_not_sharded(path, content, state)
    if weights is not None and found and weights not in found:
        (other,) = set(get_args(WeightSet)) - {weights}
        raise BadDataError(
            f"{path} contains no {weights} weights, only {other} ones ('{found[other]}'): leave `weights` out"
        )
    if weights == "ema" and not found:
        raise BadDataError(
            f"{path} contains one set of weights and no moving average: expected one under "
            f"{', '.join(map(repr, EMA_SETS))}; leave `weights` out"
        )
    if not state:
        kind = type(content).__name__
        if isinstance(content, Mapping):
            kind += f" with {', '.join(str(key) for key in list(content)[:5]) or 'nothing'}"
        raise BadDataError(
            f"{path} contains no weights (found a {kind}): expected a dict of tensors, or one under "
            f"{', '.join(repr(name) for name in RAW_SETS)}"
        )


def _check_not_sharded(path: Path, content: object, state: Mapping[str, Tensor]) -> None:
    """Refuse the files of a DeepSpeed ZeRO run that contain the weights in pieces."""
    if not isinstance(content, Mapping):
        return
    inner = content.get("optimizer_state_dict")
    if isinstance(inner, Mapping) and "zero_stage" in inner:
        raise BadDataError(
            f"{path} is the optimizer state of one rank of a DeepSpeed ZeRO training: {_CONSOLIDATE}"
        )
    if "param_shapes" in content and any(not tensor.numel() for tensor in state.values()):
        raise BadDataError(
            f"{path} is a shard of a DeepSpeed ZeRO-3 training: its tensors are empty, the weights are in pieces in "
            f"*_optim_states.pt: {_CONSOLIDATE}"
        )


def _members(file: OpenFile) -> list[str]:
    """Return the member names of a zip file that may be a checkpoint; only the table of contents is read."""
    path = file.path
    try:
        with file.stream() as stream, zipfile.ZipFile(stream) as archive:
            members = archive.namelist()
    except _BROKEN:
        raise BadDataError(f"{path} is truncated or damaged: copy or download it again") from None
    if not any(Path(name).name == "data.pkl" for name in members):
        raise BadDataError(f"{path} is a zip file, not a checkpoint: expected a file written by torch.save")
    return members


def _refusal(path: Path, zipped: bool, error: BaseException) -> UserError:
    """Explain in one line why the restricted unpickler failed."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in text:
        found = ", ".join(_foreign(path) if zipped else text.rpartition("GLOBAL ")[2].split()[:1])
        return BadDataError(
            f"{path} would create objects other than tensors on loading ({found or 'other objects'}); refused, "
            "nothing was run: expected tensors, numbers, text and argparse.Namespace only"
        )
    if "unable to mmap" in text and f"({errno.ENOMEM})" in text:
        return BadDataError(
            f"{path} ({path.stat().st_size / 1e9:.1f} GB) is larger than the memory, and files of torch.save are "
            "mapped as a whole: use the checkpoint's safetensors or smaller shards, or a machine with more memory"
        )
    # without torch's advice to unpickle anyway
    reason = text.rpartition("WeightsUnpickler error:")[2].strip()
    first = next(iter(reason.splitlines()), type(error).__name__)
    return BadDataError(f"{path} is damaged or not a checkpoint ({first[:120]}): copy or download it again")


def _foreign(path: Path) -> list[str]:
    try:
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(SKIPPED))
    except _BROKEN:
        return []
