"""Rows of label tables, read alike by every command: image, patient, and certain and uncertain labels."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mgll_encoder.common.errors import InvalidArgumentError
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
"""The label of images without findings."""

_PLACE = re.compile(r"{([^{}]+)}")
"""Placeholder for a column's cell in a template of image paths."""


@dataclass(frozen=True)
class Columns:
    """Meaning of the columns of a label table.

    Attributes:
        image: Column with the image path below the image folder, or a template over columns such as ``{ID}.png``.
        labels: Column with a list of labels (several may be true of an image), or with one class.
        binary: Columns that each represent one label, instead of ``labels``.
        patient: Column with the patient or source id, see `mgll_encoder.common.patient_column`; None to detect it.
        split: Column with train or test; None: patients are split at random.
        nested: Whether images are anywhere below the image folder and found by their file name.
        aliases: Other names of ``labels`` in some files of the data set.
        classes: Cell of ``labels`` -> label, for files that use 0 and 1.
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
        """Resolve the columns in a table; ``patient`` is then None if each image counts as a patient.

        Args:
            table: The table.
            drawn: Whether images are assigned to splits, so that the patients must be known.

        Raises:
            UserError: a column is missing, or see `patient_column`.
        """
        found = replace(self, labels=next((n for n in self.aliases if n in table.columns), self.labels))
        table.check_columns(found._named())
        return replace(found, patient=patient_column(table, found.patient, drawn=drawn))

    def _named(self) -> list[tuple[str, str | None]]:
        template = _PLACE.findall(self.image) or [self.image]
        named: list[tuple[str, str | None]] = [("`image_column`", name) for name in template]
        named += [("`binary_columns`", name) for name in self.binary]
        if not self.binary:
            named.append(("`labels_column`", self.labels))
        return [*named, ("`split_column`", self.split)]


@dataclass(frozen=True)
class LabelRow:
    """What a row says about an image.

    Attributes:
        where: Location of the row, for messages.
        image: The image, as named in the table.
        patient: Patient or source; empty if the table does not name it.
        cells: All cells of the row, by column.
        labels: True labels; those from lists in lowercase, those from columns with the column's name.
        uncertain: Uncertain labels.
        path: The image file, once found.
        side: The split, once known.
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
        """Values that all rows of an image must agree on."""
        return {"labels": (self.labels, self.uncertain), "patient": self.patient, "side": self.side}


class UnusableError(Exception):
    """A row must be skipped.

    Args:
        reason: See `Skipped.add`.
        detail: What is wrong, to follow the name of the row.
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
    """Return the rows of a table that name an image and have label information.

    Args:
        table: The table.
        columns: Meaning of its columns, resolved by `Columns.of`.
        skipped: Collects the other rows.
        reading: What the user specified about it.
        known: Labels known from elsewhere, in lowercase.

    Raises:
        UserError: a label consists of others (`LabelLists`), or ``skipped`` is strict and a row is skipped.
    """
    reading = reading or TableOptions()
    if reading.label_separator and (columns.binary or columns.classes):
        raise InvalidArgumentError(
            "`label_separator` has no effect on `binary_columns` and `classes`: leave it out"
        )
    listed = columns.labels and not (columns.binary or columns.classes)
    column = [record[columns.labels or ""] for _, record in table.rows] if listed else []
    lists = LabelLists(
        reading.label_separator, column, known, f"label file {table.path} column '{columns.labels}'"
    )
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
    """Return the true and the uncertain labels of a row with binary columns.

    Args:
        record: The row.
        names: Column -> label.
        policy: How uncertain cells count.

    Raises:
        UnusableError: a cell cannot be read, or all are uncertain and ignored.
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
        raise UnusableError(UNCERTAIN, "every label is uncertain")
    return frozenset(true), frozenset(uncertain - true)


def settled(
    table: Table, rows: Sequence[LabelRow], reading: TableOptions, skipped: Skipped
) -> list[LabelRow]:
    """Return the rows without contradictions, with uncertain labels ignored or counted as the user specified."""
    having = [row for row in rows if row.uncertain]
    if not having:
        return _coherent(rows, skipped)
    cells = sum(len(row.uncertain) for row in having)
    skipped.uncertain[reading.uncertain] += cells
    _logger.info(
        f"{table.path.name}: {cells} uncertain cells in {len(having)} rows: "
        f"{'ignored' if reading.uncertain == 'ignore' else f'counted as {reading.uncertain}'} (`uncertain`)"
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
    """Return the rows whose image exists, with its path.

    Args:
        rows: The rows.
        images: Folder of the images.
        skipped: Collects the other rows.
        column: The column that names the image, for messages.
        nested: Whether images are anywhere below the folder and found by their file name.
    """
    index = {file.name: file for file in images.rglob("*") if file.is_file()} if nested else {}
    found = []
    for row in rows:
        path = index.get(Path(row.image).name, images / row.image)
        if is_file(path):
            found.append(replace(row, path=path))
        else:
            advice = "" if NO_FILE in skipped.first else _folder_above(row.image, images)
            advice = advice or "check `images` and `image_column`"
            skipped.add(NO_FILE, f"{row.where}: column '{column}' names no file below {images}: {advice}")
    return found


def _folder_above(image: str, images: Path) -> str:
    """Return the advice for an image that lies below a folder above the given one; empty if it does not."""
    for folder in (*images.parents, *images.resolve().parents):
        if is_file(folder / image):
            first = Path(image).parts[0]
            # It may name a patient, so it is said only if the given path has it, too.
            inside = first == images.resolve().relative_to(folder.resolve()).parts[0]
            reason = f"the cells begin with {first}/" if inside else "it is in a folder above"
            return f"{reason}: try `images={folder}`"
    return ""


def agreeing(rows: Iterable[LabelRow], skipped: Skipped) -> list[LabelRow]:
    """Keep each image once, and no image whose rows disagree."""
    by_image: dict[Path, list[LabelRow]] = {}
    for row in rows:
        by_image.setdefault(row.path, []).append(row)
    kept = []
    for first, *others in by_image.values():
        other = next((row for row in others if row.claims != first.claims), None)
        if other is None:
            kept.append(first)
            for row in others:
                skipped.add(TWICE, f"{row.where} repeats {first.where}")
            continue
        for row in (first, *others):
            against = first if row is not first else other
            # names only: the values may identify the patient
            differing = [name for name, said in row.claims.items() if said != against.claims[name]] or [
                "labels"
            ]
            skipped.add(
                DISAGREE,
                f"{row.where}: {' and '.join(differing)} of the image differ from those of {against.where}",
            )
    return kept


def _coherent(rows: Iterable[LabelRow], skipped: Skipped) -> list[LabelRow]:
    kept = []
    for row in rows:
        if len(row.labels) > 1 and NORMAL in map(plain, row.labels):
            labels = ";".join(sorted(row.labels))
            skipped.add("normal and diseased", f"{row.where}: the image is labeled '{labels}'")
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
            f"column '{columns.labels}' is '{cell}', which `classes` does not define: it defines "
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
