"""From a table of labels to multiple-choice questions: one true option each, the others not true."""

import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from eval_mcq.items.pictures import unreadable_images
from eval_mcq.items.preset import Disease, Preset, plain
from eval_mcq.items.schema import BenchHeader, MCQItem
from mgll_encoder.common.errors import UserError, unknown_name
from mgll_encoder.common.files import sha256
from mgll_encoder.common.pseudonyms import Pseudonyms
from mgll_encoder.common.skipped import UNREADABLE, Skipped, unnamed
from mgll_encoder.common.splits import assign_split
from mgll_encoder.common.tables import Reading, read_table
from mgll_encoder.data.fundus_layouts import GENERIC, IMAGE, KEYWORDS, LABELS, PATIENT, SOURCE, as_generic
from mgll_encoder.data.label_rows import Columns, agreeing, label_rows, with_files

Split = Literal["train", "test", "all"]

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
    reading: Reading = field(default_factory=Reading)


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
        without_patient: Rows that name no patient: each its own patient.
        skipped: Rows left out, by reason.
    """

    questions: Counter[str] = field(default_factory=Counter)
    negatives: Counter[str] = field(default_factory=Counter)
    patients: Counter[str] = field(default_factory=Counter)
    positions: Counter[int] = field(default_factory=Counter)
    unasked: Counter[str] = field(default_factory=Counter)
    without_patient: int = 0
    skipped: Skipped = field(default_factory=Skipped)


@dataclass(frozen=True)
class _Row:
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
    strict: bool = False,
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
        strict: Stop at the first row that would be left out.

    Raises:
        UserError: the file or a column is missing, a label looks like a misspelt disease, a disease has no image, too
            few distractors or too few negatives; or ``strict`` is set and a row is left out.
    """
    split, draw = split or SplitRule(), draw or Draw()
    if draw.hard and not any(len(group) > 1 for group in preset.confusable):
        raise UserError(f"preset '{preset.name}' lists no confusable diseases: leave --hard-distractors out")
    if not images.is_dir():
        raise UserError(f"image folder {images} does not exist or is not a folder: check --images")
    preset.check_options()
    skipped = Skipped(strict)
    known = frozenset(plain(label) for disease in preset.diseases for label in disease.labels)
    filters = [*preset.where, *(column for d in preset.diseases for column in d.where or {})]
    known |= set(map(plain, preset.other_labels))
    rows = _read(table, images, filters, known, skipped, drawn=split.side != "all")
    if not rows:
        reasons = "; ".join(skipped.lines()) or "it has a header but no rows"
        raise UserError(f"label file {table.path} gives no image: {reasons}")
    report = BuildReport(unasked=_check_labels(table, rows, preset), skipped=skipped)
    report.without_patient = sum(not row.patient for row in rows)
    asked = [
        r for r in rows if split.side in ("all", assign_split(_patient(r), test=split.test, seed=split.seed))
    ]
    asked = _askable(asked, preset, skipped)
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
        **skipped.record(),
    }
    name = preset.name if split.side == "all" else f"{preset.name} ({split.side})"
    return BenchHeader(name=name, categories=[d.name for d in preset.diseases], built=built), items, report


def _read(
    table: LabelTable,
    images: Path,
    filters: Iterable[str],
    known: frozenset[str],
    skipped: Skipped,
    drawn: bool,
) -> list[_Row]:
    """The rows whose image is there, each image once."""
    content = read_table(table.path, "--labels", skipped, table.reading)
    if table.layout != GENERIC:
        found = as_generic(table.layout, content, skipped, table.reading)
        table = replace(table, image=IMAGE, source=SOURCE)
        content = replace(content, columns=(IMAGE, LABELS, PATIENT, SOURCE))
    else:
        columns = Columns(table.image, table.labels, table.binary, table.patient).of(content, drawn=drawn)
        found = label_rows(content, columns, skipped, table.reading, known)
    filtering = (("the preset's 'where'", name) for name in filters)
    content.check_columns([("--source-column", table.source), *filtering])
    return [
        _Row(
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


def _askable(rows: list[_Row], preset: Preset, skipped: Skipped) -> list[_Row]:
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


def _unaskable(row: _Row, preset: Preset) -> tuple[str, str] | None:
    """Why a row gives no fair question, and where."""
    for disease in preset.diseases:
        if not _asked_for([row], disease, preset):
            continue
        fitting = disease.fitting(row.labels)
        if len(fitting) > 1:
            return "two true choices", f"{row.where}: '{fitting[0]}' and '{fitting[1]}' both fit the image"
        if not disease.choices and disease.is_true_of(set(row.labels)):
            pool = len(_distractors(row, disease, preset))
            if pool < preset.options - 1:
                return "too few distractors", (
                    f"{row.where} leaves {pool} distractors for '{disease.name}', {preset.options} options need "
                    f"{preset.options - 1}: ask for fewer with --options, or for more diseases"
                )
    return None


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
                raise UserError(f"{row.where}: {error} (if it is right, a preset must list it)")
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
        negatives[disease.name] = sum(
            not (disease.is_true_of(set(row.labels)) or row.leaves_open(disease)) for row in here
        )
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


def _distractors(row: _Row, disease: Disease, preset: Preset) -> list[Disease]:
    """What may be offered as wrong beside a disease of the image."""
    return [
        other
        for other in preset.against(disease)
        if not other.is_true_of(set(row.labels))
        and not other.is_left_open_by(set(row.labels))
        and not row.leaves_open(other)
        and not (row.words and other.is_mentioned_in(row.words))  # suspected is not absent
    ]


def _label_draft(row: _Row, disease: Disease, preset: Preset, draw: Draw) -> _Draft:
    pool = _distractors(row, disease, preset)
    draft = _Draft(row, disease, disease.option, [])
    chosen = _random(draw.seed, draft.id).sample(pool, len(pool) if draw.hard else preset.options - 1)
    if draw.hard:
        near = preset.confused_with(disease)
        chosen = sorted(chosen, key=lambda other: other.name not in near)[: preset.options - 1]
        _random(draw.seed, f"hard:{draft.id}").shuffle(chosen)  # the near ones do not always stand first
    return replace(draft, others=[other.option for other in chosen])


def _choice_drafts(rows: list[_Row], disease: Disease, seed: int) -> list[_Draft]:
    by_choice: dict[str, list[_Draft]] = defaultdict(list)
    mentioned = {plain(label) for choice in disease.choices for label in (*choice.labels, *choice.without)}
    for row in rows:
        for true in disease.fitting(row.labels) if not row.uncertain & mentioned else ():
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
