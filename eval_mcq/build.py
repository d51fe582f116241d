"""From a table of labels to multiple-choice questions: one true option each, the others not true."""

import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from eval_mcq.pictures import check_images
from eval_mcq.preset import Disease, Preset, plain
from eval_mcq.schema import BenchHeader, MCQItem
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.files import sha256
from mgll_encoder.common.splits import assign_split
from mgll_encoder.common.tables import check_columns, read_table

Split = Literal["train", "test", "all"]

TYPO_CUTOFF = 0.85
"""difflib ratio from which a label outside the preset counts as a misspelt disease."""


@dataclass(frozen=True)
class LabelTable:
    """Which columns of a label file mean what.

    Attributes:
        path: CSV file with a header line.
        image: Column with the image path below the image folder.
        labels: Column with the labels, separated by ``;``.
        patient: Column with the patient or source id; without it every image is a patient of its own.
        source: Column with the name of the data set.
    """

    path: Path
    image: str = "file"
    labels: str = "labels"
    patient: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class SplitRule:
    """Which patients are asked: those that ``assign_split`` puts on one side, or all."""

    side: Split = "all"
    test: float = 0.3
    seed: int = 0


@dataclass
class BuildReport:
    """What went into a bench.

    Attributes:
        questions: Per disease.
        patients: Per disease.
        positions: How often each position holds the true option.
        unasked: Labels outside the preset, with their number of rows.
        without_patient: Rows whose patient column is blank: each its own patient.
    """

    questions: Counter[str] = field(default_factory=Counter)
    patients: Counter[str] = field(default_factory=Counter)
    positions: Counter[int] = field(default_factory=Counter)
    unasked: Counter[str] = field(default_factory=Counter)
    without_patient: int = 0


@dataclass(frozen=True)
class _Row:
    number: int
    image: str
    labels: frozenset[str]
    patient: str
    source: str
    columns: dict[str, str]


@dataclass(frozen=True)
class _Draft:
    row: _Row
    disease: Disease
    true: str
    others: list[str]

    @property
    def id(self) -> str:
        return f"{self.row.image}#{self.disease.name}"


def build(
    table: LabelTable,
    images: Path,
    bench: Path,
    preset: Preset,
    split: SplitRule | None = None,
    seed: int = 0,
) -> tuple[BenchHeader, list[MCQItem], BuildReport]:
    """Make questions from labels. Nothing is written.

    An image with several diseases of the preset gives one question for each of them; the others never stand
    among its distractors. Distractors depend on the seed and the question alone, so new rows change no old
    question's; the true options are dealt evenly over the positions within each disease.

    Args:
        table: The label file.
        images: Folder that the image column is relative to.
        bench: Where the bench file will lie; image paths are written relative to its folder.
        preset: Diseases, question and options.
        split: Which patients to ask; all by default.
        seed: Draws distractors and positions (not the split).

    Raises:
        UserError: the file or a column is missing, a label looks like a misspelt disease, an image is listed
            twice, missing or unreadable, a disease has no image or too few distractors.
    """
    split = split or SplitRule()
    if not images.is_dir():
        raise UserError(f"image folder {images} does not exist or is not a folder: check --images")
    rows = _read(table, [*preset.where, *(column for d in preset.diseases for column in d.where or {})])
    report = BuildReport(unasked=_check_labels(table.path, rows, preset))
    report.without_patient = sum(not row.patient for row in rows) if table.patient else 0
    asked = [
        r for r in rows if split.side in ("all", assign_split(_patient(r), test=split.test, seed=split.seed))
    ]
    drafts = [
        draft for disease in preset.diseases for draft in _drafts(asked, disease, preset, split, table, seed)
    ]
    positions = _deal_positions(drafts, seed)

    folder = bench.resolve().parent
    items = []
    order = {row.number: place for place, row in enumerate(rows)}
    for draft in sorted(drafts, key=lambda d: order[d.row.number]):
        position = positions[draft.id]
        options = [*draft.others[:position], draft.true, *draft.others[position:]]
        path = Path(os.path.relpath((images / draft.row.image).resolve(), folder))
        items.append(
            MCQItem(
                id=draft.id, images=[path.as_posix()], question=draft.disease.question or preset.question,
                options=options, answer=position, category=draft.disease.name,
                source=draft.row.source, patient=draft.row.patient,
            )
        )  # fmt: skip
        report.questions[draft.disease.name] += 1
        report.positions[position] += 1
    check_images({(folder / item.images[0]).resolve(): item.id for item in reversed(items)})
    report.patients = Counter(category for category, _ in {(i.category, i.cluster) for i in items})
    built = {
        "preset": preset.name,
        "seed": seed,
        "split": split.side,
        "test_share": split.test,
        "split_seed": split.seed,
        "labels": table.path.name,
        "labels_sha256": sha256(table.path),
    }
    name = preset.name if split.side == "all" else f"{preset.name} ({split.side})"
    return BenchHeader(name=name, categories=[d.name for d in preset.diseases], built=built), items, report


def _read(table: LabelTable, filters: Iterable[str]) -> list[_Row]:
    records, found = read_table(table.path, "--labels")
    wanted = {
        "--image-column": table.image, "--labels-column": table.labels,
        "--patient-column": table.patient, "--source-column": table.source,
    }  # fmt: skip
    check_columns(table.path, found, [*wanted.items(), *(("the preset's 'where'", name) for name in filters)])
    if not records:
        raise UserError(f"label file {table.path} has a header but no rows")
    rows: list[_Row] = []
    first: dict[str, int] = {}
    for number, record in enumerate(records, start=2):
        image = record[table.image].strip()
        if not image:
            raise UserError(f"label file {table.path} row {number}: column '{table.image}' is blank")
        if image in first:
            raise UserError(
                f"label file {table.path} row {number}: image '{image}' is already in row {first[image]}; "
                "put all its labels in one row, separated by ';'"
            )
        first[image] = number
        labels = frozenset(plain(label) for label in record[table.labels].split(";") if label.strip())
        patient = record[table.patient].strip() if table.patient else ""
        source = record[table.source].strip() if table.source else ""
        rows.append(_Row(number, image, labels, patient, source, record))
    return rows


def _check_labels(path: Path, rows: list[_Row], preset: Preset) -> Counter[str]:
    """Count the labels that are outside the preset; a near miss of one inside it is a mistake."""
    known = {plain(label) for disease in preset.diseases for label in disease.labels}
    passed = known | {plain(label) for label in preset.other_labels}
    unasked: Counter[str] = Counter()
    for row in rows:
        for label in sorted(row.labels - known):
            unasked[label] += 1
            if (
                unasked[label] == 1
                and label not in passed
                and get_close_matches(label, known, 1, TYPO_CUTOFF)
            ):
                error = unknown_name("disease", label, known)
                raise UserError(
                    f"label file {path} row {row.number}: {error} (if it is right, a preset must list it)"
                )
    return unasked


def _patient(row: _Row) -> str:
    return row.patient or row.image


def _drafts(
    rows: list[_Row], disease: Disease, preset: Preset, split: SplitRule, table: LabelTable, seed: int
) -> list[_Draft]:
    where = preset.where if disease.where is None else disease.where
    here = [row for row in rows if all(row.columns[column] == value for column, value in where.items())]
    if disease.choices:
        drafts = _choice_drafts(here, disease, seed)
        missing = {choice.text for choice in disease.choices} - {draft.true for draft in drafts}
    else:
        drafts = [
            _label_draft(row, disease, preset, seed) for row in here if disease.is_true_of(set(row.labels))
        ]
        missing = set() if drafts else {disease.option}
    if missing:
        among = f" where {', '.join(f'{c}={v}' for c, v in where.items())}" if where else ""
        raise UserError(
            f"disease '{disease.name}' has no image labelled '{min(missing)}' among the {len(here)} rows "
            f"of {table.path}{among} (split: {split.side}): leave it out with --diseases, or check --labels-column"
        )
    return drafts


def _label_draft(row: _Row, disease: Disease, preset: Preset, seed: int) -> _Draft:
    pool = [
        other.option
        for other in preset.diseases
        if not other.choices  # asked within its own source only
        and not other.is_true_of(set(row.labels))
        and other.name not in disease.not_against
        and disease.name not in other.not_against
    ]
    if len(pool) < preset.options - 1:
        raise UserError(
            f"image '{row.image}' leaves {len(pool)} distractors for '{disease.name}', "
            f"{preset.options} options need {preset.options - 1}: ask for fewer with --options, or for more diseases"
        )
    draft = _Draft(row, disease, disease.option, [])
    return _Draft(row, disease, disease.option, _random(seed, draft.id).sample(pool, preset.options - 1))


def _choice_drafts(rows: list[_Row], disease: Disease, seed: int) -> list[_Draft]:
    by_choice: dict[str, list[_Draft]] = defaultdict(list)
    for row in rows:
        fitting = [choice.text for choice in disease.choices if choice.fits(set(row.labels))]
        if len(fitting) > 1:
            raise UserError(
                f"disease '{disease.name}': '{fitting[0]}' and '{fitting[1]}' both fit image '{row.image}'"
            )
        for true in fitting:
            others = [choice.text for choice in disease.choices if choice.text != true]
            draft = _Draft(row, disease, true, others)
            _random(seed, draft.id).shuffle(others)
            by_choice[true].append(draft)
    if disease.balance and by_choice:
        least = min(len(by_choice[choice.text]) for choice in disease.choices)
        by_choice = {true: _shuffled(drafts, seed)[:least] for true, drafts in by_choice.items()}
    return [draft for drafts in by_choice.values() for draft in drafts]


def _deal_positions(drafts: list[_Draft], seed: int) -> dict[str, int]:
    """Position of the true option per question: even within each disease and over all."""
    positions: dict[str, int] = {}
    dealt: Counter[int] = Counter()
    groups: dict[tuple[str, str], list[_Draft]] = defaultdict(list)
    for draft in drafts:
        groups[draft.disease.name, draft.true].append(draft)
    for group in groups.values():
        for draft in _shuffled(group, seed):
            options = len(draft.others) + 1
            positions[draft.id] = dealt[options] % options
            dealt[options] += 1
    return positions


def _shuffled(drafts: list[_Draft], seed: int) -> list[_Draft]:
    return sorted(drafts, key=lambda draft: _random(seed, f"order:{draft.id}").random())


def _random(seed: int, what: str) -> random.Random:
    return random.Random(f"{seed}:{what}")
