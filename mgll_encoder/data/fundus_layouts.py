"""Label files of published fundus data sets, turned into the generic table: one row per image."""

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.tables import Table

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


class Layout(BaseModel):
    """A published label file.

    Attributes:
        dataset: Name of the data set.
        eyes: The images of a row.
        patient: Column with the patient id; None: each image is a patient.
        normal: Column that is 0 where nothing was found.
        binary: Column with 0 or 1 -> label.
        label: Column with one class; several names, of which a file has one, where files differ.
        classes: Class -> label; blank where the class leaves open what the eye has: such rows are unknown.
        folders: Pattern of image paths -> class, for sets whose folders or file names tell it.
        phrases: Regular expressions over a whole phrase of the annotators -> label, first match first. A phrase that
            none of them matches (a suspicion, a remark) is no label.
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
        """The columns that must be there."""
        templates = {name for eye in self.eyes for name in re.findall(r"{([^}]+)}", eye.image)}
        optional = {self.patient, self.normal, *(eye.keywords for eye in self.eyes)} - {None}
        return {*templates, *map(str, optional), *self.binary}


@cache
def layouts() -> Mapping[str, Layout]:
    """The published layouts, by name."""
    text = files(__package__).joinpath("fundus_layouts.json").read_text(encoding="utf-8")
    return {name: Layout.model_validate(row) for name, row in json.loads(text)["layouts"].items()}


def as_generic(name: str, table: Table) -> list[tuple[int, dict[str, str]]]:
    """Rows of the generic table made of those of a published layout.

    An image that several rows name in the same way (ODIR-5K lists each patient once per eye) is taken once.

    Args:
        name: A key of `layouts`.
        table: Its label file.

    Raises:
        UserError: no such layout, a column is missing, or a cell that must be 0 or 1 is not.
    """
    if name not in layouts():
        raise unknown_name("layout", name, [GENERIC, *layouts()])
    layout = layouts()[name]
    if not layout.eyes:
        raise UserError(f"layout '{name}' is labelled by its folders: leave --labels out")
    wanted = sorted(layout.columns)
    if layout.label and not set(layout.label) & set(table.columns):
        wanted.append(layout.label[0])
    table.check_columns([(f"layout '{name}'", column) for column in wanted])
    rows: dict[tuple[str, str], tuple[int, dict[str, str]]] = {}
    for number, record in table.rows:
        for eye in layout.eyes:
            image = eye.image.format_map(record).strip()
            words = record[eye.keywords] if eye.keywords else ""
            labels = (
                _phrases(layout, words) if eye.keywords else _findings(layout, record, table.path, number)
            )
            row = {
                IMAGE: image,
                LABELS: ";".join(labels),
                PATIENT: record[layout.patient].strip() if layout.patient else "",
                KEYWORDS: words,
                SOURCE: layout.dataset,
            }
            rows.setdefault((image, row[LABELS]), (number, row))
    return list(rows.values())


def from_folders(name: str, images: Path) -> list[tuple[int, dict[str, str]]]:
    """Rows of the generic table made of the folders or file names of a published set, numbered from 1.

    Args:
        name: A key of `layouts`.
        images: The image folder.

    Raises:
        UserError: no such layout, folders do not tell its classes, or there is no image of a class.
    """
    if name not in layouts():
        raise unknown_name("layout", name, [GENERIC, *layouts()])
    layout = layouts()[name]
    if not layout.folders:
        raise UserError(f"--labels is missing: layout '{name}' needs its label file")
    rows = []
    for pattern, found in layout.folders.items():
        files = sorted(images.rglob(pattern))
        if not files:
            raise UserError(f"image folder {images} has no file '{pattern}' ({found}): check --images")
        for file in files:
            row = {
                IMAGE: file.relative_to(images).as_posix(),
                LABELS: layout.classes[found],
                PATIENT: "",
                KEYWORDS: "",
                SOURCE: layout.dataset,
            }
            rows.append(row)
    return list(enumerate(rows, start=1))


def _class(layout: Layout, record: Mapping[str, str], path: Path, number: int) -> list[str]:
    column = next(name for name in layout.label if name in record)
    cell = record[column].strip()
    if cell and cell not in layout.classes:
        raise UserError(
            f"label file {path} row {number}: column '{column}' is '{cell}': expected {' or '.join(layout.classes)}"
        )
    return [layout.classes[cell]] if cell and layout.classes[cell] else []


def _findings(layout: Layout, record: Mapping[str, str], path: Path, number: int) -> list[str]:
    if layout.label:
        return _class(layout, record, path, number)

    def true(column: str) -> bool:
        value = record[column].strip()
        if value not in ("0", "1"):
            raise UserError(
                f"label file {path} row {number}: column '{column}' is '{value}': expected 0 or 1"
            )
        return value == "1"

    found = [label for column, label in layout.binary.items() if true(column)]
    return found or (["normal"] if layout.normal and not true(layout.normal) else [])


def _phrases(layout: Layout, words: str) -> list[str]:
    labels = []
    for phrase in (" ".join(part.casefold().split()) for part in SEPARATORS.split(words)):
        matching = (label for pattern, label in layout.phrases if re.fullmatch(pattern, phrase))
        labels += [label for label in [next(matching, None)] if label]
    diseases = [label for label in dict.fromkeys(labels) if label != "normal"]
    return diseases or labels[:1]
