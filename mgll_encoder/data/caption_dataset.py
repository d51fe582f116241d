"""Images of a manifest with their texts as labels, for retrieval."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgll_encoder.common.errors import BadDataError, NotFoundError, unknown_name
from mgll_encoder.common.files import is_file
from mgll_encoder.common.skipped import DISAGREE, NO_FILE, Skipped
from mgll_encoder.data.label_table import SIDES, LabeledImages
from mgll_encoder.data.manifest import ManifestRow, image_folder, named, read_header, read_rows


@dataclass(frozen=True)
class DescribedImages:
    """Images and their texts.

    Attributes:
        labels: The images; its names are the distinct texts, and all images are in the test split.
        levels: Granularity -> its distinct texts.
    """

    labels: LabeledImages
    levels: dict[str, list[str]]


def described_images(
    manifest: Path, images: Path | None, split: str, granularities: Sequence[str], skipped: Skipped
) -> DescribedImages:
    """Read the images of one split of a manifest.

    Args:
        manifest: The manifest.
        images: The image folder; None for the one named in the manifest.
        split: The split.
        granularities: Granularities to use; empty for all.
        skipped: Collects the skipped rows.

    Raises:
        UserError: the manifest is damaged, a granularity or split is unknown, or no image remains.
    """
    header = read_header(manifest)
    for name in granularities:
        if name not in header.granularities:
            raise unknown_name("granularity", name, header.granularities)
    if split not in SIDES:
        raise unknown_name("split", split, SIDES)
    used = [name for name in header.granularities if not granularities or name in granularities]
    folder = images or image_folder(manifest, header)
    if not folder.is_dir():
        raise NotFoundError(
            f"image folder {folder} of manifest {manifest} does not exist: give it with `images`"
        )
    kept = _usable_rows(manifest, folder, split, used, skipped)
    levels = {name: sorted({text for _, row in kept for text in row.texts.get(name, [])}) for name in used}
    names = list(dict.fromkeys(text for texts in levels.values() for text in texts))
    place = {text: i for i, text in enumerate(names)}
    truth = np.zeros((len(kept), len(names)), bool)
    for i, (_, row) in enumerate(kept):
        for name in used:
            truth[i, [place[text] for text in row.texts.get(name, [])]] = True
    labels = LabeledImages(
        tuple(folder / row.image for _, row in kept),
        tuple(names),
        truth,
        tuple(row.patient or row.image for _, row in kept),
        np.ones(len(kept), bool),
        tuple(where for where, _ in kept),
        by_patient=any(row.patient for _, row in kept),
    )
    return DescribedImages(labels, {name: texts for name, texts in levels.items() if texts})


def _usable_rows(
    manifest: Path, folder: Path, split: str, used: Sequence[str], skipped: Skipped
) -> list[tuple[str, ManifestRow]]:
    """Return the rows of a split with an image and a text, one per image, and where each stands."""
    rows: dict[str, tuple[str, ManifestRow]] = {}
    disagreeing = set()
    for line, _, row in read_rows(manifest, skipped):
        if row.split != split:
            continue
        where = named(manifest, line)
        if row.image in rows and rows[row.image][1].texts != row.texts:
            disagreeing.add(row.image)
            skipped.add(
                DISAGREE, f"{where}: the texts of the image differ from those in {rows[row.image][0]}"
            )
        elif not any(name in row.texts for name in used):
            skipped.add("no text", f"{where}: it has no text for {', '.join(used)}")
        elif not is_file(folder / row.image):
            skipped.add(NO_FILE, f"{where}: the image does not exist below {folder}")
        else:
            rows.setdefault(row.image, (where, row))
    kept = [(where, row) for image, (where, row) in rows.items() if image not in disagreeing]
    if not kept:
        reasons = "; ".join(skipped.lines()) or f"it has no row with split '{split}'"
        raise BadDataError(f"manifest {manifest} has no usable image: {reasons}")
    return kept
