"""A model folder read from its headers: configuration, tensor names, shapes and dtypes; values on demand."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgll_encoder.common.errors import BadDataError, NotFoundError
from mgll_encoder.common.hub import at_hand
from mgll_encoder.common.texts import read_json
from mgll_encoder.weights.foreign import other_format
from mgll_encoder.weights.weight_file import WeightFile as Weights
from mgll_encoder.weights.weight_file import is_safetensors, open_weights
from mllm_adapters.checkpoints.locate import find_part, refuse_delta
from mllm_adapters.checkpoints.side_files import TEMPLATES, left_behind, published

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names of weight files; the first that exists is used, as in transformers."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Any of these files is a tokenizer."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


@dataclass(frozen=True)
class TensorHeader:
    """Name, dtype and shape of a tensor, and the file that holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path


class Checkpoint:
    """A local model folder; tensor values are read only when asked for.

    Args:
        folder: Folder with a config.json and weights (safetensors or .bin, sharded or not).
        extra_weights: Names of further weight files that the folder may contain; only their tensors that are
            missing in the shards are used.
        given: Paths of parts outside the folder, by name; other parts are searched for.
        loose: Weight files of a folder without config.json; the configuration is then empty.
        config: The contents of config.json, if they have already been read.

    Attributes:
        parts: The attached parts, by name.

    Raises:
        UserError: the folder or its config.json is missing or unreadable.
    """

    def __init__(
        self,
        folder: Path,
        extra_weights: tuple[str, ...] = (),
        *,
        given: Mapping[str, Path] | None = None,
        loose: tuple[Path, ...] = (),
        config: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.extra_weights = extra_weights
        self.parts: dict[str, Path] = {}
        self._given = given or {}
        self._loose = loose
        self._opened: dict[Path, Weights] = {}
        self._attached: dict[str, TensorHeader] = {}
        refuse_delta(folder)
        if not loose and not (folder / "config.json").is_file():
            raise NotFoundError(f"{folder} is not a checkpoint folder: expected a folder with a config.json")
        if config is None:
            config = {} if loose else read_json(folder / "config.json")
        self.config = config

    @cached_property
    def config_bytes(self) -> bytes:
        """Return the bytes of config.json, for hashing and copying."""
        return (self.folder / "config.json").read_bytes()

    @cached_property
    def partial(self) -> bool:
        """Whether the folder holds only extra weights (an adapter, a projector), and the rest is stored elsewhere."""
        whole = self._loose or any((self.folder / name).is_file() for name in WEIGHTS)
        return not whole and any((self.folder / name).is_file() for name in self.extra_weights)

    @cached_property
    def files(self) -> list[Path]:
        """Return the weight files that the index names, or the single one; none in a `partial` checkpoint.

        Raises:
            UserError: there are none, or a file named in the index is missing.
        """
        if self._loose:
            return list(self._loose)
        if self.partial:
            return []
        if self._weights_file.suffix != ".json":
            return [self._weights_file]
        shards = sorted(set(self._weight_map.values()))
        for name in shards:
            if Path(name).name != name or not (self.folder / name).is_file():
                raise NotFoundError(f"{self.folder}: shard {name} is missing: complete the download")
        return [self.folder / name for name in shards]

    @cached_property
    def tensors(self) -> dict[str, TensorHeader]:
        """Read the headers of all tensors, in file order.

        Raises:
            UserError: a damaged shard, a tensor in two shards, or a tensor in no shard.
        """
        found: dict[str, TensorHeader] = {}
        for file in self.files:
            for header in self._headers(file):
                if header.name in found:
                    other = found[header.name].file.name
                    raise BadDataError(
                        f"{self.folder}: tensor {header.name} is in both {other} and {file.name}"
                    )
                found[header.name] = header
        if absent := sorted(set(self._weight_map) - set(found)):
            raise BadDataError(
                f"{self.folder}: the index names {absent[0]}, which no shard holds: download it again"
            )
        for extra in self.extra_weights:
            if (self.folder / extra).is_file():
                for header in self._headers(self.folder / extra):
                    found.setdefault(header.name, header)
        return found

    @cached_property
    def side_files(self) -> list[Path]:
        """Return the model's files other than weights: configuration, tokenizer, processor, license."""
        return [] if self._loose else published(self.folder)

    @cached_property
    def left_behind(self) -> list[str]:
        """Return the names in the folder that are not part of a model: they are not copied to any output."""
        read = (self.folder / name for name in (*WEIGHTS, *self.extra_weights, "adapter_config.json"))
        known = [*self.files, *read, *self.side_folders, *self.parts.values()]
        return [] if self._loose else left_behind(self.folder, known)

    @cached_property
    def side_folders(self) -> list[Path]:
        """Return subfolders with further tokenizers and chat templates of a processor, without weights."""
        folders = (f for f in self.folder.iterdir() if f.is_dir() and not (f / "config.json").exists())
        return sorted(
            f for f in folders if f.name == TEMPLATES or any((f / name).is_file() for name in TOKENIZER_FILES)
        )

    def find(self, part: str, *names: str) -> Path | None:
        """Find a part: at the given path, else the first of ``names`` that is found.

        Raises:
            UserError: the given path does not exist.
        """
        if part not in self._given:
            return next((path for name in names if (path := find_part(name, self.folder))), None)
        if not (given := at_hand(self._given[part])).exists():
            raise NotFoundError(f"`parts['{part}']={given}`: this file or folder does not exist")
        return given

    def attach(self, part: str, path: Path) -> dict[str, TensorHeader]:
        """Make the tensors of a weight file or model folder readable as ``PART/KEY``.

        Returns:
            The part's own tensor names, each with its header here.

        Raises:
            UserError: the part is missing or damaged.
        """
        found: dict[str, TensorHeader] = {}
        for file in Checkpoint(path).files if path.is_dir() else [path]:
            for header in self._headers(file):
                found[header.name] = replace(header, name=f"{part}/{header.name}")
        self._attached |= {header.name: header for header in found.values()}
        self.parts[part] = path
        return found

    def header(self, name: str) -> TensorHeader:
        """Return the header of a tensor of the checkpoint or, as ``PART/KEY``, of an attached part.

        Raises:
            UserError: there is no such tensor.
        """
        found = self._attached.get(name) or self.tensors.get(name)
        if found is None:
            raise BadDataError(
                f"{self.folder} has no tensor {name}: complete the checkpoint, or write it again"
            )
        return found

    def read(self, name: str) -> Tensor:
        """Read the values of one tensor, named as for `header`, and nothing else."""
        header = self.header(name)
        own = name if name in self.tensors else name.partition("/")[2]
        return self._weights(header.file).read([own])[own]

    @property
    def rightly_named(self) -> bool:
        """Whether all weight files have the format that their name implies, as transformers assumes."""
        return all(is_safetensors(file) == (file.suffix == ".safetensors") for file in self.files)

    def state(self) -> dict[str, Tensor]:
        """Read the values of all tensors."""
        return {name: self.read(name) for name in self.tensors}

    def release(self, file: Path) -> None:
        """Release the memory held for a weight file; it can be read again."""
        self._opened.pop(file, None)

    @cached_property
    def _weights_file(self) -> Path:
        file = next((self.folder / name for name in WEIGHTS if (self.folder / name).is_file()), None)
        if file is None:
            found = other_format(self.folder)
            expected = f"{found}; expected" if found else "expected"
            raise NotFoundError(
                f"{self.folder} holds a config.json but no weights: {expected} one of {', '.join(WEIGHTS)}"
            )
        return file

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        """Return tensor name -> shard from the index; empty for a single file without index."""
        if self._loose or self.partial:
            return {}
        if self._weights_file.suffix != ".json":
            return {}
        weight_map = read_json(self._weights_file).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(shard, str) for shard in weight_map.values())
        ):
            raise BadDataError(
                f"{self._weights_file}: field 'weight_map' is missing or damaged: download it again"
            )
        return weight_map

    def _weights(self, file: Path) -> Weights:
        if file not in self._opened:
            self._opened[file] = open_weights(file)
        return self._opened[file]

    def _headers(self, file: Path) -> list[TensorHeader]:
        headers = self._weights(file).headers
        return [TensorHeader(name, t.dtype, tuple(t.shape), file) for name, t in headers.items()]
