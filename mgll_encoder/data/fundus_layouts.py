"""Label files of published fundus data sets, converted to the generic table: one row per image."""

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from itertools import product
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, unknown_name
from mgll_encoder.common.skipped import NO_LABEL, NO_TRUTH, Skipped
from mgll_encoder.common.tables import Table, TableOptions, Uncertain
from mgll_encoder.data.label_rows import LabelRow, UnusableError, settled, truths

GENERIC = "generic"

IMAGE, LABELS, PATIENT, KEYWORDS, SOURCE = (
    "file", "labels", "patient_or_source_id", "raw_label_or_keywords", "dataset",
)  # fmt: skip
"""Columns of the generic table."""

SEPARATORS = re.compile("[,;，；]")


class Eye(BaseModel):
    """One image of a row: a template of its path over the columns, and the column with its annotators' words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    keywords: str | None = None


class LabelFileLayout(BaseModel):
    """A published label file.

    Attributes:
        dataset: Name of the data set.
        eyes: The images of a row.
        patient: Column with the patient id; None: each image is a patient.
        normal: Column that is 0 if nothing was found.
        binary: Column with 0 or 1 -> label.
        label: Column with one class; alternative names, of which a file has one.
        classes: Class -> label; blank for a class without a definite diagnosis: such rows are unknown.
        folders: Pattern of image paths -> class, for data sets whose folders or file names give the class.
        phrases: Regular expressions over a whole phrase of the annotators -> label; the first match counts. A phrase
            without a match (a suspicion, a remark) gives no label.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    eyes: tuple[Eye, ...] = ()
    patient: str | None = None
    normal: str | None = None
    binary: dict[str, str] = {}
    label: tuple[str, ...] = ()
    classes: dict[str, str] = {}
    folders: dict[str, str] = {}
    phrases: tuple[tuple[str, str], ...] = ()

    @property
    def columns(self) -> set[str]:
        """The required columns."""
        templates = {name for eye in self.eyes for name in re.findall(r"{([^}]+)}", eye.image)}
        optional = {self.patient, self.normal, *(eye.keywords for eye in self.eyes)} - {None}
        return {*templates, *map(str, optional), *self.binary}


@cache
def layouts() -> Mapping[str, LabelFileLayout]:
    """Return the published layouts, by name."""
    text = files(__package__).joinpath("fundus_layouts.json").read_text(encoding="utf-8")
    return {name: LabelFileLayout.model_validate(row) for name, row in json.loads(text)["layouts"].items()}


def as_generic(
    name: str, table: Table, skipped: Skipped, reading: TableOptions | None = None
) -> list[LabelRow]:
    """Return the images of a published label file as rows of the generic table.

    An image in several identical rows (ODIR-5K lists each patient once per eye) is used once.

    Args:
        name: A key of `layouts`.
        table: Its label file.
        skipped: Collects the unusable images; it counts images here, not rows.
        reading: What the user specified about it.

    Returns:
        Rows whose cells are those of the generic table.

    Raises:
        UserError: there is no such layout, a column is missing, or ``skipped`` is strict and an image is unusable.
    """
    layout = _layout(name)
    if not layout.eyes:
        raise BadDataError(f"data set '{name}' is labeled by its folders: leave `labels` out")
    wanted = sorted(layout.columns)
    if layout.label and not set(layout.label) & set(table.columns):
        wanted.append(layout.label[0])
    table.check_columns([(f"data set '{name}'", column) for column in wanted])
    reading = reading or TableOptions()
    rows: dict[tuple[str, frozenset[str]], LabelRow] = {}
    unusable: set[tuple[str, str]] = set()
    for (number, record), eye in product(table.rows, layout.eyes):
        where, image = table.where(number), eye.image.format_map(record).strip()
        try:
            row = _eye(layout, eye, image, record, where, reading.uncertain)
        except UnusableError as error:
            if (image, error.reason) not in unusable:
                unusable.add((image, error.reason))
                skipped.add(error.reason, f"{where}: {error.detail}")
        else:
            rows.setdefault((image, row.labels), row)
    skipped.read += len(rows) + len(unusable) - len(table.rows)
    return settled(table, list(rows.values()), reading, skipped)


def from_folders(name: str, images: Path, skipped: Skipped) -> list[LabelRow]:
    """Return the images of a published data set whose folders or file names give the class.

    Args:
        name: A key of `layouts`.
        images: The image folder.
        skipped: Collects the images whose class gives no definite diagnosis.

    Raises:
        UserError: there is no such layout, it is not labeled by folders, there is no image of a class, or ``skipped``
            is strict and an image is skipped.
    """
    layout = _layout(name)
    if not layout.folders:
        raise InvalidArgumentError(f"`labels` is missing: data set '{name}' needs its label file")
    rows: list[LabelRow] = []
    for pattern, found in layout.folders.items():
        files = sorted(images.rglob(pattern))
        if not files:
            raise BadDataError(f"image folder {images} has no file '{pattern}' ({found}): check `images`")
        for file in files:
            skipped.read += 1
            where = f"image {skipped.read} of folder {images}"
            if label := layout.classes[found]:
                image = file.relative_to(images).as_posix()
                rows.append(_row(layout, where, image, frozenset({label})))
            else:
                skipped.add(NO_LABEL, f"{where}: its name does not give a diagnosis")
    return rows


def _layout(name: str) -> LabelFileLayout:
    if name not in layouts():
        raise unknown_name("layout", name, [GENERIC, *layouts()])
    return layouts()[name]


def _eye(
    layout: LabelFileLayout, eye: Eye, image: str, record: Mapping[str, str], where: str, policy: Uncertain
) -> LabelRow:
    words = record[eye.keywords] if eye.keywords else ""
    uncertain: frozenset[str] = frozenset()
    if eye.keywords:
        labels = frozenset(_phrases(layout, words))
    elif layout.label:
        labels = _class(layout, record)
    else:
        labels, uncertain = _findings(layout, record, policy)
    if not labels and not uncertain:
        raise UnusableError(NO_LABEL, "it has no label: unknown, not normal")
    patient = record[layout.patient].strip() if layout.patient else ""
    return _row(layout, where, image, labels, uncertain, patient, words)


def _row(
    layout: LabelFileLayout,
    where: str,
    image: str,
    labels: frozenset[str],
    uncertain: frozenset[str] = frozenset(),
    patient: str = "",
    words: str = "",
) -> LabelRow:
    cells = {
        IMAGE: image, LABELS: ";".join(sorted(labels)), PATIENT: patient, KEYWORDS: words, SOURCE: layout.dataset,
    }  # fmt: skip
    return LabelRow(where, image, patient, cells, labels, uncertain)


def _class(layout: LabelFileLayout, record: Mapping[str, str]) -> frozenset[str]:
    column = next(name for name in layout.label if name in record)
    cell = record[column].strip()
    if cell and cell not in layout.classes:
        raise UnusableError(
            NO_TRUTH, f"column '{column}' is '{cell}': expected {' or '.join(layout.classes)}"
        )
    return frozenset({layout.classes[cell]} - {""}) if cell else frozenset()


def _findings(
    layout: LabelFileLayout, record: Mapping[str, str], policy: Uncertain
) -> tuple[frozenset[str], frozenset[str]]:
    labels, uncertain = truths(record, layout.binary, policy)
    if not labels and layout.normal:
        abnormal, unclear = truths(record, {layout.normal: "abnormal"}, policy)
        if not abnormal and not unclear:
            return frozenset({"normal"}), uncertain
    return labels, uncertain


def _phrases(layout: LabelFileLayout, words: str) -> list[str]:
    labels = []
    for phrase in (" ".join(part.casefold().split()) for part in SEPARATORS.split(words)):
        matching = (label for pattern, label in layout.phrases if re.fullmatch(pattern, phrase))
        labels += [label for label in [next(matching, None)] if label]
    diseases = [label for label in dict.fromkeys(labels) if label != "normal"]
    return diseases or labels[:1]
