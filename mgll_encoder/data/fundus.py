"""Build a manifest of status, disease, keyword with severity, and explanation from a table of fundus labels."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, NotFoundError, UserError
from mgll_encoder.common.files import check_free, sha256
from mgll_encoder.common.images import check_image_header
from mgll_encoder.common.progress import track
from mgll_encoder.common.pseudonyms import Pseudonyms
from mgll_encoder.common.skipped import NO_LABEL, UNCERTAIN, UNREADABLE, Skipped, unnamed
from mgll_encoder.common.splits import assign_split
from mgll_encoder.common.tables import TableOptions, read_table
from mgll_encoder.common.texts import read_text
from mgll_encoder.data.fundus_layouts import (
    GENERIC,
    IMAGE,
    KEYWORDS,
    SOURCE,
    as_generic,
    from_folders,
)
from mgll_encoder.data.label_cells import plain
from mgll_encoder.data.label_rows import NORMAL, Columns, LabelRow, agreeing, label_rows, with_files
from mgll_encoder.data.manifest import ManifestHeader, ManifestRow, Text, write_manifest

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
        sources: Sources of the texts.
        explanations: Label -> explanation.
        not_findings: Keywords about the photograph, or the lack of findings, instead of a disease.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    about: str = ""
    sources: list[str]
    explanations: dict[str, Text]
    not_findings: list[str] = []


@dataclass(frozen=True)
class FundusTable:
    """A label file and the meaning of its columns.

    Attributes:
        path: The label file (`mgll_encoder.common.tables`); for layouts with one folder per class, the image folder.
        image: Column with the image path below the image folder.
        labels: Column with canonical labels.
        patient: Column with the patient or source id, see `mgll_encoder.common.patient_column`; None to detect it.
        keywords: Column with the annotators' words, separated by commas or ``;``; None for ``raw_label_or_keywords`` if
            the file has it.
        source: Column with the name of the data set; None for ``dataset`` if the file has it.
        dataset: ``generic``, or a published data set (`fundus_layouts`), which defines the columns.
        classes: Cell of the label column -> label, for files that use 0 and 1.
        binary: Columns that each represent one label, instead of ``labels``.
        reading: What else the user specified about the file.
    """

    path: str | Path
    image: str = "file"
    labels: str = "labels"
    patient: str | None = None
    keywords: str | None = None
    source: str | None = None
    dataset: str = GENERIC
    classes: Mapping[str, str] = field(default_factory=dict)
    binary: tuple[str, ...] = ()
    reading: TableOptions = field(default_factory=TableOptions)

    def __post_init__(self) -> None:
        if self.classes and self.binary:
            raise InvalidArgumentError(
                "`classes` has no effect on `binary_columns`, whose names are the labels: leave one out"
            )
        for argument, value in (("binary_columns", self.binary), ("classes", self.classes)):
            if value and self.dataset != GENERIC:
                defined = argument.removeprefix("binary_")
                raise InvalidArgumentError(
                    f"`{argument}` has no effect on data set '{self.dataset}', which defines its {defined}"
                )

    @property
    def file(self) -> Path:
        """The label file."""
        return Path(self.path)

    @property
    def title(self) -> str:
        """Its name in error messages."""
        return f"image folder {self.path}" if self.file.is_dir() else f"label file {self.path}"


@dataclass
class FundusReport:
    """Contents of a manifest that was written.

    Attributes:
        rows: Images written.
        splits: Images per split.
        texts: Distinct texts per granularity.
        labels: Images per label.
        skipped: Skipped rows, by reason.
        unexplained: Labels missing from the table of explanations, with their number of rows.
        without_patient: Images without a patient id: each counts as its own patient.
    """

    rows: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    texts: dict[str, int] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)
    skipped: Skipped = field(default_factory=Skipped)
    unexplained: Counter[str] = field(default_factory=Counter)
    without_patient: int = 0


def read_explanations(path: Path = EXPLANATIONS) -> Explanations:
    """Read the table of clinical explanations.

    Raises:
        UserError: there is no such file, or it is invalid.
    """
    try:
        return Explanations.model_validate_json(read_text(path, "`explanations`"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadDataError(
            f"explanations file {path}: '{where}': {first['msg']}; expected the form of {EXPLANATIONS.name}"
        ) from None


def build_fundus(
    table: FundusTable,
    images: str | Path,
    out: str | Path,
    *,
    test_share: float = 0.3,
    val_share: float = 0.0,
    split_seed: int = 0,
    explanations: Path = EXPLANATIONS,
    strict: bool = False,
    force: bool = False,
) -> FundusReport:
    """Write a manifest from a label file.

    Rows without a label are unknown, not normal, and are skipped. So are rows that contradict themselves or another row
    of the same image, and missing or unreadable images.

    Args:
        table: The label file.
        images: Folder that the image column is relative to.
        out: The manifest to write.
        test_share: Share of patients for the test split.
        val_share: Share of patients for the validation split.
        split_seed: Seed of the split.
        explanations: Table of clinical explanations.
        strict: Stop at the first row that would be skipped.
        force: Replace ``out``.

    Raises:
        UserError: the file or a column is missing, nothing remains, or, if ``strict``, a row is skipped.
    """
    images, out = Path(images), Path(out)
    check_free(out, force)
    if not images.is_dir():
        raise NotFoundError(f"image folder {images} does not exist or is not a folder: check `images`")
    known = read_explanations(explanations)
    report = FundusReport(skipped=Skipped(strict))
    rows: list[ManifestRow] = []
    table, found = _read(table, report.skipped, drawn=test_share > 0 or val_share > 0)
    pseudonyms = Pseudonyms(table.file)
    usable = agreeing(with_files(found, images, report.skipped, table.image), report.skipped)
    usable = _labeled(usable, report.skipped)
    for row in track(usable, f"Checking the images of {table.file.name}"):
        if trouble := _trouble(row.path):
            report.skipped.add(UNREADABLE, f"{row.where}: the image {trouble}")
            continue
        report.without_patient += not row.patient
        image, patient, labels = row.image, row.patient, sorted(row.labels)
        report.labels.update(labels)
        report.unexplained.update(label for label in labels if label not in known.explanations)
        keywords = _keywords(row.cells[table.keywords], known.not_findings) if table.keywords else []
        texts = {
            "status": _status(row),
            "disease": labels,
            "keyword": keywords,
            "explanation": [known.explanations[label] for label in labels if label in known.explanations],
        }
        rows.append(
            ManifestRow.model_validate(
                {
                    "image": image,
                    "texts": {granularity: found for granularity, found in texts.items() if found},
                    "patient": pseudonyms.patient(patient) if patient else pseudonyms.file(image),
                    "split": assign_split(patient or image, test=test_share, val=val_share, seed=split_seed),
                    "source": row.cells[table.source].strip() if table.source else "",
                }
            )
        )
    if not rows:
        reasons = "; ".join(report.skipped.lines()) or "it has a header but no rows"
        raise BadDataError(f"{table.title} has no usable image: {reasons}")
    report.rows = len(rows)
    report.splits.update(row.split for row in rows)
    used = {g: {text for row in rows for text in row.texts.get(g, [])} for g in GRANULARITIES}
    report.texts = {granularity: len(texts) for granularity, texts in used.items() if texts}
    header = ManifestHeader(
        granularities=list(report.texts),
        built={
            "labels": table.file.name,
            **({} if table.file.is_dir() else {"labels_sha256": sha256(table.file)}),
            "explanations_version": known.version,
            "split_by": "patient" if report.without_patient < len(rows) else "image",
            "split_test": test_share,
            "split_val": val_share,
            "split_seed": split_seed,
            **report.skipped.record(),
        },
    )
    write_manifest(out, images, header, rows, force)
    return report


def _labeled(rows: Iterable[LabelRow], skipped: Skipped) -> list[LabelRow]:
    """Return the rows with at least one true label."""
    kept = []
    for row in rows:
        if row.labels:
            kept.append(row)
        else:
            reason = UNCERTAIN if row.uncertain else NO_LABEL
            skipped.add(reason, f"{row.where}: no label is true: unknown, not normal")
    return kept


def _status(row: LabelRow) -> list[str]:
    """Return the status text; none for a normal image with uncertain labels."""
    if row.labels != {NORMAL}:
        return ["abnormal fundus"]
    return [] if row.uncertain else ["normal fundus"]


def _trouble(path: Path) -> str:
    """Return what is wrong with an image's header; empty if it can be read."""
    try:
        check_image_header(path)
    except UserError as error:
        return unnamed(error, path)
    return ""


def _read(table: FundusTable, skipped: Skipped, drawn: bool) -> tuple[FundusTable, list[LabelRow]]:
    """Return the table with its optional columns resolved, and its rows."""
    generic = replace(table, image=IMAGE, keywords=KEYWORDS, source=SOURCE)
    if table.file.is_dir():
        return generic, from_folders(table.dataset, table.file, skipped)
    content = read_table(table.file, "`labels`", skipped, table.reading)
    if table.dataset != GENERIC:
        return generic, as_generic(table.dataset, content, skipped, table.reading)
    columns = Columns(table.image, table.labels, table.binary, table.patient, classes=table.classes)
    columns = columns.of(content, drawn=drawn)
    content.check_columns([("`keywords_column`", table.keywords), ("`source_column`", table.source)])
    settled = replace(
        table,
        keywords=table.keywords or (KEYWORDS if KEYWORDS in content.columns else None),
        source=table.source or (SOURCE if SOURCE in content.columns else None),
    )
    rows = label_rows(content, columns, skipped, table.reading)
    return settled, [
        replace(row, labels=frozenset(map(plain, row.labels)), uncertain=frozenset(map(plain, row.uncertain)))
        for row in rows
    ]


def _keywords(cell: str, not_findings: list[str]) -> list[str]:
    """Return the annotators' phrases that state a finding, without counts, suspicions and remarks on the photograph."""
    phrases = (_CODE.sub("", " ".join(part.casefold().split())) for part in re.split("[,;，；]", cell))
    stated = (p for p in phrases if _PHRASE.match(p) and not p.startswith(_UNSURE) and p not in not_findings)
    return list(dict.fromkeys(stated))
