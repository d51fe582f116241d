"""Rows of label tables, read alike by every command: which labels, known or left open, of which image and patient."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mgll_encoder.common.errors import UserError
from mgll_encoder.common.files import is_file
from mgll_encoder.common.patient_column import patient_column
from mgll_encoder.common.skipped import (
    DISAGREE,
    NO_FILE,
    NO_LABEL,
    NO_TRUTH,
    NOT_NAMED,
    TWICE,
    UNCERTAIN,
    Skipped,
)
from mgll_encoder.common.tables import Table, TableOptions, Uncertain
from mgll_encoder.data.label_cells import LabelLists, plain, truth_of

_logger = logging.getLogger(__name__)

NORMAL = "normal"
"""The label of images in which nothing is found."""

_PLACE = re.compile(r"{([^{}]+)}")
"""Where a template of image paths takes the cell of a column."""


@dataclass(frozen=True)
class Columns:
    """Meaning of the columns of a label table.

    Attributes:
        image: Column with the image path below the image folder, or a template over columns such as ``{ID}.png``.
        labels: Column with a list of labels (several may be true of an image), or with one class.
        binary: Columns that stand for one label each, instead of ``labels``.
        patient: Column with the patient or source id, see `mgll_encoder.common.patient_column`; None for the one that
            is recognized.
        split: Column that says train or test; None: patients are divided at random.
        nested: Images lie anywhere below the image folder, by their file name.
        aliases: Other names that ``labels`` has in some files of the set.
        classes: Cell of ``labels`` -> label, for files that write 0 and 1.
    """

    image: str = "file"
    labels: str | None = "labels"
    binary: tuple[str, ...] = ()
    patient: str | None = None
    split: str | None = None
    nested: bool = False
    aliases: tuple[str, ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)

    def of(self, table: Table, *, drawn: bool = False) -> "Columns":
        """The columns as this table calls them; ``patient`` is None afterwards where each image is a patient.

        Args:
            table: The table.
            drawn: Whether sides of a split are drawn that patients must not be on both of.

        Raises:
            UserError: it lacks one, or see `patient_column`.
        """
        found = replace(self, labels=next((n for n in self.aliases if n in table.columns), self.labels))
        table.check_columns(found._named())
        return replace(found, patient=patient_column(table, found.patient, drawn=drawn))

    def _named(self) -> list[tuple[str, str | None]]:
        template = _PLACE.findall(self.image) or [self.image]
        named: list[tuple[str, str | None]] = [("--image-column", name) for name in template]
        named += [("--binary-columns", name) for name in self.binary]
        if not self.binary:
            named.append(("--labels-column", self.labels))
        return [*named, ("--split-column", self.split)]


@dataclass(frozen=True)
class LabelRow:
    """What a row says of an image.

    Attributes:
        where: How messages call the row.
        image: The image, as the table names it.
        patient: Patient or source; empty where the table does not say.
        cells: All of the row, by column.
        labels: Labels that are true; those of lists in lower case, those of columns as the columns are called.
        uncertain: Labels that the row leaves open.
        path: The image's file, once it is found.
        side: Side of the split, once it is known.
    """

    where: str
    image: str
    patient: str
    cells: Mapping[str, str]
    labels: frozenset[str]
    uncertain: frozenset[str] = frozenset()
    path: Path = Path()
    side: str = ""

    @property
    def claims(self) -> dict[str, object]:
        """What all rows of an image must agree on."""
        return {"labels": (self.labels, self.uncertain), "patient": self.patient, "side": self.side}


class UnusableError(Exception):
    """A row that is left out.

    Args:
        reason: See `Skipped.add`.
        detail: What is wrong, after the name of the row.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def label_rows(
    table: Table,
    columns: Columns,
    skipped: Skipped,
    reading: TableOptions | None = None,
    known: Collection[str] = (),
) -> list[LabelRow]:
    """The rows of a table that name an image and say something of its labels.

    Args:
        table: The table.
        columns: Meaning of its columns, as it calls them (`Columns.of`).
        skipped: Takes the other rows.
        reading: What the user says about it.
        known: Labels that are known from elsewhere, in lower case.

    Raises:
        UserError: some label is made of others (`LabelLists`), or ``skipped`` is strict and a row is left out.
    """
    reading = reading or TableOptions()
    if reading.separator and (columns.binary or columns.classes):
        raise UserError("--label-separator has no effect on --binary-columns and --classes: leave it out")
    listed = columns.labels and not (columns.binary or columns.classes)
    column = [record[columns.labels or ""] for _, record in table.rows] if listed else []
    lists = LabelLists(reading.separator, column, known, f"label file {table.path} column '{columns.labels}'")
    rows = []
    for number, record in table.rows:
        where = table.where(number)
        try:
            if columns.binary:
                labels, uncertain = truths(record, {name: name for name in columns.binary}, reading.uncertain)
            elif columns.classes:
                labels, uncertain = _of_class(record, columns), frozenset()
            else:
                labels, uncertain = _of_list(record, columns, lists), frozenset()
            image = _image(record, columns.image)
        except UnusableError as error:
            skipped.add(error.reason, f"{where}: {error.detail}")
        else:
            patient = record[columns.patient].strip() if columns.patient else ""
            rows.append(LabelRow(where, image, patient, record, labels, uncertain))
    return settled(table, rows, reading, skipped)


def truths(
    record: Mapping[str, str], names: Mapping[str, str], policy: Uncertain
) -> tuple[frozenset[str], frozenset[str]]:
    """Labels that are true, and those that are open, by columns that stand for one label each.

    Args:
        record: The row.
        names: Column -> label.
        policy: What becomes of open cells.

    Raises:
        UnusableError: a cell cannot be read, or all are open and stay so.
    """
    true: set[str] = set()
    uncertain: set[str] = set()
    for column, label in names.items():
        try:
            said = truth_of(record[column])
        except ValueError as error:
            raise UnusableError(NO_TRUTH, f"column '{column}' {error}") from None
        if said is not False:
            (true if said else uncertain).add(label)
    if policy == "ignore" and uncertain and uncertain == set(names.values()):
        raise UnusableError(UNCERTAIN, "every label is left open")
    return frozenset(true), frozenset(uncertain - true)


def settled(
    table: Table, rows: Sequence[LabelRow], reading: TableOptions, skipped: Skipped
) -> list[LabelRow]:
    """The rows that do not contradict themselves, what is uncertain in them left open or taken as the user says."""
    having = [row for row in rows if row.uncertain]
    if not having:
        return _coherent(rows, skipped)
    cells = sum(len(row.uncertain) for row in having)
    skipped.uncertain[reading.uncertain] += cells
    _logger.info(
        f"{table.path.name}: {cells} uncertain cells in {len(having)} rows: "
        f"{'ignored' if reading.uncertain == 'ignore' else f'taken as {reading.uncertain}'} (--uncertain)"
    )
    if reading.uncertain == "ignore":
        return _coherent(rows, skipped)
    taken = reading.uncertain == "positive"
    certain = [
        replace(row, labels=row.labels | (row.uncertain if taken else frozenset()), uncertain=frozenset())
        for row in rows
    ]
    return _coherent(certain, skipped)


def with_files(
    rows: Iterable[LabelRow], images: Path, skipped: Skipped, column: str, nested: bool = False
) -> list[LabelRow]:
    """The rows whose image is there, with its path.

    Args:
        rows: The rows.
        images: Folder of the images.
        skipped: Takes the others.
        column: The column that names the image, for messages.
        nested: Images lie anywhere below the folder, by their file name.
    """
    index = {file.name: file for file in images.rglob("*") if file.is_file()} if nested else {}
    found = []
    for row in rows:
        path = index.get(Path(row.image).name, images / row.image)
        if is_file(path):
            found.append(replace(row, path=path))
        else:
            skipped.add(
                NO_FILE,
                f"{row.where}: column '{column}' names no file below {images}: check --images and --image-column",
            )
    return found


def agreeing(rows: Iterable[LabelRow], skipped: Skipped) -> list[LabelRow]:
    """Each image once, and none that rows disagree about."""
    by_image: dict[Path, list[LabelRow]] = {}
    for row in rows:
        by_image.setdefault(row.path, []).append(row)
    kept = []
    for first, *others in by_image.values():
        other = next((row for row in others if row.claims != first.claims), None)
        if other is None:
            kept.append(first)
            for row in others:
                skipped.add(TWICE, f"{row.where} says the same as {first.where}")
            continue
        for row in (first, *others):
            against = first if row is not first else other
            # by name only: the values may tell who the patient is
            differing = [name for name, said in row.claims.items() if said != against.claims[name]] or [
                "labels"
            ]
            skipped.add(
                DISAGREE,
                f"{row.where}: {' and '.join(differing)} of the image are not those of {against.where}",
            )
    return kept


def _coherent(rows: Iterable[LabelRow], skipped: Skipped) -> list[LabelRow]:
    kept = []
    for row in rows:
        if len(row.labels) > 1 and NORMAL in map(plain, row.labels):
            labels = ";".join(sorted(row.labels))
            skipped.add("normal and diseased", f"{row.where}: the image is labelled '{labels}'")
        else:
            kept.append(row)
    return kept


def _of_list(record: Mapping[str, str], columns: Columns, lists: LabelLists) -> frozenset[str]:
    column = columns.labels or ""
    try:
        labels = lists(record[column])
    except ValueError as error:
        raise UnusableError(NO_TRUTH, f"column '{column}' {error}") from None
    if not labels:
        said = record[column].strip() or "blank"
        raise UnusableError(NO_LABEL, f"column '{column}' is {said}: unknown, not normal")
    return labels


def _of_class(record: Mapping[str, str], columns: Columns) -> frozenset[str]:
    cell = record[columns.labels or ""].strip()
    if not cell:
        raise UnusableError(NO_LABEL, f"column '{columns.labels}' is blank: unknown, not normal")
    if cell not in columns.classes:
        raise UnusableError(
            "class without a name",
            f"column '{columns.labels}' is '{cell}', which --classes does not name: it names "
            f"{', '.join(columns.classes)}",
        )
    return frozenset({plain(columns.classes[cell])})


def _image(record: Mapping[str, str], column: str) -> str:
    name = (
        _PLACE.sub(lambda place: record[place[1]], column) if _PLACE.search(column) else record[column]
    ).strip()
    if not name:
        raise UnusableError(NOT_NAMED, f"column '{column}' is blank")
    return name
