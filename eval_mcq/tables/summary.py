"""From the answers of one or more runs to the figures of a table: per disease, macro, micro, and gains."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eval_mcq.records.run_record import ItemAnswer, Run, letter_counts
from eval_mcq.tables import intervals
from eval_mcq.tables.bias_report import Diagnosis, diagnose
from eval_mcq.tables.intervals import FEWEST, Estimate, Floats, Ids, Interval
from eval_mcq.tables.stats import holm, mcnemar, p_of_guessing
from mgll_encoder.common.errors import UserError


@dataclass(frozen=True)
class Cell:
    """Right answers of an arm on a disease, with the interval of their share.

    Attributes:
        right: Number of questions answered right.
        n: Number of questions.
        interval: Of the share, see `eval_mcq.tables.intervals`.
        p_guess: Probability that guessing gets as many right, or more.
        patients: Number of patients (or images) that the questions are about.
        unread: Replies that could not be read.
    """

    right: int
    n: int
    interval: Interval
    p_guess: float
    patients: int
    unread: int = 0

    @property
    def share(self) -> float:
        """Accuracy, 0-1."""
        return self.right / self.n


@dataclass(frozen=True)
class Gain:
    """An arm against the first one on the same questions.

    Attributes:
        estimate: Difference of the shares; None where there are too few patients to tell one.
        p: Exact McNemar.
        p_holm: The same, Holm-adjusted over the diseases of this arm.
        patients: Number of patients (or images) of the questions.
    """

    estimate: Estimate | None
    p: float
    p_holm: float
    patients: int


@dataclass(frozen=True)
class Contrast:
    """A later arm against one that is not the first: what the swap adds to the same retraining without it.

    Attributes:
        name: The arm.
        against: The arm it is compared with.
        macro: Difference of the macro averages; None where there are too few patients.
        micro: Difference of the micro averages, with McNemar over all questions.
    """

    name: str
    against: str
    macro: Estimate | None
    micro: Gain


@dataclass(frozen=True)
class Arm:
    """One model in the table.

    Attributes:
        name: Row or column heading.
        cells: Per disease.
        macro: Unweighted mean over diseases: the "Average" of the table.
        micro: Mean over all questions.
        gains: Per disease against the first arm; empty for the first arm itself.
        macro_gain: Difference of the macro averages; None where there are too few patients.
        micro_gain: Difference of the micro averages, with McNemar over all questions.
        letter_mass: Mean probability on the option letters; None where the scoring mode has none.
        letters: Per letter: how often true, how often chosen.
        p_guess: Probability that guessing gets as many questions right, over all diseases.
        diagnosis: How it chose.
        leak: How much of the bench the model was trained on, in words; empty where nothing is known of that.
    """

    name: str
    cells: dict[str, Cell]
    macro: Estimate
    micro: Estimate
    gains: dict[str, Gain]
    macro_gain: Estimate | None
    micro_gain: Gain | None
    letter_mass: float | None
    letters: dict[str, tuple[int, int]]
    p_guess: float
    diagnosis: Diagnosis
    leak: str = ""


@dataclass(frozen=True)
class Comparison:
    """All figures of a table.

    Attributes:
        bench: Name of the bench.
        mode: Scoring mode.
        prompt: Prompt version.
        categories: Diseases with answers, in table order.
        unanswered: Diseases of the bench without a single answer.
        answered: Number of questions answered.
        questions: Number of questions in the bench.
        clusters: Number of patients (or images).
        chance: Share that guessing gets right, per disease.
        arms: In the order given; the first is what the others are compared with.
        contrasts: Of all pairs of other arms.
        left_out: What the bench was made without, by reason.
    """

    bench: str
    mode: str
    prompt: str
    categories: list[str]
    unanswered: list[str]
    answered: int
    questions: int
    clusters: int
    chance: dict[str, float]
    arms: list[Arm]
    contrasts: list[Contrast]
    left_out: dict[str, int]

    @property
    def macro_chance(self) -> float:
        """Share that guessing gets right, averaged over diseases."""
        return float(np.mean(list(self.chance.values())))

    @property
    def micro_chance(self) -> float:
        """Share that guessing gets right, averaged over questions."""
        cells = self.arms[0].cells
        return sum(self.chance[c] * cells[c].n for c in self.categories) / self.answered


def compare(runs: Mapping[str, Run]) -> Comparison:
    """Figures of runs of the same bench, paired question by question.

    Args:
        runs: Arm name to run; the first is the base of all gains.

    Raises:
        UserError: the runs are of different benches, prompts or scoring modes, or answer different questions.
    """
    first_name, first = next(iter(runs.items()))
    for name, run in runs.items():
        _check_comparable(first_name, first, name, run)
    answers = {name: sorted(run.answers, key=lambda answer: answer.id) for name, run in runs.items()}
    base = answers[first_name]
    present = [answer.category for answer in base]
    categories = [category for category in first.record.categories if category in set(present)]
    right = np.array([[answer.right for answer in of_arm] for of_arm in answers.values()]).T
    places = np.array(present)
    masks = {category: places == category for category in categories}
    _, patients = np.unique([answer.cluster for answer in base], return_inverse=True)
    options = np.array([len(answer.probabilities) for answer in base])
    scores = _Scores(right, masks, patients, options)
    return Comparison(
        bench=first.record.bench_name,
        mode=first.record.mode,
        prompt=first.record.prompt,
        categories=categories,
        unanswered=[category for category in first.record.categories if category not in masks],
        answered=len(base),
        questions=first.record.questions,
        clusters=int(patients.max()) + 1,
        chance={c: float((1 / options[mask]).mean()) for c, mask in masks.items()},
        arms=[_arm(name, a, scores, answers[name], run) for a, (name, run) in enumerate(runs.items())],
        contrasts=[
            scores.contrast(list(runs), against, arm)
            for arm in range(2, len(runs))
            for against in range(1, arm)
        ],
        left_out=first.record.left_out,
    )


def compare_models(models: Mapping[str, Mapping[str, Run]]) -> dict[str, Comparison]:
    """Figures of several models, each against its own first arm, all on the same bench.

    Args:
        models: Model name to its arms.

    Raises:
        UserError: as :func:`compare`, also between models.
    """
    (first_model, first), *others = ((model, next(iter(arms.values()))) for model, arms in models.items())
    for model, run in others:
        _check_comparable(first_model, first, model, run)
    return {model: compare(arms) for model, arms in models.items()}


@dataclass(frozen=True)
class _Scores:
    """Right or wrong, shape ``(questions, arms)``, with the rows of each disease, the patients, and option counts."""

    right: NDArray[np.bool_]
    masks: dict[str, NDArray[np.bool_]]
    patients: Ids
    options: NDArray[np.int_]

    @property
    def all(self) -> NDArray[np.bool_]:
        """All rows."""
        return np.ones(len(self.right), dtype=bool)

    def share(self, arm: int, mask: NDArray[np.bool_]) -> Estimate:
        return intervals.share(self.right[mask, arm], self.patients[mask])

    def macro(self, arm: int) -> Estimate:
        parts = [self.share(arm, mask) for mask in self.masks.values()]
        return self._mean(parts, self.right[:, arm].astype(float))

    def gain(self, arm: int, mask: NDArray[np.bool_], against: int = 0) -> Gain:
        """Of an arm over another. The p-value is not adjusted yet."""
        before, after = self.right[mask, against], self.right[mask, arm]
        p, patients = mcnemar(before, after), len(np.unique(self.patients[mask]))
        estimate = intervals.gain(before, after, self.patients[mask]) if patients >= FEWEST else None
        return Gain(estimate, p, p, patients)

    def macro_gain(self, arm: int, against: int = 0) -> Estimate | None:
        if len(np.unique(self.patients)) < FEWEST:
            return None
        before, after = self.right[:, against], self.right[:, arm]
        parts = [
            intervals.gain(before[mask], after[mask], self.patients[mask]) for mask in self.masks.values()
        ]
        return self._mean(parts, after.astype(float) - before)

    def _mean(self, parts: Sequence[Estimate], values: Floats) -> Estimate:
        masks = self.masks.values()
        return intervals.mean(
            parts, [values[mask] for mask in masks], [self.patients[mask] for mask in masks]
        )

    def contrast(self, names: Sequence[str], against: int, arm: int) -> Contrast:
        macro, micro = self.macro_gain(arm, against), self.gain(arm, self.all, against)
        return Contrast(names[arm], names[against], macro, micro)

    def p_guess(self, arm: int, mask: NDArray[np.bool_]) -> float:
        values, counts = np.unique(self.options[mask], return_counts=True)
        questions = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
        return p_of_guessing(int(self.right[mask, arm].sum()), questions)


def _arm(name: str, a: int, scores: _Scores, answers: Sequence[ItemAnswer], run: Run) -> Arm:
    unread = np.array([answer.unparsed for answer in answers])
    gains: dict[str, Gain] = {}
    macro_gain = micro_gain = None
    if a > 0:
        gains = {c: scores.gain(a, mask) for c, mask in scores.masks.items()}
        adjusted = holm([gain.p for gain in gains.values()])
        gains = {c: replace(gain, p_holm=p) for (c, gain), p in zip(gains.items(), adjusted, strict=True)}
        macro_gain, micro_gain = scores.macro_gain(a), scores.gain(a, scores.all)
    return Arm(
        name=name,
        cells={c: _cell(scores, a, mask, int(unread[mask].sum())) for c, mask in scores.masks.items()},
        macro=scores.macro(a),
        micro=scores.share(a, scores.all),
        gains=gains,
        macro_gain=macro_gain,
        micro_gain=micro_gain,
        letter_mass=_mean([answer.letter_mass for answer in answers]),
        letters=letter_counts(answers),
        p_guess=scores.p_guess(a, scores.all),
        diagnosis=diagnose(run),
        leak=run.record.leak.text if run.record.leak else "",
    )


def _cell(scores: _Scores, a: int, mask: NDArray[np.bool_], unread: int) -> Cell:
    right, n = int(scores.right[mask, a].sum()), int(mask.sum())
    patients = len(np.unique(scores.patients[mask]))
    return Cell(right, n, scores.share(a, mask).interval, scores.p_guess(a, mask), patients, unread)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def as_json(comparison: Comparison) -> dict[str, object]:
    """The figures as plain data for ``summary.json``; shares, 0-1."""
    return asdict(comparison)


def _check_comparable(first_name: str, first: Run, name: str, run: Run) -> None:
    ours, theirs = first.record, run.record
    for what, a, b in (
        ("bench", ours.bench_sha256, theirs.bench_sha256),
        ("prompt", ours.prompt, theirs.prompt),
        ("scoring mode", ours.mode, theirs.mode),
        ("number of rotations", str(ours.rotations), str(theirs.rotations)),
    ):
        if a != b:
            raise UserError(
                f"runs '{first_name}' ({first.folder}) and '{name}' ({run.folder}) differ in their {what} "
                f"({a[:12]}, {b[:12]}; bench files {ours.bench}, {theirs.bench}): run both on the same"
            )
    missing = {answer.id for answer in first.answers} ^ {answer.id for answer in run.answers}
    if missing:
        raise UserError(
            f"runs '{first_name}' and '{name}' answer different questions ({len(first.answers)} and "
            f"{len(run.answers)} answers; only one has '{min(missing)}'): finish both by starting them again"
        )
    images = {answer.id: answer.images_sha256 for answer in first.answers}
    changed = [answer.id for answer in run.answers if images[answer.id] != answer.images_sha256]
    if changed:
        raise UserError(f"runs '{first_name}' and '{name}' saw different images for question '{changed[0]}'")
