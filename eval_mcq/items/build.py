"""Build multiple-choice questions from a table of labels: one true option each, the others false."""

import os
import random
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from eval_mcq.items.askable_rows import AskedRow, askable, check_labels, read_rows
from eval_mcq.items.askable_rows import LabelTable as LabelTable
from eval_mcq.items.preset import Disease, Preset
from eval_mcq.items.schema import BenchHeader, MCQItem
from mgll_encoder.common.errors import BadDataError, NotFoundError
from mgll_encoder.common.files import sha256
from mgll_encoder.common.pseudonyms import Pseudonyms
from mgll_encoder.common.skipped import Skipped
from mgll_encoder.common.splits import assign_split
from mgll_encoder.data.label_cells import plain

Split = Literal["train", "test", "all"]


@dataclass(frozen=True)
class Draw:
    """How distractors and positions are sampled.

    Attributes:
        seed: Seed of distractors and positions (not of the split).
        hard: Prefer distractors from the preset's groups of confusable diseases.
        min_negatives: Minimum number of images without a disease; with fewer, its name would be the answer whenever
            it is offered, so the disease is refused.
    """

    seed: int = 0
    hard: bool = False
    min_negatives: int = 5


@dataclass(frozen=True)
class SplitRule:
    """Which patients to use: those that ``assign_split`` puts into one split, or all."""

    side: Split = "all"
    test: float = 0.3
    seed: int = 0


@dataclass
class BuildReport:
    """Contents of a benchmark that was built.

    Attributes:
        categories: Diseases of the preset, in its order.
        questions: Questions per disease.
        negatives: Images in use without the disease, per disease.
        patients: Patients per disease.
        positions: Number of questions per position of the true option.
        images: Images that the questions show.
        on_sheet: How many of them the contact sheet shows.
        unasked: Labels that no question asks about, with their number of rows.
        without_patient: Rows without a patient id: each counts as its own patient.
        skipped: Skipped rows, by reason.
    """

    categories: list[str]
    questions: Counter[str] = field(default_factory=Counter)
    negatives: Counter[str] = field(default_factory=Counter)
    patients: Counter[str] = field(default_factory=Counter)
    positions: Counter[int] = field(default_factory=Counter)
    images: int = 0
    on_sheet: int = 0
    unasked: Counter[str] = field(default_factory=Counter)
    without_patient: int = 0
    skipped: Skipped = field(default_factory=Skipped)


@dataclass(frozen=True)
class _Draft:
    row: AskedRow
    disease: Disease
    true: str
    others: list[str]

    @property
    def id(self) -> str:
        """Seed of the random choices; the question's own id contains a pseudonym instead of the image."""
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
    """Build questions from labels. Nothing is written.

    An image with several diseases of the preset gives one question for each of them; the others are never among its
    distractors. Distractors depend only on the seed and the question, so new rows do not change existing questions; the
    true options are distributed evenly over the positions within each disease.

    Args:
        table: The label file.
        images: Folder that the image column is relative to.
        bench: Path of the benchmark file to be written; image paths are relative to its folder.
        preset: Diseases, question and options.
        split: Which patients to use; all by default.
        draw: How distractors and positions are sampled.
        strict: Stop at the first row that would be skipped.

    Raises:
        UserError: the file or a column is missing, a label looks like a misspelled disease, a disease has no image, too
            few distractors or too few negatives; or ``strict`` is set and a row is skipped.
    """
    split, draw = split or SplitRule(), draw or Draw()
    if draw.hard and not any(len(group) > 1 for group in preset.confusable):
        raise BadDataError(
            f"preset '{preset.name}' lists no confusable diseases: leave `hard_distractors` out"
        )
    if not images.is_dir():
        raise NotFoundError(f"image folder {images} does not exist or is not a folder: check `images`")
    preset.check_options()
    skipped = Skipped(strict)
    rows = read_rows(table, images, preset, skipped, drawn=split.side != "all")
    categories = [disease.name for disease in preset.diseases]
    report = BuildReport(categories, unasked=check_labels(table, rows, preset), skipped=skipped)
    report.without_patient = sum(not row.patient for row in rows)
    asked = [
        r for r in rows if split.side in ("all", assign_split(r.split_by, test=split.test, seed=split.seed))
    ]
    asked = askable(asked, preset, skipped)
    drafted = {disease.name: _drafts(asked, disease, preset, draw) for disease in preset.diseases}
    report.negatives = _negatives(asked, preset)
    if faults := _faults(asked, drafted, report.negatives, preset, draw):
        raise _unaskable(f"{table.path} (split: {split.side})", faults, preset)
    drafts = [draft for of_disease in drafted.values() for draft in of_disease]
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
    return BenchHeader(name=name, categories=categories, built=built), items, report


def _negatives(rows: Sequence[AskedRow], preset: Preset) -> Counter[str]:
    """Images without each disease, among those that are asked about it."""
    negatives: Counter[str] = Counter()
    for disease in preset.diseases:
        negatives[disease.name] = sum(
            not (disease.is_true_of(set(row.labels)) or row.leaves_open(disease))
            for row in rows
            if row.is_asked(disease, preset)
        )
    return negatives


def _drafts(rows: Sequence[AskedRow], disease: Disease, preset: Preset, draw: Draw) -> list[_Draft]:
    here = [row for row in rows if row.is_asked(disease, preset)]
    if disease.choices:
        return _choice_drafts(here, disease, draw.seed)
    return [_label_draft(row, disease, preset, draw) for row in here if disease.is_true_of(set(row.labels))]


def _faults(
    rows: Sequence[AskedRow],
    drafted: Mapping[str, Sequence[_Draft]],
    negatives: Mapping[str, int],
    preset: Preset,
    draw: Draw,
) -> dict[str, str]:
    """Return diseases without images, or with too few images that do not have them, and what is wrong with each."""
    faults: dict[str, str] = {}
    for disease in preset.diseases:
        count = sum(row.is_asked(disease, preset) for row in rows)
        expected = {choice.text for choice in disease.choices} or {disease.option}
        if missing := expected - {draft.true for draft in drafted[disease.name]}:
            where = preset.where if disease.where is None else disease.where
            among = f" where {', '.join(f'{c}={v}' for c, v in where.items())}" if where else ""
            faults[disease.name] = f"has no image labeled '{min(missing)}' among the {count} rows{among}"
        elif not disease.choices and negatives[disease.name] < draw.min_negatives:
            faults[disease.name] = (
                f"is absent from {negatives[disease.name]} of the {count} images, at least "
                f"{draw.min_negatives} must not have it (`min_negatives`)"
            )
    return faults


def _unaskable(where: str, faults: Mapping[str, str], preset: Preset) -> BadDataError:
    """Return the refusal of a table with such diseases; all are named at once."""
    found = "; ".join(f"disease '{name}' {fault}" for name, fault in faults.items())
    left = ",".join(disease.name for disease in preset.diseases if disease.name not in faults)
    advice = f"ask about the others with `diseases={shlex.quote(left)}`" if "," in left else "add images"
    return BadDataError(f"{where}: {found}; {advice}, or check `labels_column`")


def _label_draft(row: AskedRow, disease: Disease, preset: Preset, draw: Draw) -> _Draft:
    pool = row.distractors(disease, preset)
    draft = _Draft(row, disease, disease.option, [])
    chosen = _random(draw.seed, draft.id).sample(pool, len(pool) if draw.hard else preset.options - 1)
    if draw.hard:
        near = preset.confused_with(disease)
        chosen = sorted(chosen, key=lambda other: other.name not in near)[: preset.options - 1]
        _random(draw.seed, f"hard:{draft.id}").shuffle(
            chosen
        )  # so that the confusable ones are not always first
    return replace(draft, others=[other.option for other in chosen])


def _choice_drafts(rows: list[AskedRow], disease: Disease, seed: int) -> list[_Draft]:
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
    """Assign positions of the true option to questions, evenly within each disease and over all."""
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
