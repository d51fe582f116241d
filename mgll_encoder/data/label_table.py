"""Labeled images for probing: the meaning of the columns, and the split of the images."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mgll_encoder.common.errors import BadDataError, NotFoundError, unknown_name
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.splits import assign_split
from mgll_encoder.common.tables import TableOptions, read_table
from mgll_encoder.data.label_cells import plain
from mgll_encoder.data.label_rows import Columns as Columns
from mgll_encoder.data.label_rows import LabelRow, agreeing, label_rows, with_files

T = TypeVar("T")

SIDES = ("train", "val", "test")


@dataclass(frozen=True)
class LabeledImages:
    """Labeled images, one per row.

    Attributes:
        images: Image paths.
        names: Labels, in columns of ``truth``.
        truth: Whether a label is true of an image, [n, labels].
        patients: Patient or source of each image.
        test: Whether an image is in the test split, [n].
        rows: Location of each image in its table, for messages; empty if unknown.
        val: Whether a table marks an image for validation, [n]; None if no table marks any.
        known: Whether the table says if a label is true of an image, [n, labels]; None if it always does. Unknown
            labels count neither for nor against, in training and in metrics.
        by_patient: Whether patients are known, not only images.
    """

    images: tuple[Path, ...]
    names: tuple[str, ...]
    truth: NDArray[np.bool_]
    patients: tuple[str, ...]
    test: NDArray[np.bool_]
    rows: tuple[str, ...] = ()
    val: NDArray[np.bool_] | None = None
    known: NDArray[np.bool_] | None = None
    by_patient: bool = False

    @property
    def false(self) -> NDArray[np.bool_]:
        """Whether a label is known to be false of an image, [n, labels]."""
        return ~self.truth if self.known is None else ~self.truth & self.known

    @property
    def exclusive(self) -> bool:
        """Whether exactly one label is true of every image: classes, not findings."""
        return self.known is None and bool((self.truth.sum(axis=1) == 1).all())

    @property
    def divided(self) -> list[str]:
        """Patients with images in both splits; only possible if the table names the split."""
        names = np.array(self.patients)
        return sorted(set(names[self.test]) & set(names[~self.test]))

    @property
    def all_for_test(self) -> "LabeledImages":
        """The same images, all in the test split: for evaluation without training."""
        return replace(self, test=np.ones_like(self.test), val=None)

    def subset(self, kept: NDArray[np.bool_]) -> "LabeledImages":
        """Return the images marked in ``kept`` [n]; labels stay as they are."""
        return replace(
            self,
            images=_marked(self.images, kept),
            truth=self.truth[kept],
            patients=_marked(self.patients, kept),
            test=self.test[kept],
            rows=_marked(self.rows, kept),
            val=None if self.val is None else self.val[kept],
            known=None if self.known is None else self.known[kept],
        )


@dataclass(frozen=True)
class Sides:
    """How images are assigned to the training and test splits.

    Attributes:
        test: Share of patients in the test split, if nothing else decides.
        seed: Seed of the random split.
        names: File names (without folders) of the test images, as published with some data sets; empty for none.
        table: Label file of the test images; all images of the other one are then for training.
        images: Folder of those test images; None for the same folder.
        both: Whether an empty training or test split is an error.
    """

    test: float = 0.3
    seed: int = 0
    names: frozenset[str] = frozenset()
    table: Path | None = None
    images: Path | None = None
    both: bool = True


def read_labels(
    path: Path,
    images: Path,
    columns: Columns,
    *,
    only: Sequence[str] = (),
    sides: Sides | None = None,
    skipped: Skipped | None = None,
    reading: TableOptions | None = None,
) -> LabeledImages:
    """Read a label table.

    Rows without any label in a ``labels`` column are unknown, and are skipped; an image listed twice is used once, and
    not at all if its rows disagree.

    Args:
        path: The table, see `mgll_encoder.common.tables`.
        images: Folder of the images.
        columns: Meaning of its columns.
        only: Labels to keep; all others are ignored. Empty for all.
        sides: Description of the split, if no column names it.
        skipped: Collects the skipped rows; None: stop at the first invalid row.
        reading: What the user specified about the file.

    Raises:
        UserError: a file or a column is missing, a split is empty or, if ``skipped`` is strict or None, a row has no
            image, a missing image, or an unreadable cell, or contradicts another row.
    """
    sides, skipped = sides or Sides(), skipped or Skipped(strict=True)
    found = _rows_of(path, images, columns, sides, skipped, reading)
    found = _with_test_table(found, images, columns, sides, skipped, reading)
    return _assembled(found, f"label file {path}", only, sides, skipped)


def read_class_files(
    images: Path,
    classes: Mapping[str, str],
    *,
    only: Sequence[str] = (),
    columns: Columns | None = None,
    sides: Sides | None = None,
    skipped: Skipped | None = None,
    reading: TableOptions | None = None,
) -> LabeledImages:
    """Read images whose class is given by folder or file name, as in some data sets; each image is a patient.

    Args:
        images: Folder of the images.
        classes: Pattern of paths below it (at any depth) -> class.
        only: Classes to keep; empty for all.
        columns: Meaning of the columns of the table of test images, if there is one.
        sides: Description of the split.
        skipped: Collects what is skipped; None: stop at the first.
        reading: What the user specified about that table.

    Raises:
        UserError: there is no such folder, no image of a class, or a split is empty.
    """
    _check_folder(images)
    sides, skipped = sides or Sides(), skipped or Skipped(strict=True)
    found: list[LabelRow] = []
    for pattern, name in classes.items():
        files = sorted(images.rglob(pattern))
        if not files:
            raise BadDataError(f"image folder {images} has no file '{pattern}' ({name}): check `images`")
        skipped.read += len(files)
        for file in files:
            key = file.relative_to(images).as_posix()
            where = f"image {len(found) + 1} of folder {images}"
            found.append(
                LabelRow(where, key, key, {}, frozenset({name}), path=file, side=_drawn(key, key, sides))
            )
    if columns:
        found = _with_test_table(found, images, columns, sides, skipped, reading)
    return _assembled(found, f"image folder {images}", only, sides, skipped)


def _with_test_table(
    found: list[LabelRow],
    images: Path,
    columns: Columns,
    sides: Sides,
    skipped: Skipped,
    reading: TableOptions | None,
) -> list[LabelRow]:
    """Add the rows of the table of test images, if there is one; the given rows are then all for training."""
    if not sides.table:
        return found
    rows = [replace(row, side="train") if row.side == "test" else row for row in found]
    apart = replace(columns, split=None)
    for row in _rows_of(sides.table, sides.images or images, apart, sides, skipped, reading, "`test_labels`"):
        # both tables may count their images from 1
        patient = row.patient if row.patient != row.image else f"{sides.table.name}:{row.image}"
        rows.append(replace(row, side="test", patient=patient))
    return rows


def _rows_of(
    path: Path,
    images: Path,
    columns: Columns,
    sides: Sides,
    skipped: Skipped,
    reading: TableOptions | None,
    option: str = "`labels`",
) -> list[LabelRow]:
    """Return the usable rows of a table, before contradictions between them are checked."""
    table = read_table(path, option, skipped, reading)
    columns = columns.of(table)
    _check_folder(images)
    rows = label_rows(table, columns, skipped, reading)
    found = with_files(rows, images, skipped, columns.image, columns.nested)
    return list(_sided(found, columns.split, sides, skipped))


def _sided(
    rows: Iterable[LabelRow], column: str | None, sides: Sides, skipped: Skipped
) -> Iterator[LabelRow]:
    """Yield the rows with their split and patient."""
    for row in rows:
        patient = row.patient or row.image
        side = row.cells[column].strip().casefold() if column else _drawn(patient, row.image, sides)
        if side in SIDES:
            yield replace(row, patient=patient, side=side)
        else:
            skipped.add(
                "side unknown", f"{row.where}: column '{column}' is '{side}': expected train, val or test"
            )


def _drawn(patient: str, image: str, sides: Sides) -> str:
    if sides.names:
        return "test" if Path(image).name in sides.names else "train"
    return assign_split(patient, test=sides.test, seed=sides.seed)


def _assembled(
    rows: Sequence[LabelRow], source: str, only: Sequence[str], sides: Sides, skipped: Skipped
) -> LabeledImages:
    kept = agreeing(rows, skipped)
    if not kept:
        reasons = "; ".join(skipped.lines()) or "it has a header but no rows"
        raise BadDataError(f"{source} has no usable image: {reasons}")
    names = tuple(sorted({label for row in kept for label in row.labels | row.uncertain}))
    names = tuple(_among(wanted, names) for wanted in only) or names
    test = np.array([row.side == "test" for row in kept])
    if sides.both and (test.all() or not test.any()):
        raise BadDataError(
            f"{source} gives {int((~test).sum())} training and {int(test.sum())} test images: both kinds are needed"
        )
    val = np.array([row.side == "val" for row in kept])
    known = None
    if any(row.uncertain for row in kept):
        known = np.array([[name not in row.uncertain for name in names] for row in kept])
    return LabeledImages(
        tuple(row.path for row in kept),
        names,
        np.array([[name in row.labels for name in names] for row in kept]).reshape(len(kept), len(names)),
        tuple(row.patient for row in kept),
        test,
        tuple(row.where for row in kept),
        val if val.any() else None,
        known,
        not all(row.patient.endswith(row.image) for row in kept),  # see `_sided` and `_with_test_table`
    )


def _marked(items: tuple[T, ...], kept: NDArray[np.bool_]) -> tuple[T, ...]:
    return tuple(item for item, wanted in zip(items, kept, strict=True) if wanted) if items else ()


def _among(wanted: str, names: Sequence[str]) -> str:
    found = next((name for name in names if plain(name) == plain(wanted)), None)
    if found is None:
        raise unknown_name("label", wanted, names)
    return found


def _check_folder(images: Path) -> None:
    if not images.is_dir():
        raise NotFoundError(f"image folder {images} does not exist: check `images`")
