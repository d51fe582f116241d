"""From a table of fundus labels to a manifest of status, disease, keyword with severity, and explanation."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mgll_encoder.common.cli import track
from mgll_encoder.common.errors import UserError
from mgll_encoder.common.files import check_free, sha256
from mgll_encoder.common.images import check_image_header
from mgll_encoder.common.pseudonyms import Pseudonyms
from mgll_encoder.common.skipped import DISAGREE, NO_FILE, NO_LABEL, NOT_NAMED, TWICE, UNREADABLE, Skipped
from mgll_encoder.common.splits import assign_split
from mgll_encoder.common.tables import read_table
from mgll_encoder.common.texts import read_text
from mgll_encoder.data.fundus_layouts import (
    GENERIC,
    IMAGE,
    KEYWORDS,
    LABELS,
    PATIENT,
    SOURCE,
    as_generic,
    from_folders,
)
from mgll_encoder.data.manifest import ManifestHeader, ManifestRow, write_manifest

NORMAL = "normal"
GRANULARITIES = ["status", "disease", "keyword", "explanation"]
EXPLANATIONS = Path(__file__).parent / "explanations.json"

_CODE = re.compile(r"^[a-z]:\s*")  # a class letter before the phrase, as in "P: pathologic myopia"
_PHRASE = re.compile(r"^[a-z][a-z '/-]{2,}$")
_UNSURE = ("suspect", "suspicious")


class Explanations(BaseModel):
    """The table of clinical explanations, one editable file.

    Attributes:
        version: Version of the texts.
        about: What it is.
        sources: Where the texts come from.
        explanations: Label -> explanation.
        not_findings: Keywords about the photograph, or the lack of findings, instead of a disease.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    about: str = ""
    sources: list[str]
    explanations: dict[str, str]
    not_findings: list[str] = []


@dataclass(frozen=True)
class FundusTable:
    """A label file and the meaning of its columns.

    Attributes:
        path: CSV or Excel file with a header line; for layouts whose folders tell the classes, the image folder.
        image: Column with the image path below the image folder.
        labels: Column with canonical labels, separated by ``;``.
        patient: Column with the patient or source id.
        keywords: Column with the annotators' words, separated by commas or ``;``; None for
            ``raw_label_or_keywords`` if the file has it.
        source: Column with the name of the data set; None for ``dataset`` if the file has it.
        layout: ``generic``, or a published layout (`fundus_layouts`), which says what the columns are.
        classes: Cell of the label column -> label, for files that write 0 and 1.
    """

    path: Path
    image: str = "file"
    labels: str = "labels"
    patient: str = "patient_or_source_id"
    keywords: str | None = None
    source: str | None = None
    layout: str = GENERIC
    classes: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What error messages call it."""
        return f"image folder {self.path}" if self.path.is_dir() else f"label file {self.path}"


@dataclass
class FundusReport:
    """What went into a manifest.

    Attributes:
        rows: Images written.
        splits: Images per side of the split.
        texts: Distinct texts per granularity.
        labels: Images per label.
        skipped: Rows left out, by reason.
        unexplained: Labels that the table of explanations lacks, with their rows.
        without_patient: Images whose patient column is blank: each its own patient.
    """

    rows: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    texts: dict[str, int] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)
    skipped: Skipped = field(default_factory=Skipped)
    unexplained: Counter[str] = field(default_factory=Counter)
    without_patient: int = 0


def read_explanations(path: Path = EXPLANATIONS) -> Explanations:
    """The table of clinical explanations.

    Raises:
        UserError: no such file, or not of this form.
    """
    try:
        return Explanations.model_validate_json(read_text(path, "--explanations"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"explanations file {path}: '{where}': {first['msg']}; expected the form of {EXPLANATIONS.name}"
        ) from None


def build_fundus(
    table: FundusTable,
    images: Path,
    out: Path,
    *,
    test: float = 0.3,
    val: float = 0.0,
    seed: int = 0,
    explanations: Path = EXPLANATIONS,
    strict: bool = False,
    force: bool = False,
) -> FundusReport:
    """Write a manifest from a label file.

    Rows without a label are unknown, not normal, and are left out. So are rows that contradict themselves
    or another row of the same image, and images that are missing or unreadable.

    Args:
        table: The label file.
        images: Folder that the image column is relative to.
        out: The manifest to write.
        test: Share of patients for the test split.
        val: Share of patients for the validation split.
        seed: Draws the split.
        explanations: Table of clinical explanations.
        strict: Stop at the first row that would be left out.
        force: Replace ``out``.

    Raises:
        UserError: the file or a column is missing, nothing remains, or, if ``strict``, a row is left out.
    """
    check_free(out, force)
    if not images.is_dir():
        raise UserError(f"image folder {images} does not exist or is not a folder: check --images")
    known = read_explanations(explanations)
    report = FundusReport(skipped=Skipped(strict))
    rows: list[ManifestRow] = []
    table, records = _read(table, report.skipped)
    pseudonyms = Pseudonyms(table.path)
    usable = _consistent(table, records, report.skipped)
    for number, record in track(usable, f"Checking the images of {table.path.name}"):
        path = images / record[table.image].strip()
        if trouble := _trouble(path):
            report.skipped.add(
                trouble,
                f"{table.title} row {number}: column '{table.image}': {trouble}; check --images and --image-column",
            )
            continue
        patient = record[table.patient].strip()
        report.without_patient += not patient
        image = record[table.image].strip()
        labels = _labels(record[table.labels])
        report.labels.update(labels)
        report.unexplained.update(label for label in labels if label not in known.explanations)
        keywords = _keywords(record[table.keywords], known.not_findings) if table.keywords else []
        texts = {
            "status": ["normal fundus" if labels == (NORMAL,) else "abnormal fundus"],
            "disease": list(labels),
            "keyword": keywords,
            "explanation": [known.explanations[label] for label in labels if label in known.explanations],
        }
        rows.append(
            ManifestRow.model_validate(
                {
                    "image": image,
                    "texts": {granularity: found for granularity, found in texts.items() if found},
                    "patient": pseudonyms.patient(patient) if patient else pseudonyms.file(image),
                    "split": assign_split(patient or image, test=test, val=val, seed=seed),
                    "source": record[table.source].strip() if table.source else "",
                }
            )
        )
    if not rows:
        reasons = "; ".join(report.skipped.lines()) or "it has no rows"
        raise UserError(f"{table.title} gives no image to train on: {reasons}")
    report.rows = len(rows)
    report.splits.update(row.split for row in rows)
    used = {g: {text for row in rows for text in row.texts.get(g, [])} for g in GRANULARITIES}
    report.texts = {granularity: len(texts) for granularity, texts in used.items() if texts}
    header = ManifestHeader(
        granularities=list(report.texts),
        built={
            "labels": table.path.name,
            **({} if table.path.is_dir() else {"labels_sha256": sha256(table.path)}),
            "explanations_version": known.version,
            "split_by": "patient" if report.without_patient < len(rows) else "image",
            "split_test": test,
            "split_val": val,
            "split_seed": seed,
            **report.skipped.record(),
        },
    )
    write_manifest(out, images, header, rows, force)
    return report


def _consistent(
    table: FundusTable, records: list[tuple[int, dict[str, str]]], skipped: Skipped
) -> list[tuple[int, dict[str, str]]]:
    """Rows with labels that contradict neither themselves nor another row of the image, with row numbers."""
    claims: dict[str, dict[tuple[str, ...], int]] = {}
    for number, record in records:
        claims.setdefault(record[table.image].strip(), {}).setdefault(_labels(record[table.labels]), number)
    seen: set[str] = set()
    kept = []
    for number, record in records:
        image, labels = record[table.image].strip(), _labels(record[table.labels])
        where = f"{table.title} row {number}"
        others = {said: row for said, row in claims[image].items() if said != labels}
        if not image:
            skipped.add(NOT_NAMED, f"{where}: column '{table.image}' is blank")
        elif others:
            said, row = next(iter(others.items()))
            skipped.add(
                DISAGREE,
                f"{where}: the image is labelled '{';'.join(labels)}', but '{';'.join(said)}' in row {row}",
            )
        elif image in seen:
            skipped.add(TWICE, f"{where}: the image is already in row {claims[image][labels]}, labels alike")
        elif not labels:
            skipped.add(NO_LABEL, f"{where}: column '{table.labels}' is blank: unknown, not normal")
        elif NORMAL in labels and len(labels) > 1:
            skipped.add("normal and diseased", f"{where}: the image is labelled '{';'.join(labels)}'")
        else:
            kept.append((number, record))
        seen.add(image)
    return kept


def _trouble(path: Path) -> str:
    """What keeps an image's header from being read; empty if nothing does."""
    if not path.exists():
        return NO_FILE
    try:
        check_image_header(path)
    except UserError:
        return UNREADABLE
    return ""


def _read(table: FundusTable, skipped: Skipped) -> tuple[FundusTable, list[tuple[int, dict[str, str]]]]:
    """The table with its optional columns settled, and its records with row numbers (the header is row 1)."""
    generic = FundusTable(table.path, IMAGE, LABELS, PATIENT, KEYWORDS, SOURCE)
    if table.path.is_dir():
        found = from_folders(table.layout, table.path)
        skipped.read += len(found)
        return generic, found
    content = read_table(table.path, "--labels", skipped)
    records = content.rows
    if table.layout != GENERIC:
        return generic, as_generic(table.layout, content)
    wanted = {
        "--image-column": table.image,
        "--labels-column": table.labels,
        "--patient-column": table.patient,
        "--keywords-column": table.keywords,
        "--source-column": table.source,
    }
    content.check_columns(wanted.items())
    settled = replace(
        table,
        keywords=table.keywords
        or ("raw_label_or_keywords" if "raw_label_or_keywords" in content.columns else None),
        source=table.source or ("dataset" if "dataset" in content.columns else None),
    )
    if table.classes:
        records = [(number, {**row, table.labels: _named(table, row, number)}) for number, row in records]
    return settled, records


def _named(table: FundusTable, record: dict[str, str], number: int) -> str:
    cell = record[table.labels].strip()
    if cell and cell not in table.classes:
        raise UserError(
            f"{table.title} row {number}: column '{table.labels}' is '{cell}', which --classes does not "
            f"name: it names {', '.join(table.classes)}"
        )
    return table.classes.get(cell, "")


def _labels(cell: str) -> tuple[str, ...]:
    """Labels in canonical order: lower case, single spaces, no repeats."""
    return tuple(sorted({" ".join(label.casefold().split()) for label in cell.split(";") if label.strip()}))


def _keywords(cell: str, not_findings: list[str]) -> list[str]:
    """The annotators' phrases that state a finding: no counts, suspicions or remarks on the photograph."""
    phrases = (_CODE.sub("", " ".join(part.casefold().split())) for part in re.split("[,;，；]", cell))
    stated = (p for p in phrases if _PHRASE.match(p) and not p.startswith(_UNSURE) and p not in not_findings)
    return list(dict.fromkeys(stated))
