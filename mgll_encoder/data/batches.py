"""From a manifest to batches: images opened in the workers, each distinct text of a batch encoded once."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from mgll_encoder.common.cli import track
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.images import open_image
from mgll_encoder.data.manifest import ManifestRow, image_folder, read_header, read_rows, row_at
from mgll_encoder.data.skipped import Skipped
from mgll_encoder.preprocess import image_transform
from mgll_encoder.spec import TowerSpec


@dataclass(frozen=True)
class Plan:
    """The rows of a manifest that are trained on.

    Attributes:
        path: The manifest.
        folder: The image folder.
        offsets: Byte offsets of the rows, [n].
        granularities: Those that are used, coarse to fine.
        joined: One string per image, all its texts in order (plain CLIP), instead of texts per granularity.
    """

    path: Path
    folder: Path
    offsets: NDArray[np.int64]
    granularities: tuple[str, ...]
    joined: bool

    def texts(self, row: ManifestRow) -> list[list[str]]:
        """The texts of a row, per granularity in use (one for ``joined``)."""
        levels = [row.texts.get(name, []) for name in self.granularities]
        return [["; ".join(text for level in levels for text in level)]] if self.joined else levels

    def all_texts(self) -> Iterator[str]:
        """Every text of every row, one row in memory at a time."""
        for offset in self.offsets:
            for level in self.texts(row_at(self.path, int(offset))):
                yield from level


def plan_rows(
    path: Path,
    folder: Path | None,
    granularities: Sequence[str],
    split: str,
    joined: bool,
    skipped: Skipped,
) -> Plan:
    """Choose the rows of a split, and decode each image once, so that a damaged file shows before the training.

    Args:
        path: The manifest.
        folder: The image folder; None for the one that the manifest names.
        granularities: Which to use; empty for all.
        split: Side of the split.
        joined: See :class:`Plan`.
        skipped: Takes the rows that are left out, and stops there if strict.

    Raises:
        UserError: the manifest is damaged, a granularity is unknown, or no row remains.
    """
    header = read_header(path)
    for name in granularities:
        if name not in header.granularities:
            raise unknown_name("granularity", name, header.granularities)
    used = tuple(name for name in header.granularities if not granularities or name in granularities)
    folder = folder or image_folder(path, header)
    if not folder.is_dir():
        raise UserError(
            f"image folder {folder} of manifest {path} does not exist: say where it is with --images"
        )
    draft = Plan(path, folder, np.empty(0, np.int64), used, joined)
    rows: dict[str, tuple[int, int, bytes]] = {}  # image -> line, offset, digest of its texts
    disagreeing: set[str] = set()
    for line, offset, row in read_rows(path, skipped):
        if row.split != split:
            continue
        digest = hashlib.sha256(row.model_dump_json(include={"texts"}).encode()).digest()
        first, _, before = rows.setdefault(row.image, (line, offset, digest))
        if before != digest:
            disagreeing.add(row.image)
            skipped.add(
                "rows of one image disagree",
                f"manifest {path} line {line}: the texts of {row.image} differ from those in line {first}",
            )
        elif not any(name in row.texts for name in used):
            del rows[row.image]
            skipped.add(
                "no text", f"manifest {path} line {line}: {row.image} has no text for {', '.join(used)}"
            )
    kept = [(image, line, offset) for image, (line, offset, _) in rows.items() if image not in disagreeing]
    with ThreadPoolExecutor() as pool:
        troubles = pool.map(lambda entry: _trouble(folder / entry[0]), kept)
        offsets = []
        for (_, line, offset), trouble in track(
            zip(kept, troubles, strict=True), "Opening every image once", len(kept)
        ):
            if trouble:
                skipped.add("image unreadable", f"manifest {path} line {line}: {trouble}")
            else:
                offsets.append(offset)
    if not offsets:
        reasons = "; ".join(skipped.lines()) or f"it has no row with split '{split}'"
        raise UserError(f"manifest {path} gives no image to train on: {reasons}")
    return replace(draft, offsets=np.asarray(offsets, np.int64))


def _trouble(path: Path) -> str:
    try:
        open_image(path)
    except UserError as error:
        return str(error)
    return ""


class ManifestImages(Dataset):
    """Images and texts of a plan, read on demand.

    Args:
        plan: The rows.
        spec: Contract of the tower: size and normalisation.
        seed: Of the augmentation.
        augment: Turn, scale, shift and recolour a little. Never flips: disc and macula tell the side of the
        eye.
    """

    def __init__(self, plan: Plan, spec: TowerSpec, seed: int, augment: bool = True) -> None:
        self._plan, self._size = plan, spec.image_size
        self._transform = image_transform(spec)
        self._seed, self._augment, self._epoch = seed, augment, 0

    def __len__(self) -> int:
        return len(self._plan.offsets)

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop, so that an epoch's augmentation is the same in a resumed run."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = row_at(self._plan.path, int(self._plan.offsets[index]))
        image = open_image(self._plan.folder / row.image)
        if self._augment:
            image = jitter(
                _shrink(image, 2 * self._size), np.random.default_rng((self._seed, self._epoch, index))
            )
        return {"pixels": self._transform(image), "texts": self._plan.texts(row)}


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turn (10 degrees), scale (10 %), shift (4 %) and recolour (15 %) a photograph."""
    angle, scale = rng.uniform(-10, 10), rng.uniform(0.9, 1.1)
    shift = [
        round(float(part) * side) for part, side in zip(rng.uniform(-0.04, 0.04, 2), image.size, strict=True)
    ]
    image = tv.affine(image, float(angle), shift, float(scale), [0.0], tv.InterpolationMode.BILINEAR)
    for change in (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation):
        image = change(image, float(rng.uniform(0.85, 1.15)))
    return image


def _shrink(image: Image.Image, enough: int) -> Image.Image:
    factor = min(image.size) // enough
    return image.reduce(factor) if factor > 1 else image


def text_key(text: str) -> int:
    """A number that identifies a text on every rank (64 bits of its SHA-256)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


class Collator:
    """Makes batches out of what :class:`ManifestImages` gives.

    Args:
        tokenize: Turns texts into ``input_ids`` and ``attention_mask`` [U, L], as the text tower does.
    """

    def __init__(self, tokenize: Callable[[Sequence[str]], dict[str, Tensor]]) -> None:
        self._tokenize = tokenize

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch.

        Args:
            items: ``pixels`` [3, S, S], and ``texts`` per granularity.

        Returns:
            ``pixel_values`` [N, 3, S, S]; ``input_ids`` and ``attention_mask`` [U, L] of the distinct texts;
            ``truth`` [G, N, U], 1 where a text belongs to an image at a granularity; ``keys`` [U].
        """
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
        }
