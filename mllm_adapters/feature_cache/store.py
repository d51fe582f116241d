"""Features of images on disk: memory-mapped safetensors, written shard by shard, indexed by the image's hash."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mgll_encoder.common.errors import MismatchError, StorageError
from mgll_encoder.common.files import appearing

ABOUT = "store.json"
"""File that describes what the features of a folder depend on."""

LENGTHS = "lengths"

SHARD_BYTES = 1 << 27
"""Size of a shard: a killed run computes at most so much again."""

OPEN_SHARDS = 256
"""Shards that a process keeps open, because file handles are limited."""

Stored = tuple[Sequence[Tensor], Sequence[int]]
"""Tensors of an image, and their lengths."""


class FeatureStore:
    """Features of images under one key: tower, preprocessing, precision. The key is the name of the folder.

    Args:
        parent: Folder of all stores.
        about: Everything except the image that the features depend on.
    """

    def __init__(self, parent: Path, about: Mapping[str, Any]) -> None:
        said = json.dumps(about, sort_keys=True, indent=1, default=str)
        self.folder = parent / sha256(said.encode()).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / ABOUT
        if not note.is_file():
            with appearing(note) as partial:
                partial.write_text(said, encoding="utf-8")
        if note.read_text(encoding="utf-8") != said:
            raise MismatchError(f"{note} does not match the name of its folder: remove {self.folder}")
        self.shards: dict[str, Path] = {}
        self._looked_at: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Find shards added by other processes. A damaged shard is removed: its images are computed again."""
        for shard in sorted(set(self.folder.glob("*.safetensors")) - self._looked_at):
            header = _header(shard)
            if header is None:
                shard.unlink(missing_ok=True)
                _opened.cache_clear()
                continue
            self._looked_at.add(shard)
            for name in header:
                digest, _, what = name.partition("/")
                if what == LENGTHS:
                    self.shards[digest] = shard

    def __contains__(self, digest: str) -> bool:
        return digest in self.shards

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Return the digests that are not in the store, each once, in order."""
        return [digest for digest in dict.fromkeys(digests) if digest not in self.shards]

    def get(self, digest: str) -> Stored:
        """Return the features of an image.

        Raises:
            KeyError: the store has none.
        """
        shard = _opened(self.shards[digest])
        lengths = shard.get_tensor(f"{digest}/{LENGTHS}").tolist()
        count = int(lengths.pop())
        return [shard.get_tensor(f"{digest}/{i}") for i in range(count)], lengths

    def add(self, images: Mapping[str, Stored]) -> None:
        """Write a shard."""
        tensors: dict[str, Tensor] = {}
        for digest, (features, lengths) in images.items():
            tensors |= {f"{digest}/{i}": value.contiguous().clone() for i, value in enumerate(features)}
            tensors[f"{digest}/{LENGTHS}"] = torch.tensor([*lengths, len(features)])
        name = sha256("".join(images).encode()).hexdigest()
        shard = self.folder / f"{name}.safetensors"
        with appearing(shard) as partial:
            save_file(tensors, partial)
        _opened.cache_clear()  # the name may have been another process's file
        self.shards |= dict.fromkeys(images, shard)
        self._looked_at.add(shard)

    def check_space(self, size: int) -> None:
        """Check that there is enough disk space.

        Raises:
            UserError: there is not; the message says what to do.
        """
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise StorageError(
                f"the feature cache needs {readable(size)} in {self.folder.parent}, where {readable(free)} are free: "
                "set MGLL_CACHE_DIR to a larger disk, or add `feature_cache=False`"
            )


def size_of(stored: Stored) -> int:
    """Return the bytes of an image's features."""
    return sum(value.numel() * value.element_size() for value in stored[0])


def readable(size: float) -> str:
    """Format a number of bytes for people."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if size >= u), (1e3, "kB"))
    return f"{size / unit:,.1f} {name}"


@lru_cache(OPEN_SHARDS)
def _opened(shard: Path) -> Any:
    return safe_open(shard, framework="pt")


def _header(shard: Path) -> dict[str, Any] | None:
    """Read the names in a shard, or None if the file is incomplete."""
    with shard.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(min(length, shard.stat().st_size))
    try:
        header: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    header.pop("__metadata__", None)
    end = max((value["data_offsets"][1] for value in header.values()), default=0)
    return header if shard.stat().st_size == 8 + length + end else None
