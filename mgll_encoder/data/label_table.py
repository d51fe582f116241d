"""Labelled images, for probing: which columns mean what, and which images are on which side."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.skipped import DISAGREE, NO_FILE, NO_LABEL, NOT_NAMED, TWICE, Skipped
from mgll_encoder.common.splits import assign_split
from mgll_encoder.common.tables import Reading, read_table

TRUE = frozenset({"1", "1.0", "true", "yes"})
FALSE = frozenset({"0", "0.0", "false", "no", ""})
T = TypeVar("T")

SIDES = ("train", "val", "test")


@dataclass(frozen=True)
class Columns:
    """Meaning of the columns of a label table.

    Attributes:
        image: Column with the image path below the image folder, or a template over columns such as ``{ID}.png``.
        labels: Column with labels separated by ``;`` or ``|`` (several may be true of an image), or with one class.
        binary: Columns with 0 or 1, one per label, instead of ``labels``.
        patient: Column with the patient or source id; None: each image is a patient.
        split: Column that says train or test; None: patients are divided at random.
        nested: Images lie anywhere below the image folder, by their file name.
        aliases: Other names that ``labels`` has in some files of the set.
    """

    image: str = "file"
    labels: str | None = "labels"
    binary: tuple[str, ...] = ()
    patient: str | None = None
    split: str | None = None
    nested: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images, row by row.

    Attributes:
        images: Image paths.
        names: Labels, in columns of ``truth``.
        truth: Which label is true of which image, [n, labels].
        patients: Patient or source of each image.
        test: Whether an image is on the test side, [n].
        rows: Where each image is named, for messages; empty where nobody says.
        val: Whether a table marks an image for validation, [n]; None where no table marks any.
    """

    images: tuple[Path, ...]
    names: tuple[str, ...]
    truth: NDArray[np.bool_]
    patients: tuple[str, ...]
    test: NDArray[np.bool_]
    rows: tuple[str, ...] = ()
    val: NDArray[np.bool_] | None = None

    @property
    def exclusive(self) -> bool:
        """Whether exactly one label is true of every image: classes, not findings."""
        return bool((self.truth.sum(axis=1) == 1).all())

    @property
    def divided(self) -> list[str]:
        """Patients with images on both sides, which only tables that say the side can have."""
        names = np.array(self.patients)
        return sorted(set(names[self.test]) & set(names[~self.test]))

    @property
    def all_for_test(self) -> "LabelledImages":
        """The same images, all on the test side: for judging what was never trained on any of them."""
        return replace(self, test=np.ones_like(self.test), val=None)

    def subset(self, kept: NDArray[np.bool_]) -> "LabelledImages":
        """Some of the images, [n] of them marked in ``kept``; labels stay as they are."""
        return replace(
            self,
            images=_marked(self.images, kept),
            truth=self.truth[kept],
            patients=_marked(self.patients, kept),
            test=self.test[kept],
            rows=_marked(self.rows, kept),
            val=None if self.val is None else self.val[kept],
        )


@dataclass(frozen=True)
class Sides:
    """Who is on the test side.

    Attributes:
        test: Share of patients, where nothing else says.
        seed: Draws them.
        names: File names (without folders) of the test images, as some sets publish them; empty for none.
        table: Label file of the test images; every image of the other one is then for training.
        images: Their folder; None for the same.
        both: Whether a set without a training or a test side is an error.
    """

    test: float = 0.3
    seed: int = 0
    names: frozenset[str] = frozenset()
    table: Path | None = None
    images: Path | None = None
    both: bool = True


@dataclass(frozen=True)
class _Row:
    where: str
    name: str
    path: Path
    labels: frozenset[str]
    patient: str
    side: str

    @property
    def claim(self) -> tuple[frozenset[str], str, str]:
        return self.labels, self.patient, self.side


def read_labels(
    path: Path,
    images: Path,
    columns: Columns,
    *,
    only: Sequence[str] = (),
    test: float = 0.3,
    seed: int = 0,
    sides: Sides | None = None,
    skipped: Skipped | None = None,
    reading: Reading | None = None,
) -> LabelledImages:
    """Read a label table.

    Rows with no label at all in a ``labels`` column are unknown, and are left out; an image that rows name twice is
    taken once, and not at all where they disagree.

    Args:
        path: The table, see `mgll_encoder.common.tables`.
        images: Folder of the images.
        columns: Meaning of its columns.
        only: Labels to keep; all others are ignored. Empty for all.
        test: Share of patients for the test side, where no column says.
        seed: Draws the sides.
        sides: Everything about the sides, instead of ``test`` and ``seed``.
        skipped: Takes the rows that are left out; None: stop at the first that is wrong.
        reading: What the user says about the file.

    Raises:
        UserError: a file or a column is missing, a side is empty or, where ``skipped`` is strict or None, a row names
            no image, an image that is not there, a cell that cannot be read, or contradicts another row.
    """
    skipped = skipped or Skipped(strict=True)
    sides = sides or Sides(test, seed)
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
    reading: Reading | None = None,
) -> LabelledImages:
    """Images whose class is told by folder or file name, as some sets publish them; each image is a patient.

    Args:
        images: Folder of the images.
        classes: Pattern of paths below it (at any depth) -> class.
        only: Classes to keep; empty for all.
        columns: Meaning of the columns of the table of test images, where there is one.
        sides: Who is on the test side.
        skipped: Takes what is left out; None: stop at the first.
        reading: What the user says about that table.

    Raises:
        UserError: no such folder, no image of a class, or a side is empty.
    """
    _check_folder(images)
    sides, skipped = sides or Sides(), skipped or Skipped(strict=True)
    found: list[_Row] = []
    for pattern, name in classes.items():
        files = sorted(images.rglob(pattern))
        if not files:
            raise UserError(f"image folder {images} has no file '{pattern}' ({name}): check --images")
        skipped.read += len(files)
        for file in files:
            key = file.relative_to(images).as_posix()
            side = _side(None, {}, key, key, sides)
            found.append(_Row(f"image {file}", key, file, frozenset({name}), key, side))
    if columns:
        found = _with_test_table(found, images, columns, sides, skipped, reading)
    return _assembled(found, f"image folder {images}", only, sides, skipped)


def _with_test_table(
    found: list[_Row], images: Path, columns: Columns, sides: Sides, skipped: Skipped, reading: Reading | None
) -> list[_Row]:
    """The rows, and those of the table of test images if there is one: the first are then all for training."""
    if not sides.table:
        return found
    rows = [replace(row, side="train") if row.side == "test" else row for row in found]
    apart = replace(columns, split=None)
    for row in _rows_of(sides.table, sides.images or images, apart, sides, skipped, reading, "--test-data"):
        # both tables may count their images from 1
        patient = row.patient if columns.patient else f"{sides.table.name}:{row.patient}"
        rows.append(replace(row, side="test", patient=patient))
    return rows


def _rows_of(
    path: Path,
    images: Path,
    columns: Columns,
    sides: Sides,
    skipped: Skipped,
    reading: Reading | None,
    option: str = "--data",
) -> list[_Row]:
    """The rows of a table that can be used, contradictions between them not yet looked for."""
    table = read_table(path, option, skipped, reading)
    columns = replace(
        columns, labels=next((n for n in columns.aliases if n in table.columns), columns.labels)
    )
    table.check_columns(_named(columns))
    _check_folder(images)
    index = {file.name: file for file in images.rglob("*") if file.is_file()} if columns.nested else {}
    rows = []
    for number, record in table.rows:
        where = table.where(number)
        try:
            row = _row(record, columns, where, images, index, sides)
        except _UnusableError as error:
            skipped.add(error.reason, f"{where}: {error.detail}", error.trouble)
        else:
            rows.append(row)
    return rows


class _UnusableError(Exception):
    def __init__(self, reason: str, detail: str, trouble: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.trouble = reason, detail, trouble


def _row(
    record: dict[str, str],
    columns: Columns,
    where: str,
    images: Path,
    index: Mapping[str, Path],
    sides: Sides,
) -> _Row:
    labels = _labels(record, columns)
    name = columns.image.format_map(record) if "{" in columns.image else record[columns.image]
    name = name.strip()
    if not name:
        raise _UnusableError(NOT_NAMED, f"column '{columns.image}' is blank")
    path = index.get(Path(name).name, images / name)
    if not path.is_file():
        raise _UnusableError(
            NO_FILE,
            f"column '{columns.image}' names no file below {images}: check --images and --image-column",
        )
    patient = (record[columns.patient].strip() if columns.patient else "") or name
    return _Row(where, name, path, labels, patient, _side(columns.split, record, patient, name, sides))


def _labels(record: Mapping[str, str], columns: Columns) -> frozenset[str]:
    if not columns.binary:
        cell = record[columns.labels or ""].replace("|", ";")
        labels = frozenset(" ".join(label.casefold().split()) for label in cell.split(";") if label.strip())
        if not labels:
            raise _UnusableError(NO_LABEL, f"column '{columns.labels}' is blank", trouble=False)
        return labels
    for name in columns.binary:
        if record[name].strip().casefold() not in TRUE | FALSE:
            raise _UnusableError(
                "cell is not 0 or 1", f"column '{name}' is '{record[name]}': expected 0 or 1"
            )
    return frozenset(name for name in columns.binary if record[name].strip().casefold() in TRUE)


def _side(column: str | None, record: Mapping[str, str], patient: str, name: str, sides: Sides) -> str:
    if column is not None:
        side = record[column].strip().casefold()
        if side not in SIDES:
            raise _UnusableError(
                "side unknown", f"column '{column}' is '{side}': expected train, val or test"
            )
        return side
    if sides.names:
        return "test" if Path(name).name in sides.names else "train"
    return assign_split(patient, test=sides.test, seed=sides.seed)


def _consistent(rows: Iterable[_Row], skipped: Skipped) -> Iterator[_Row]:
    """Each image once, and none that rows disagree about."""
    by_image: dict[Path, list[_Row]] = {}
    for row in rows:
        by_image.setdefault(row.path, []).append(row)
    for first, *others in by_image.values():
        other = next((row for row in others if row.claim != first.claim), None)
        if other is None:
            yield first
            for row in others:
                skipped.add(TWICE, f"{row.where}: the image and labels of {first.where}", False)
            continue
        for row in (first, *others):
            against = first if row is not first else other
            skipped.add(
                DISAGREE,
                f"{row.where}: {_differing(row, against)} not as in {against.where}, the image is the same",
            )


def _differing(row: _Row, other: _Row) -> str:
    """What rows of one image say differently, by name only: the values may tell who the patient is."""
    names = ("labels", "patient", "side")
    return " and ".join(name for name, a, b in zip(names, row.claim, other.claim, strict=True) if a != b)


def _assembled(
    rows: Sequence[_Row], source: str, only: Sequence[str], sides: Sides, skipped: Skipped
) -> LabelledImages:
    kept = list(_consistent(rows, skipped))
    if not kept:
        reasons = "; ".join(skipped.lines()) or "it has no rows"
        raise UserError(f"{source} gives no image to look at: {reasons}")
    names = tuple(sorted({label for row in kept for label in row.labels}))
    for wanted in only:
        if wanted not in names:
            raise unknown_name("label", wanted, names)
    names = tuple(only) or names
    test = np.array([row.side == "test" for row in kept])
    if sides.both and (test.all() or not test.any()):
        raise UserError(
            f"{source} gives {int((~test).sum())} training and {int(test.sum())} test images: both are needed"
        )
    val = np.array([row.side == "val" for row in kept])
    return LabelledImages(
        tuple(row.path for row in kept),
        names,
        np.array([[name in row.labels for name in names] for row in kept]).reshape(len(kept), len(names)),
        tuple(row.patient for row in kept),
        test,
        tuple(row.where for row in kept),
        val if val.any() else None,
    )


def _marked(items: tuple[T, ...], kept: NDArray[np.bool_]) -> tuple[T, ...]:
    return tuple(item for item, wanted in zip(items, kept, strict=True) if wanted) if items else ()


def _named(columns: Columns) -> list[tuple[str, str]]:
    template = re.findall(r"{([^}]+)}", columns.image) if "{" in columns.image else [columns.image]
    named = [("--image-column", name) for name in template]
    named += [("--binary-columns", name) for name in columns.binary]
    if not columns.binary and columns.labels:
        named.append(("--labels-column", columns.labels))
    optional = (("--patient-column", columns.patient), ("--split-column", columns.split))
    return named + [(option, name) for option, name in optional if name]


def _check_folder(images: Path) -> None:
    if not images.is_dir():
        raise UserError(f"image folder {images} does not exist: check --images")
