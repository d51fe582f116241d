"""The label table of a bench: its rows as questions see them, and which of them can be asked about."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from eval_mcq.items.image_checks import unreadable_images
from eval_mcq.items.preset import Disease, Preset, plain
from mgll_encoder.common.errors import BadDataError, unknown_name
from mgll_encoder.common.skipped import UNREADABLE, Skipped, unnamed
from mgll_encoder.common.tables import TableOptions, read_table
from mgll_encoder.data.fundus_layouts import GENERIC, IMAGE, KEYWORDS, LABELS, PATIENT, SOURCE, as_generic
from mgll_encoder.data.label_rows import Columns, agreeing, label_rows, with_files

TYPO_CUTOFF = 0.85
"""difflib ratio from which a label outside the preset counts as a misspelt disease."""


@dataclass(frozen=True)
class LabelTable:
    """Which columns of a label file mean what.

    Attributes:
        path: The label file (`mgll_encoder.common.tables`).
        image: Column with the image path below the image folder.
        labels: Column with a list of labels.
        patient: Column with the patient or source id, see `mgll_encoder.common.patient_column`; None for the one that
            is recognized.
        source: Column with the name of the data set.
        layout: Published layout of the file instead of these columns, or ``generic``.
        binary: Columns that stand for one label each, instead of ``labels``.
        reading: What else the user says about the file.
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
    """A row of the label file, as questions see it.

    Attributes:
        where: How messages call it.
        image: The image, as the table names it.
        labels: Labels that are true, plain.
        uncertain: Labels that the row leaves open, plain.
        patient: Patient or source; empty where the table does not say.
        source: Data set.
        words: What the annotators wrote, plain.
        columns: All of the row.
        path: The image's file.
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
        """Whether the image may have the disease, for all that the table says."""
        return not disease.is_true_of(set(self.labels)) and disease.is_true_of(set(self.uncertain))

    @property
    def split_by(self) -> str:
        """What the side of a split is drawn by: the patient, or the image where there is none."""
        return self.patient or self.image

    def is_asked(self, disease: Disease, preset: Preset) -> bool:
        """Whether the row has the column values that the preset wants for a disease."""
        where = preset.where if disease.where is None else disease.where
        return all(self.columns[column] == value for column, value in where.items())

    def distractors(self, disease: Disease, preset: Preset) -> list[Disease]:
        """What may be offered as wrong beside a disease of the image."""
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
    """The rows whose image is there, each image once.

    Args:
        table: The label file.
        images: Folder of the images.
        preset: Its labels are known, and its filters name columns.
        skipped: Takes the other rows.
        drawn: Whether sides are drawn by patient.

    Raises:
        UserError: the file or a column is missing, nothing is left, or ``skipped`` is strict and a row is left out.
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
        raise BadDataError(f"label file {table.path} gives no image: {reasons}")
    return rows


def check_labels(table: LabelTable, rows: list[AskedRow], preset: Preset) -> Counter[str]:
    """Count the labels that are outside the preset.

    Raises:
        UserError: one of them is a near miss of a label inside it.
    """
    known = {plain(label) for disease in preset.diseases for label in disease.labels}
    passed = known | {plain(label) for label in preset.other_labels}
    unasked: Counter[str] = Counter()
    for row in rows:
        for label in sorted(row.labels - known):
            unasked[label] += 1
            if (
                table.layout == GENERIC  # a published layout has labels of its own, not typed ones
                and unasked[label] == 1
                and label not in passed
                and get_close_matches(label, known, 1, TYPO_CUTOFF)
            ):
                error = unknown_name("disease", label, known)
                raise BadDataError(f"{row.where}: {error} (if it is right, a preset must list it)")
    return unasked


def askable(rows: list[AskedRow], preset: Preset, skipped: Skipped) -> list[AskedRow]:
    """The rows that can be asked about: one true choice, enough distractors, an image that can be decoded."""
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
    """Why a row gives no fair question, and where."""
    for disease in preset.diseases:
        if not row.is_asked(disease, preset):
            continue
        fitting = disease.fitting(row.labels)
        if len(fitting) > 1:
            return "two true choices", f"{row.where}: '{fitting[0]}' and '{fitting[1]}' both fit the image"
        if not disease.choices and disease.is_true_of(set(row.labels)):
            pool = len(row.distractors(disease, preset))
            if pool < preset.options - 1:
                return "too few distractors", (
                    f"{row.where} leaves {pool} distractors for '{disease.name}', {preset.options} options need "
                    f"{preset.options - 1}: ask for fewer with `options`, or for more diseases"
                )
    return None
