"""The label table of a benchmark: its rows, and which of them can become questions."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from eval_mcq.items.image_checks import unreadable_images
from eval_mcq.items.preset import Disease, Preset
from mgll_encoder.common.errors import BadDataError, unknown_name
from mgll_encoder.common.skipped import UNREADABLE, Skipped, unnamed
from mgll_encoder.common.tables import TableOptions, read_table
from mgll_encoder.data.fundus_layouts import GENERIC, IMAGE, KEYWORDS, LABELS, PATIENT, SOURCE, as_generic
from mgll_encoder.data.label_cells import plain
from mgll_encoder.data.label_rows import Columns, agreeing, label_rows, with_files

TYPO_CUTOFF = 0.85
"""difflib ratio from which a label outside the preset counts as a misspelled disease."""


@dataclass(frozen=True)
class LabelTable:
    """A label file and the meaning of its columns.

    Attributes:
        path: The label file (`mgll_encoder.common.tables`).
        image: Column with the image path below the image folder.
        labels: Column with a list of labels.
        patient: Column with the patient or source id, see `mgll_encoder.common.patient_column`; None to detect it.
        source: Column with the name of the data set.
        layout: Published layout of the file instead of these columns, or ``generic``.
        binary: Columns that each represent one label, instead of ``labels``.
        reading: What else the user specified about the file.
    """

    path: Path
    image: str = "file"
    labels: str = "labels"
    patient: str | None = None
    source: str | None = None
    layout: str = GENERIC
    binary: tuple[str, ...] = ()
    reading: TableOptions = field(default_factory=TableOptions)


@dataclass(frozen=True)
class AskedRow:
    """A row of the label file, with the fields that questions need.

    Attributes:
        where: Location of the row, for messages.
        image: The image, as named in the table.
        labels: True labels, normalized by `plain`.
        uncertain: Uncertain labels, normalized.
        patient: Patient or source; empty if the table does not name it.
        source: Data set.
        words: The annotators' words, normalized.
        columns: All cells of the row.
        path: The image file.
    """

    where: str
    image: str
    labels: frozenset[str]
    uncertain: frozenset[str]
    patient: str
    source: str
    words: str
    columns: Mapping[str, str]
    path: Path

    def leaves_open(self, disease: Disease) -> bool:
        """Return whether it is uncertain if the image has the disease."""
        return not disease.is_true_of(set(self.labels)) and disease.is_true_of(set(self.uncertain))

    @property
    def split_by(self) -> str:
        """What determines the split: the patient, or the image if the patient is unknown."""
        return self.patient or self.image

    def is_asked(self, disease: Disease, preset: Preset) -> bool:
        """Return whether the row has the column values that the preset requires for a disease."""
        where = preset.where if disease.where is None else disease.where
        return all(self.columns[column] == value for column, value in where.items())

    def distractors(self, disease: Disease, preset: Preset) -> list[Disease]:
        """Return the diseases that may be distractors for a disease of the image."""
        return [
            other
            for other in preset.against(disease)
            if not other.is_true_of(set(self.labels))
            and not other.is_left_open_by(set(self.labels))
            and not self.leaves_open(other)
            and not (self.words and other.is_mentioned_in(self.words))  # suspected is not absent
        ]


def read_rows(
    table: LabelTable, images: Path, preset: Preset, skipped: Skipped, drawn: bool
) -> list[AskedRow]:
    """Read the rows whose image exists, each image once.

    Args:
        table: The label file.
        images: Folder of the images.
        preset: Provides the known labels and the column filters.
        skipped: Collects the other rows.
        drawn: Whether images are assigned to splits, so that the patients must be known.

    Raises:
        UserError: the file or a column is missing, no row is left, or ``skipped`` is strict and a row is skipped.
    """
    known = {plain(label) for d in preset.diseases for label in d.labels} | set(
        map(plain, preset.other_labels)
    )
    filters = [*preset.where, *(column for d in preset.diseases for column in d.where or {})]
    content = read_table(table.path, "`labels`", skipped, table.reading)
    if table.layout != GENERIC:
        found = as_generic(table.layout, content, skipped, table.reading)
        table = replace(table, image=IMAGE, source=SOURCE)
        content = replace(content, columns=(IMAGE, LABELS, PATIENT, SOURCE))
    else:
        columns = Columns(table.image, table.labels, table.binary, table.patient).of(content, drawn=drawn)
        found = label_rows(content, columns, skipped, table.reading, known)
    filtering = (("the preset's 'where'", name) for name in filters)
    content.check_columns([("`source_column`", table.source), *filtering])
    rows = [
        AskedRow(
            row.where,
            row.image,
            frozenset(map(plain, row.labels)),
            frozenset(map(plain, row.uncertain)),
            row.patient,
            row.cells[table.source].strip() if table.source else "",
            plain(row.cells.get(KEYWORDS, "")),
            row.cells,
            row.path,
        )
        for row in agreeing(with_files(found, images, skipped, table.image), skipped)
    ]
    if not rows:
        reasons = "; ".join(skipped.lines()) or "it has a header but no rows"
        raise BadDataError(f"label file {table.path} has no usable image: {reasons}")
    return rows


def check_labels(table: LabelTable, rows: list[AskedRow], preset: Preset) -> Counter[str]:
    """Count the labels that are outside the preset.

    Raises:
        UserError: one of them looks like a misspelling of a label in the preset.
    """
    known = {plain(label) for disease in preset.diseases for label in disease.labels}
    passed = known | {plain(label) for label in preset.other_labels}
    unasked: Counter[str] = Counter()
    for row in rows:
        for label in sorted(row.labels - known):
            unasked[label] += 1
            if (
                table.layout == GENERIC  # labels of a published layout are not typed by hand
                and unasked[label] == 1
                and label not in passed
                and get_close_matches(label, known, 1, TYPO_CUTOFF)
            ):
                error = unknown_name("disease", label, known)
                raise BadDataError(f"{row.where}: {error} (if it is correct, add it to the preset)")
    return unasked


def askable(rows: list[AskedRow], preset: Preset, skipped: Skipped) -> list[AskedRow]:
    """Return the rows that can become questions: one true choice, enough distractors, a readable image."""
    found = []
    for row in rows:
        if trouble := _unaskable(row, preset):
            skipped.add(*trouble)
        else:
            found.append(row)
    known = {plain(label) for d in preset.diseases for label in d.labels}
    faults = unreadable_images(row.path for row in found if row.labels & known)
    for row in found:
        if row.path in faults:
            skipped.add(UNREADABLE, f"{row.where}: the image {unnamed(faults[row.path], row.path)}")
    return [row for row in found if row.path not in faults]


def _unaskable(row: AskedRow, preset: Preset) -> tuple[str, str] | None:
    """Return why a row cannot become a fair question (reason and detail); None if it can."""
    for disease in preset.diseases:
        if not row.is_asked(disease, preset):
            continue
        fitting = disease.fitting(row.labels)
        if len(fitting) > 1:
            return (
                "two true choices",
                f"{row.where}: '{fitting[0]}' and '{fitting[1]}' are both true of the image",
            )
        if not disease.choices and disease.is_true_of(set(row.labels)):
            pool = len(row.distractors(disease, preset))
            if pool < preset.options - 1:
                return "too few distractors", (
                    f"{row.where} leaves {pool} distractors for '{disease.name}', {preset.options} options need "
                    f"{preset.options - 1}: ask for fewer with `options`, or for more diseases"
                )
    return None
