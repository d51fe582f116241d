"""A folder of phantom photographs with a label table, in the form of a real labeled data set."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.files import new_folder
from mgll_encoder.common.progress import track
from mgll_encoder.data.manifest import ManifestHeader, ManifestRow, write_manifest
from mgll_encoder.data.phantom.findings import FINDINGS
from mgll_encoder.data.phantom.photographs import render
from mgll_encoder.data.phantom.views import GRANULARITIES, view_texts

NORMAL = "normal"
GRADES = {"mild": (0.0, 0.33), "moderate": (0.33, 0.67), "severe": (0.67, 1.0)}
"""Severity words and their ranges of the renderer's severity."""

LABEL_COLUMNS = ("file", "labels", "patient_or_source_id", "raw_label_or_keywords")
_TILE = 224
_COLUMNS = 4


@dataclass(frozen=True)
class PhantomEye:
    """One photograph to render."""

    patient: int
    left: bool
    label: str
    grade: str | None
    severity: float

    @property
    def name(self) -> str:
        """Identifier of the patient."""
        return f"phantom-{self.patient:05d}"

    @property
    def file(self) -> str:
        """Path in the data set's folder."""
        return f"images/{self.name}_{'left' if self.left else 'right'}.png"

    @property
    def row(self) -> tuple[str, str, str, str]:
        """The row of the label table, in the order of :data:`LABEL_COLUMNS`."""
        keyword = f"{self.grade} {self.label}" if self.grade else "normal fundus"
        return self.file, self.label, self.name, keyword

    def draw(self, size: int, seed: int) -> Image.Image:
        """Render the photograph."""
        findings = [] if self.label == NORMAL else [self.label]
        return render(findings, (seed, self.patient, int(self.left)), size, self.severity, self.left)


def phantom_eyes(per_disease: int, seed: int) -> Iterator[PhantomEye]:
    """Yield the eyes of a data set: two per patient, ``per_disease`` of each disease and as many normal ones."""
    rng = np.random.default_rng(seed)
    patient = 0
    for first in range(0, per_disease, 2):
        for label in (NORMAL, *FINDINGS):
            for left in (False, True)[: per_disease - first]:
                grade = None if label == NORMAL else str(rng.choice(list(GRADES)))
                severity = float(rng.uniform(*GRADES[grade])) if grade else 0.0
                yield PhantomEye(patient, left, label, grade, severity)
            patient += 1


def write_phantom(
    out: str | Path, per_disease: int, image_size: int = 64, seed: int = 0, force: bool = False
) -> int:
    """Write ``images/``, ``labels.csv``, ``contact_sheet.png``, and ``views.jsonl``, a manifest without diseases.

    Args:
        out: The new folder.
        per_disease: Photographs of each disease, and of normal eyes; two per patient.
        image_size: Side of the pictures in pixels.
        seed: The same seed writes the same bytes.
        force: Replace an existing folder.

    Returns:
        The number of photographs.

    Raises:
        UserError: a number is out of range, or ``out`` exists.
    """
    if per_disease < 1:
        raise InvalidArgumentError(f"`images_per_disease` is {per_disease}: give at least 1")
    if not 16 <= image_size <= 1024:
        raise InvalidArgumentError(f"`image_size` is {image_size}: give a side between 16 and 1024 pixels")
    eyes = list(phantom_eyes(per_disease, seed))
    with new_folder(Path(out), force) as folder:
        (folder / "images").mkdir()
        views = []
        for eye in track(eyes, "Rendering phantom photographs"):
            picture = eye.draw(image_size, seed)
            picture.save(folder / eye.file)
            views.append(ManifestRow(image=eye.file, texts=view_texts(picture, eye.left), patient=eye.name))
        write_manifest(
            folder / "views.jsonl", folder, ManifestHeader(granularities=list(GRANULARITIES)), views
        )
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(LABEL_COLUMNS)
        writer.writerows(eye.row for eye in eyes)
        (folder / "labels.csv").write_text(table.getvalue(), encoding="utf-8")
        contact_sheet(seed).save(folder / "contact_sheet.png")
    return len(eyes)


def contact_sheet(seed: int = 0) -> Image.Image:
    """Render one captioned example of every disease and of a normal eye, 224 pixels each."""
    labels = (NORMAL, *FINDINGS)
    rows = -(-len(labels) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _TILE, rows * (_TILE + 26)), "black")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for place, label in enumerate(labels):
        x, y = place % _COLUMNS * _TILE, place // _COLUMNS * (_TILE + 26)
        eye = PhantomEye(place, place % 2 == 1, label, None, 0.6)
        sheet.paste(eye.draw(_TILE, seed), (x, y))
        pen.text((x + _TILE // 2, y + _TILE + 4), label, fill="white", font=font, anchor="ma")
    pen.text(
        (sheet.width - 8, sheet.height - 8), "phantom: no real eyes", fill="gray", font=font, anchor="rd"
    )
    return sheet
