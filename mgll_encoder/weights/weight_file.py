"""Opening weight files. The format is detected from the first bytes, not the name; nothing is unpickled.

Only headers are read on opening. Tensors are read on demand, so the optimizer states of a training checkpoint are never
loaded.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.files import regular_file
from mgll_encoder.common.texts import POINTER, read_json, refuse_pointer
from mgll_encoder.weights.foreign import other_format, refuse_adapter
from mgll_encoder.weights.locate import check_tower
from mgll_encoder.weights.spans import OpenFile, Span
from mgll_encoder.weights.torch_file import WeightSet, open_torch

FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""Weight files of a model folder, in search order."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a checkpoint, not read yet.

    Attributes:
        path: The requested file or folder.
        files: The weight files, shards in order.
        headers: Every tensor on the ``meta`` device: dtype and shape without data.
        wrapper: Other keys in a training checkpoint, e.g. ``optimizer``, ``epoch``, ``args``.
        sets: The sets of weights in a training checkpoint, raw and moving average, with their keys.
        taken: The set that was opened.
    """

    path: Path
    files: tuple[Path, ...]
    headers: Mapping[str, Tensor]
    wrapper: frozenset[str] = frozenset()
    sets: Mapping[WeightSet, str] = field(default_factory=dict)
    taken: WeightSet = "raw"
    _readers: Mapping[str, Callable[[str], Tensor]] = field(default_factory=dict, repr=False)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors by name, on the CPU, in their stored dtype."""
        return {name: self._readers[name](name) for name in names}


def open_weights(path: Path, weights: WeightSet | None = None) -> WeightFile:
    """Open a weight file, or the weights of a model folder (single file or shards).

    Args:
        path: A ``.pt``/``.pth``/``.bin``/``.safetensors`` file, or a folder with one of ``FOLDER_FILES``.
        weights: Which of two sets of weights in one file to open; None opens the raw ones if there are both.

    Raises:
        UserError: the path is missing, empty, truncated, or not a checkpoint, contains objects other than tensors, or
            does not have this set of weights.
    """
    check_tower(path)
    if not path.is_dir():
        return _open_file(regular_file(path, "weight file"), weights)
    refuse_adapter(path, "AutoModel", "AutoImageProcessor")
    file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    if file is None and (other := other_format(path)):
        raise BadDataError(f"folder {path} contains no weights: {other}")
    if file is None:
        present = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise BadDataError(
            f"folder {path} contains no weights (found: {present}): expected one of {', '.join(FOLDER_FILES)}; "
            "or pass the weight file itself"
        )
    if file.suffix == ".json":
        return _open_shards(path, file)
    return replace(_open_file(file, weights), path=path)


def is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors, from its first bytes: eight of header length, then a JSON header."""
    return _opened(path)[1][8:9] == b"{"


def _open_shards(folder: Path, index: Path) -> WeightFile:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not all(isinstance(v, str) for v in weight_map.values())
        or not weight_map
    ):
        raise BadDataError(
            f"{index}: field 'weight_map' is missing or empty: expected tensor names with their shards"
        )
    shards: dict[str, WeightFile] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise BadDataError(
                f"{index} names the shard '{name}', which is not in {folder}: complete the download"
            )
        shards[name] = _open_file(folder / name)
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard].headers:
            raise BadDataError(
                f"{index} expects '{tensor}' in {shard}, which lacks it: complete the download"
            )
    headers = {tensor: shards[shard].headers[tensor] for tensor, shard in weight_map.items()}
    readers = {tensor: shards[shard]._readers[tensor] for tensor, shard in weight_map.items()}
    return WeightFile(folder, tuple(folder / name for name in shards), headers, _readers=readers)


def _open_file(path: Path, weights: WeightSet | None = None) -> WeightFile:
    file, head = _opened(path)
    refuse_pointer(path, head)
    if head[8:9] == b"{":
        if weights is not None:
            raise BadDataError(f"{path} is a safetensors file, with one set of weights: leave `weights` out")
        return _open_safetensors(file)
    zipped = head.startswith(b"PK\x03\x04")
    if zipped or head.startswith(b"\x80"):  # torch's zip format, or the bare pickle from before 1.6
        held = open_torch(file, zipped, weights)
        readers = dict.fromkeys(held.headers, held.read)
        return WeightFile(path, (path,), held.headers, held.wrapper, held.sets, held.taken, readers)
    if other := other_format(path):
        raise BadDataError(other)
    raise BadDataError(f"{path} is not a checkpoint: expected safetensors or a file written by torch.save")


def _opened(path: Path) -> tuple[OpenFile, bytes]:
    """Open a file and read its first bytes."""
    try:
        file = OpenFile(path)
        head = file.head(len(POINTER))
    except OSError as error:
        raise BadDataError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if not head:
        raise BadDataError(f"{path} is empty (0 bytes): copy or download it again")
    return file, head


def _open_safetensors(file: OpenFile) -> WeightFile:
    path, headers = file.path, {}
    try:
        # Not framework="pt", which maps the file copy-on-write: the system refuses one larger than the memory.
        with safe_open(path, framework="np") as stream:
            for name in stream.keys():  # noqa: SIM118 - not a dict, not iterable
                part = stream.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise BadDataError(
                        f"{path}: tensor '{name}' has dtype {part.get_dtype()}: expected floats"
                    )
                headers[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except SafetensorError as error:
        raise BadDataError(f"{path} is truncated or damaged: {error}; copy or download it again") from None
    held = file.spans()
    return WeightFile(
        path, (path,), headers, _readers={name: _reader(file, held[name], headers[name]) for name in headers}
    )


def _reader(file: OpenFile, span: Span, header: Tensor) -> Callable[[str], Tensor]:
    return lambda _: file.tensor(span, header.dtype, header.shape)
