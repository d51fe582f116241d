"""Batches from a manifest: images are opened in the workers, each distinct text of a batch is encoded once."""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from mgll_encoder.common.errors import NotFoundError, UserError, unknown_name
from mgll_encoder.common.files import is_file
from mgll_encoder.common.images import open_image
from mgll_encoder.common.progress import track
from mgll_encoder.common.skipped import DISAGREE, NO_FILE, Skipped, unnamed
from mgll_encoder.data.laterality import names_side
from mgll_encoder.data.manifest import ManifestRow, image_folder, named, read_header, read_rows, row_at
from mgll_encoder.data.manifest_formats import format_of
from mgll_encoder.tower.preprocess import image_transform
from mgll_encoder.tower.spec import TowerSpec


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split of a manifest.

    Attributes:
        path: The manifest.
        folder: The image folder.
        places: Places of the rows in the manifest, [n].
        numbers: Their numbers in error messages, [n].
        granularities: The granularities in use, coarse to fine.
        joined: Whether all texts of an image are joined into one (plain CLIP), instead of texts per granularity.
        texts_per_granularity: Granularity -> number of distinct texts.
    """

    path: Path
    folder: Path
    places: NDArray[np.int64]
    numbers: NDArray[np.int64]
    granularities: tuple[str, ...]
    joined: bool
    texts_per_granularity: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)

    def row(self, index: int) -> ManifestRow:
        """Read a row from the manifest."""
        return row_at(self.path, int(self.places[index]))

    def texts(self, row: ManifestRow) -> list[list[str]]:
        """Return the texts of a row, per granularity in use (one list for ``joined``)."""
        levels = [row.texts.get(name, []) for name in self.granularities]
        return [["; ".join(text for level in levels for text in level)]] if self.joined else levels

    def all_texts(self) -> Iterator[str]:
        """Yield every text of every row, with one row in memory at a time."""
        for index in range(len(self)):
            for level in self.texts(self.row(index)):
                yield from level

    @property
    def images(self) -> Iterator[Path]:
        """The image file of every row, one row in memory at a time."""
        return (self.folder / self.row(index).image for index in range(len(self)))

    def sample(self, most: int) -> "SplitRows":
        """Return at most ``most`` rows, evenly spaced."""
        if len(self) <= most:
            return self
        chosen = np.linspace(0, len(self) - 1, most).round().astype(int)
        return replace(self, places=self.places[chosen], numbers=self.numbers[chosen])


def plan_rows(
    path: Path,
    folder: Path | None,
    granularities: Sequence[str],
    split: str,
    joined: bool,
    skipped: Skipped,
) -> SplitRows:
    """Choose the rows of one split, see :func:`plan_splits`."""
    return plan_splits(path, folder, granularities, (split,), joined, skipped)[split]


def plan_splits(
    path: Path,
    folder: Path | None,
    granularities: Sequence[str],
    splits: Sequence[str],
    joined: bool,
    skipped: Skipped,
) -> dict[str, SplitRows]:
    """Choose the rows of each split, in one pass. A few numbers per row stay in memory.

    Missing images are found here; images that cannot be decoded only when they are read (`ManifestImages`), because
    decoding a quarter of a million photographs in advance takes an hour.

    Args:
        path: The manifest.
        folder: The image folder; None for the one named in the manifest.
        granularities: Granularities to use; empty for all.
        splits: The splits.
        joined: See :class:`SplitRows`.
        skipped: Collects the skipped rows; stops at the first if strict.

    Raises:
        UserError: the manifest is damaged, a granularity is unknown, or the image folder does not exist.
    """
    header = read_header(path)
    for name in granularities:
        if name not in header.granularities:
            raise unknown_name("granularity", name, header.granularities)
    used = tuple(name for name in header.granularities if not granularities or name in granularities)
    folder = folder or image_folder(path, header)
    if not folder.is_dir():
        raise NotFoundError(f"image folder {folder} of manifest {path} does not exist: give it with `images`")
    drafts = {split: _Draft(used) for split in splits}
    for number, place, row in track(read_rows(path, skipped), f"Reading rows of {path.name}"):
        if row.split not in drafts:
            continue
        if not any(name in row.texts for name in used):
            skipped.add("no text", f"{named(path, number)}: it has no text for {', '.join(used)}")
        elif not is_file(folder / row.image):
            skipped.add(
                NO_FILE,
                f"{named(path, number)}: the image does not exist below {folder}: check the image folder",
            )
        else:
            drafts[row.split].add(number, place, row)
    return {split: draft.plan(path, folder, joined, skipped) for split, draft in drafts.items()}


class _Draft:
    """The numbers that are stored per row: 32 bytes, and 8 per text."""

    def __init__(self, granularities: tuple[str, ...]) -> None:
        self._columns = {name: array("q") for name in ("number", "place", "image", "texts")}
        self._texts = {name: array("q") for name in granularities}

    def add(self, number: int, place: int, row: ManifestRow) -> None:
        digest = text_key(row.model_dump_json(include={"texts"}))
        values = (number, place, text_key(row.image), digest)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        for name, keys in self._texts.items():
            keys.extend(text_key(text) for text in row.texts.get(name, ()))

    def plan(self, path: Path, folder: Path, joined: bool, skipped: Skipped) -> SplitRows:
        rows = {name: np.array(column, np.int64) for name, column in self._columns.items()}
        counts = {name: len(np.unique(np.array(keys, np.int64))) for name, keys in self._texts.items()}
        kept = _agreeing(path, rows, skipped)
        return SplitRows(
            path, folder, rows["place"][kept], rows["number"][kept], tuple(self._texts), joined, counts
        )


def _agreeing(path: Path, rows: dict[str, NDArray[np.int64]], skipped: Skipped) -> NDArray[np.int64]:
    """Return the indices of the first row of each image, without images whose rows disagree."""
    _, first, image = np.unique(rows["image"], return_index=True, return_inverse=True)
    other = np.flatnonzero(rows["texts"] != rows["texts"][first[image]])
    for index in other:
        skipped.add(
            DISAGREE,
            f"{named(path, int(rows['number'][index]))}: the texts of the image differ from those in "
            f"{format_of(path).unit} {rows['number'][first[image[index]]]}",
        )
    return np.setdiff1d(first, first[image[other]])


class ManifestImages(Dataset[dict[str, Any]]):
    """Images and texts of a split, read on demand.

    An image that cannot be decoded gives ``{"trouble": one line}`` instead of pixels and texts.

    Args:
        plan: The rows.
        spec: The tower's specification: image size and normalization.
        seed: Seed of the augmentation.
        augment: Whether to rotate, scale, shift and change colors slightly.
        flip: Whether to mirror half of the images, except those whose texts name a side. Off by default: disc and
            macula show the side of the eye, the heart that of the chest.
    """

    def __init__(
        self, plan: SplitRows, spec: TowerSpec, seed: int, augment: bool = True, flip: bool = False
    ) -> None:
        self._plan, self._size, self._flip = plan, spec.image_size, flip
        self._transform = image_transform(spec)
        self._seed, self._augment, self._epoch = seed, augment, 0

    def __len__(self) -> int:
        return len(self._plan)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch (called by the training loop), so that a resumed run repeats an epoch's augmentation."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._plan.row(index)
        path = self._plan.folder / row.image
        try:
            image = open_image(path)
        except UserError as error:
            where = named(self._plan.path, int(self._plan.numbers[index]))
            return {"trouble": f"{where}: the image {unnamed(error, path)}"}
        if self._augment:
            rng = np.random.default_rng((self._seed, self._epoch, index))
            image = jitter(shrink(image, 2 * self._size), rng)
            # every text of the row counts, including those of unused granularities
            if self._flip and rng.random() < 0.5 and not names_side(chain(*row.texts.values())):
                image = ImageOps.mirror(image)
        return {"pixels": self._transform(image), "texts": self._plan.texts(row)}


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Rotate (10 degrees), scale (10 %), shift (4 %) and change the colors (15 %) of a photograph at random."""
    angle, scale = rng.uniform(-10, 10), rng.uniform(0.9, 1.1)
    shift = [
        round(float(part) * side) for part, side in zip(rng.uniform(-0.04, 0.04, 2), image.size, strict=True)
    ]
    image = tv.affine(image, float(angle), shift, float(scale), [0.0], tv.InterpolationMode.BILINEAR)
    for change in (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation):
        image = change(image, float(rng.uniform(0.85, 1.15)))
    return image


def shrink(image: Image.Image, enough: int) -> Image.Image:
    """Reduce a large picture by an integer factor, keeping its shorter side at least ``enough``, to speed up jitter."""
    factor = min(image.size) // enough
    return image.reduce(factor) if factor > 1 else image


def text_key(text: str) -> int:
    """Return a number that identifies a text on every rank (64 bits of its SHA-256)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


class ManifestCollator:
    """Collates the items of :class:`ManifestImages` into batches.

    Args:
        tokenize: Converts texts to ``input_ids`` and ``attention_mask`` [U, L], as the text tower does.
    """

    def __init__(self, tokenize: Callable[[Sequence[str]], dict[str, Tensor]]) -> None:
        self._tokenize = tokenize

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate the images that could be read.

        Args:
            items: ``pixels`` [3, S, S] and ``texts`` per granularity, or ``trouble``.

        Returns:
            ``pixel_values`` [N, 3, S, S]; ``input_ids`` and ``attention_mask`` [U, L] of the distinct texts;
            ``truth`` [G, N, U], 1 where a text belongs to an image at a granularity; ``keys`` [U]; and ``troubles``,
            one line for each unreadable image. Only ``troubles`` if N is 0.
        """
        troubles = [item["trouble"] for item in items if "trouble" in item]
        items = [item for item in items if "trouble" not in item]
        if not items:
            return {"troubles": troubles}
        distinct = list(dict.fromkeys(text for item in items for level in item["texts"] for text in level))
        column = {text: u for u, text in enumerate(distinct)}
        truth = torch.zeros(len(items[0]["texts"]), len(items), len(distinct))
        for i, item in enumerate(items):
            for g, level in enumerate(item["texts"]):
                for text in level:
                    truth[g, i, column[text]] = 1
        return {
            "pixel_values": torch.stack([item["pixels"] for item in items]),
            **self._tokenize(distinct),
            "truth": truth,
            "keys": torch.tensor([text_key(text) for text in distinct]),
            "troubles": troubles,
        }
