"""A table of labelled images, for probing: which columns mean what, and which images are on which side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.splits import assign_split
from mgll_encoder.common.tables import check_columns, read_table

TRUE = frozenset({"1", "1.0", "true", "yes"})
FALSE = frozenset({"0", "0.0", "false", "no", ""})


@dataclass(frozen=True)
class Columns:
    """Meaning of the columns of a label CSV.

    Attributes:
        image: Column with the image path below the image folder, or a template over columns such as ``{ID}.png``.
        labels: Column with labels separated by ``;`` or ``|`` (several may be true of an image), or with one class.
        binary: Columns with 0 or 1, one per label, instead of ``labels``.
        patient: Column with the patient or source id; None: each image is a patient.
        split: Column that says train or test; None: patients are divided at random.
    """

    image: str = "file"
    labels: str | None = "labels"
    binary: tuple[str, ...] = ()
    patient: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images, row by row.

    Attributes:
        images: Image paths.
        names: Labels, in columns of ``truth``.
        truth: Which label is true of which image, [n, labels].
        patients: Patient or source of each image.
        test: Whether an image is on the test side, [n].
    """

    images: tuple[Path, ...]
    names: tuple[str, ...]
    truth: NDArray[np.bool_]
    patients: tuple[str, ...]
    test: NDArray[np.bool_]

    @property
    def exclusive(self) -> bool:
        """Whether exactly one label is true of every image: classes, not findings."""
        return bool((self.truth.sum(axis=1) == 1).all())


def read_labels(
    path: Path,
    images: Path,
    columns: Columns,
    *,
    only: Sequence[str] = (),
    test: float = 0.3,
    seed: int = 0,
) -> LabelledImages:
    """Read a label CSV.

    Rows with no label at all in a ``labels`` column are unknown, and are left out.

    Args:
        path: The CSV, with a header line.
        images: Folder of the images.
        columns: Meaning of its columns.
        only: Labels to keep; all others are ignored. Empty for all.
        test: Share of patients for the test side, where no column says.
        seed: Draws the sides.

    Raises:
        UserError: the file, a column or an image is missing, a cell cannot be read, or a side is empty.
    """
    records, found = read_table(path, "--data")
    check_columns(path, found, _named(columns))
    rows: list[tuple[Path, frozenset[str], str, bool]] = []
    for number, record in enumerate(records, start=2):
        where = f"label file {path} row {number}"
        labels = _labels(record, columns, where)
        if labels is None:
            continue
        name = columns.image.format_map(record) if "{" in columns.image else record[columns.image].strip()
        if not (images / name).is_file():
            raise UserError(
                f"{where}: image {images / name} does not exist: check --images and --image-column"
            )
        patient = record[columns.patient].strip() if columns.patient else name
        rows.append(
            (images / name, labels, patient, _on_test(record, columns, patient or name, where, test, seed))
        )
    names = tuple(sorted({label for _, labels, _, _ in rows for label in labels}))
    for wanted in only:
        if wanted not in names:
            raise unknown_name("label", wanted, names)
    names = tuple(only) or names
    side = np.array([row[3] for row in rows], bool)
    if not rows or side.all() or not side.any():
        raise UserError(
            f"label file {path} gives {int((~side).sum())} training and {int(side.sum())} test images: both are needed"
        )
    return LabelledImages(
        tuple(row[0] for row in rows),
        names,
        np.array([[name in labels for name in names] for _, labels, _, _ in rows]),
        tuple(row[2] for row in rows),
        side,
    )


def _named(columns: Columns) -> list[tuple[str, str]]:
    named = [("--image-column", columns.image)] if "{" not in columns.image else []
    named += [("--binary-columns", name) for name in columns.binary]
    if not columns.binary and columns.labels:
        named.append(("--labels-column", columns.labels))
    optional = (("--patient-column", columns.patient), ("--split-column", columns.split))
    return named + [(option, name) for option, name in optional if name]


def _labels(record: dict[str, str], columns: Columns, where: str) -> frozenset[str] | None:
    if not columns.binary:
        cell = record[columns.labels or ""].replace("|", ";")
        labels = frozenset(" ".join(label.casefold().split()) for label in cell.split(";") if label.strip())
        return labels or None
    found = set()
    for name in columns.binary:
        cell = record[name].strip().casefold()
        if cell not in TRUE | FALSE:
            raise UserError(f"{where}: column '{name}' is '{record[name]}': expected 0 or 1")
        if cell in TRUE:
            found.add(name)
    return frozenset(found)


def _on_test(
    record: dict[str, str], columns: Columns, patient: str, where: str, test: float, seed: int
) -> bool:
    if columns.split is None:
        return assign_split(patient, test=test, seed=seed) == "test"
    side = record[columns.split].strip().casefold()
    if side not in ("train", "val", "test"):
        raise UserError(f"{where}: column '{columns.split}' is '{side}': expected train, val or test")
    return side == "test"
