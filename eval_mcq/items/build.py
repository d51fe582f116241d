"""From a table of labels to multiple-choice questions: one true option each, the others not true."""

import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from eval_mcq.items.pictures import check_images
from eval_mcq.items.preset import Disease, Preset, plain
from eval_mcq.items.schema import BenchHeader, MCQItem
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.files import sha256
from mgll_encoder.common.pseudonyms import Pseudonyms
from mgll_encoder.common.splits import assign_split
from mgll_encoder.common.tables import read_table
from mgll_encoder.data.fundus_layouts import GENERIC, IMAGE, KEYWORDS, LABELS, PATIENT, SOURCE, as_generic

Split = Literal["train", "test", "all"]

TYPO_CUTOFF = 0.85
"""difflib ratio from which a label outside the preset counts as a misspelt disease."""


@dataclass(frozen=True)
class LabelTable:
    """Which columns of a label file mean what.

    Attributes:
        path: CSV file with a header line.
        image: Column with the image path below the image folder.
        labels: Column with the labels, separated by ``;``; or several columns of 0 and 1 with commas between, each
            the label of its name.
        patient: Column with the patient or source id; without it every image is a patient of its own.
        source: Column with the name of the data set.
        layout: Published layout of the file instead of these columns, or ``generic``.
    """

    path: Path
    image: str = "file"
    labels: str = "labels"
    patient: str | None = None
    source: str | None = None
    layout: str = GENERIC


@dataclass(frozen=True)
class Draw:
    """How distractors and positions are drawn.

    Attributes:
        seed: Of distractors and positions (not of the split).
        hard: Prefer distractors from the groups of confusable diseases that the preset lists.
        min_negatives: A disease is refused if fewer images do not have it: its name would be the answer
            whenever it is offered.
    """

    seed: int = 0
    hard: bool = False
    min_negatives: int = 5


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
        negatives: Images asked that do not have the disease, per disease.
        patients: Per disease.
        positions: How often each position holds the true option.
        unasked: Labels outside the preset, with their number of rows.
        without_patient: Rows whose patient column is blank: each its own patient.
    """

    questions: Counter[str] = field(default_factory=Counter)
    negatives: Counter[str] = field(default_factory=Counter)
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
    words: str
    columns: dict[str, str]


@dataclass(frozen=True)
class _Draft:
    row: _Row
    disease: Disease
    true: str
    others: list[str]

    @property
    def id(self) -> str:
        """What draws are seeded by; the question's own id holds a pseudonym in the image's place."""
        return f"{self.row.image}#{self.disease.name}"


def build(
    table: LabelTable,
    images: Path,
    bench: Path,
    preset: Preset,
    split: SplitRule | None = None,
    draw: Draw | None = None,
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
        draw: How distractors and positions are drawn.

    Raises:
        UserError: the file or a column is missing, a label looks like a misspelt disease, an image is listed
            twice, missing or unreadable, a disease has no image, too few distractors or too few negatives.
    """
    split, draw = split or SplitRule(), draw or Draw()
    if draw.hard and not any(len(group) > 1 for group in preset.confusable):
        raise UserError(f"preset '{preset.name}' lists no confusable diseases: leave --hard-distractors out")
    if not images.is_dir():
        raise UserError(f"image folder {images} does not exist or is not a folder: check --images")
    rows = _read(table, [*preset.where, *(column for d in preset.diseases for column in d.where or {})])
    report = BuildReport(unasked=_check_labels(table, rows, preset))
    report.without_patient = sum(not row.patient for row in rows) if table.patient else 0
    asked = [
        r for r in rows if split.side in ("all", assign_split(_patient(r), test=split.test, seed=split.seed))
    ]
    drafts = [
        draft for disease in preset.diseases for draft in _drafts(asked, disease, preset, split, table, draw)
    ]
    report.negatives = _negatives(asked, preset, table, draw)
    positions = _deal_positions(drafts, draw.seed)

    folder, pseudonyms = bench.resolve().parent, Pseudonyms(table.path)
    items = []
    order = {row.image: place for place, row in enumerate(rows)}
    for draft in sorted(drafts, key=lambda d: order[d.row.image]):
        position = positions[draft.id]
        options = [*draft.others[:position], draft.true, *draft.others[position:]]
        row = draft.row
        path = Path(os.path.relpath((images / row.image).resolve(), folder))
        items.append(
            MCQItem(
                id=f"{pseudonyms.file(row.image)}#{draft.disease.name}", images=[path.as_posix()],
                question=draft.disease.question or preset.question,
                options=options, answer=position, category=draft.disease.name, source=row.source,
                patient=pseudonyms.patient(row.patient) if row.patient else "",
            )
        )  # fmt: skip
        report.questions[draft.disease.name] += 1
        report.positions[position] += 1
    check_images({(folder / item.images[0]).resolve(): item.id for item in reversed(items)})
    report.patients = Counter(category for category, _ in {(i.category, i.cluster) for i in items})
    built = {
        "preset": preset.name,
        "preset_version": preset.version,
        "options": preset.options,
        "hard_distractors": draw.hard,
        "seed": draw.seed,
        "split": split.side,
        "split_by": "patient" if any(row.patient for row in rows) else "image",
        "test_share": split.test,
        "split_seed": split.seed,
        "labels": table.path.name,
        "labels_sha256": sha256(table.path),
    }
    name = preset.name if split.side == "all" else f"{preset.name} ({split.side})"
    return BenchHeader(name=name, categories=[d.name for d in preset.diseases], built=built), items, report


def _read(table: LabelTable, filters: Iterable[str]) -> list[_Row]:
    content = read_table(table.path, "--labels")
    records = content.rows
    if table.layout != GENERIC:
        records = as_generic(table.layout, content)
        table = replace(table, image=IMAGE, labels=LABELS, patient=PATIENT, source=SOURCE)
        content = replace(content, columns=(IMAGE, LABELS, PATIENT, SOURCE))
    label_columns = [name.strip() for name in table.labels.split(",")]
    wanted = [
        ("--image-column", table.image), *(("--labels-column", name) for name in label_columns),
        ("--patient-column", table.patient), ("--source-column", table.source),
        *(("the preset's 'where'", name) for name in filters),
    ]  # fmt: skip
    content.check_columns(wanted)
    if not records:
        raise UserError(f"label file {table.path} has a header but no rows")
    rows: list[_Row] = []
    first: dict[str, int] = {}
    for number, record in records:
        image = record[table.image].strip()
        if not image:
            raise UserError(f"label file {table.path} row {number}: column '{table.image}' is blank")
        if image in first:
            raise UserError(
                f"label file {table.path} row {number}: image '{image}' is already in row {first[image]}; "
                "put all its labels in one row, separated by ';'"
            )
        first[image] = number
        labels = _labels(record, label_columns, table.path, number)
        patient = record[table.patient].strip() if table.patient else ""
        source = record[table.source].strip() if table.source else ""
        words = plain(record.get(KEYWORDS, ""))
        rows.append(_Row(number, image, labels, patient, source, words, record))
    return rows


def _labels(record: dict[str, str], columns: Sequence[str], path: Path, number: int) -> frozenset[str]:
    if len(columns) == 1:
        return frozenset(plain(label) for label in record[columns[0]].split(";") if label.strip())
    for column in columns:
        if record[column].strip() not in ("0", "1"):
            raise UserError(
                f"label file {path} row {number}: column '{column}' is '{record[column]}', expected 0 or 1"
            )
    return frozenset(plain(column) for column in columns if record[column].strip() == "1")


def _check_labels(table: LabelTable, rows: list[_Row], preset: Preset) -> Counter[str]:
    """Count the labels that are outside the preset; a near miss of one inside it is a mistake."""
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
                raise UserError(
                    f"label file {table.path} row {row.number}: {error} (if it is right, a preset must list it)"
                )
    return unasked


def _patient(row: _Row) -> str:
    return row.patient or row.image


def _asked_for(rows: Sequence[_Row], disease: Disease, preset: Preset) -> list[_Row]:
    where = preset.where if disease.where is None else disease.where
    return [row for row in rows if all(row.columns[column] == value for column, value in where.items())]


def _negatives(rows: Sequence[_Row], preset: Preset, table: LabelTable, draw: Draw) -> Counter[str]:
    """Images without each disease, among those that are asked about it.

    Raises:
        UserError: there are too few.
    """
    negatives: Counter[str] = Counter()
    for disease in preset.diseases:
        here = _asked_for(rows, disease, preset)
        negatives[disease.name] = sum(not disease.is_true_of(set(row.labels)) for row in here)
        if not disease.choices and negatives[disease.name] < draw.min_negatives:
            raise UserError(
                f"disease '{disease.name}' is absent from {negatives[disease.name]} of the {len(here)} images of "
                f"{table.path}, at least {draw.min_negatives} must not have it: add images, leave it out with "
                "--diseases, or lower --min-negatives"
            )
    return negatives


def _drafts(
    rows: list[_Row], disease: Disease, preset: Preset, split: SplitRule, table: LabelTable, draw: Draw
) -> list[_Draft]:
    here = _asked_for(rows, disease, preset)
    if disease.choices:
        drafts = _choice_drafts(here, disease, draw.seed)
        missing = {choice.text for choice in disease.choices} - {draft.true for draft in drafts}
    else:
        drafts = [
            _label_draft(row, disease, preset, draw) for row in here if disease.is_true_of(set(row.labels))
        ]
        missing = set() if drafts else {disease.option}
    if missing:
        where = preset.where if disease.where is None else disease.where
        among = f" where {', '.join(f'{c}={v}' for c, v in where.items())}" if where else ""
        raise UserError(
            f"disease '{disease.name}' has no image labelled '{min(missing)}' among the {len(here)} rows "
            f"of {table.path}{among} (split: {split.side}): leave it out with --diseases, or check --labels-column"
        )
    return drafts


def _label_draft(row: _Row, disease: Disease, preset: Preset, draw: Draw) -> _Draft:
    pool = [
        other
        for other in preset.diseases
        if not other.choices  # asked within its own source only
        and not other.is_true_of(set(row.labels))
        and not other.is_left_open_by(set(row.labels))
        and not (row.words and other.is_mentioned_in(row.words))  # suspected is not absent
        and other.name not in disease.not_against
        and disease.name not in other.not_against
    ]
    if len(pool) < preset.options - 1:
        raise UserError(
            f"image '{row.image}' leaves {len(pool)} distractors for '{disease.name}', "
            f"{preset.options} options need {preset.options - 1}: ask for fewer with --options, or for more diseases"
        )
    draft = _Draft(row, disease, disease.option, [])
    chosen = _random(draw.seed, draft.id).sample(pool, len(pool) if draw.hard else preset.options - 1)
    if draw.hard:
        near = preset.confused_with(disease)
        chosen = sorted(chosen, key=lambda other: other.name not in near)[: preset.options - 1]
        _random(draw.seed, f"hard:{draft.id}").shuffle(chosen)  # the near ones do not always stand first
    return replace(draft, others=[other.option for other in chosen])


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
