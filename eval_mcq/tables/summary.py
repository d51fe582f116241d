"""Statistics of one or more runs for a table: per disease, macro, micro, and gains."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eval_mcq.records.answer import Answer, ItemAnswer, letter_counts
from eval_mcq.records.run_record import Run
from eval_mcq.tables import intervals
from eval_mcq.tables.bias_report import diagnose
from eval_mcq.tables.intervals import FEWEST, Estimate, Floats, Ids
from eval_mcq.tables.results import Arm, Average, Cell, Comparison, Contrast, Gain
from eval_mcq.tables.stats import holm, mcnemar, p_of_guessing
from mgll_encoder.common.errors import InvalidArgumentError, MismatchError


def compare(runs: Mapping[str, Run], control: str | None = None) -> Comparison:
    """Compare runs of the same benchmark, paired question by question.

    Args:
        runs: Arm name -> run.
        control: Name of the arm with the same training as the others, but without what they test: their gains are
            against it, its own against the first arm. None for the arm named `CONTROL`; without one all gains are
            against the first arm.

    Raises:
        UserError: the runs have different benchmarks, prompts or scoring modes, or answer different questions, or no
            arm is named ``control``.
    """
    first_name, first = next(iter(runs.items()))
    for name, run in runs.items():
        _check_comparable(first_name, first, name, run)
    names = list(runs)
    references = _references(names, control)
    answers = {name: sorted(run.answers, key=lambda answer: answer.id) for name, run in runs.items()}
    base = answers[first_name]
    present = {answer.category for answer in base}
    categories = [category for category in first.record.categories if category in present]
    scores = _Scores.of(base, [[a.right for a in of_arm] for of_arm in answers.values()], categories)
    orders = max(len(answer.rows) for answer in base)
    every_order = one_order = None
    if orders > 1:
        every_order = _Scores.of(
            base, [[a.all_right for a in of_arm] for of_arm in answers.values()], categories
        )
        rows = [[row for answer in of_arm for row in answer.rows] for of_arm in answers.values()]
        one_order = _Scores.of(rows[0], [[row.right for row in of_arm] for of_arm in rows], categories)
    told = {(arm, reference) for arm, reference in enumerate(references) if reference is not None}
    return Comparison(
        bench=first.record.bench_name,
        mode=first.record.mode,
        prompt=first.record.prompt,
        categories=categories,
        unanswered=[category for category in first.record.categories if category not in present],
        answered=len(base),
        questions=first.record.questions,
        clusters=len(np.unique(scores.patients)),
        orders=orders,
        chance={c: float((1 / scores.options[mask]).mean()) for c, mask in scores.masks.items()},
        chance_every_order=scores.macro_of(np.array([a.chance ** len(a.rows) for a in base])),
        arms=[
            _arm(names, a, references[a], (scores, one_order, every_order), answers[name], run)
            for a, (name, run) in enumerate(runs.items())
        ],
        contrasts=[
            scores.contrast(names, against, arm)
            for arm in range(1, len(runs))
            for against in range(arm)
            if not {(arm, against), (against, arm)} & told
        ],
        left_out=first.record.left_out,
    )


CONTROL = "control"
"""An arm with this name is the control, unless another one is given."""


def _references(names: Sequence[str], control: str | None) -> list[int | None]:
    """Return the index of each arm's reference; None for the first arm."""
    if control is not None and control not in names:
        raise InvalidArgumentError(
            f"no arm is named '{control}' (the control): the arms are {', '.join(names)}"
        )
    name = control or CONTROL
    reference = names.index(name) if name in names else 0
    return [None, *(0 if arm == reference else reference for arm in range(1, len(names)))]


def compare_models(
    models: Mapping[str, Mapping[str, Run]], control: str | None = None
) -> dict[str, Comparison]:
    """Compare the arms of several models, all on the same benchmark.

    Args:
        models: Model name -> its arms.
        control: As for :func:`compare`, in each model.

    Raises:
        UserError: as :func:`compare`, also between models.
    """
    (first_model, first), *others = ((model, next(iter(arms.values()))) for model, arms in models.items())
    for model, run in others:
        _check_comparable(first_model, first, model, run)
    return {model: compare(arms, control) for model, arms in models.items()}


@dataclass(frozen=True)
class _Scores:
    """Right or wrong, shape ``(questions, arms)``, with the rows of each disease, the patients, and option counts."""

    right: NDArray[np.bool_]
    masks: dict[str, NDArray[np.bool_]]
    patients: Ids
    options: NDArray[np.int_]

    @classmethod
    def of(
        cls, asked: Sequence[ItemAnswer | Answer], right: Sequence[Sequence[bool]], categories: Sequence[str]
    ) -> "_Scores":
        """Build from questions, or from questions in one order each; ``right`` has shape ``(arms, questions)``."""
        places = np.array([answer.category for answer in asked])
        _, patients = np.unique([answer.cluster for answer in asked], return_inverse=True)
        options = np.array([len(answer.probabilities) for answer in asked])
        return cls(np.array(right).T, {c: places == c for c in categories}, patients, options)

    @property
    def all(self) -> NDArray[np.bool_]:
        """All rows."""
        return np.ones(len(self.right), dtype=bool)

    def share(self, arm: int, mask: NDArray[np.bool_]) -> Estimate:
        return intervals.share(self.right[mask, arm], self.patients[mask])

    def macro_of(self, values: Floats) -> float:
        """Average a value per question over diseases."""
        return float(np.mean([values[mask].mean() for mask in self.masks.values()]))

    def average(self, arm: int, against: int | None) -> Average:
        return Average(self.macro(arm), None if against is None else self.macro_gain(arm, against))

    def macro(self, arm: int) -> Estimate:
        parts = [self.share(arm, mask) for mask in self.masks.values()]
        return self._mean(parts, self.right[:, arm].astype(float))

    def gain(self, arm: int, against: int, mask: NDArray[np.bool_]) -> Gain:
        """Compute the gain of an arm over another; the p-value is not adjusted yet."""
        before, after = self.right[mask, against], self.right[mask, arm]
        p, patients = mcnemar(before, after), len(np.unique(self.patients[mask]))
        estimate = intervals.gain(before, after, self.patients[mask]) if patients >= FEWEST else None
        return Gain(estimate, p, p, patients)

    def macro_gain(self, arm: int, against: int) -> Estimate | None:
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
        macro, micro = self.macro_gain(arm, against), self.gain(arm, against, self.all)
        return Contrast(names[arm], names[against], macro, micro)

    def p_guess(self, arm: int, mask: NDArray[np.bool_]) -> float:
        values, counts = np.unique(self.options[mask], return_counts=True)
        questions = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
        return p_of_guessing(int(self.right[mask, arm].sum()), questions)


def _arm(
    names: Sequence[str],
    a: int,
    against: int | None,
    markings: "tuple[_Scores, _Scores | None, _Scores | None]",
    answers: Sequence[ItemAnswer],
    run: Run,
) -> Arm:
    scores, one_order, every_order = markings
    unread = np.array([answer.unparsed for answer in answers])
    gains: dict[str, Gain] = {}
    macro_gain = micro_gain = None
    if against is not None:
        gains = {c: scores.gain(a, against, mask) for c, mask in scores.masks.items()}
        adjusted = holm([gain.p for gain in gains.values()])
        gains = {c: replace(gain, p_holm=p) for (c, gain), p in zip(gains.items(), adjusted, strict=True)}
        macro_gain, micro_gain = scores.macro_gain(a, against), scores.gain(a, against, scores.all)
    return Arm(
        name=names[a],
        against="" if against is None else names[against],
        cells={c: _cell(scores, a, mask, int(unread[mask].sum())) for c, mask in scores.masks.items()},
        macro=scores.macro(a),
        micro=scores.share(a, scores.all),
        gains=gains,
        macro_gain=macro_gain,
        micro_gain=micro_gain,
        one_order=one_order.average(a, against) if one_order else None,
        every_order=every_order.average(a, against) if every_order else None,
        letter_mass=_mean([answer.letter_mass for answer in answers]),
        letters=letter_counts(answers),
        p_guess=scores.p_guess(a, scores.all),
        diagnosis=diagnose(run),
        leak=run.record.leak.text if run.record.leak else "",
        answered_by=f"{run.record.backend.name} {run.record.backend.version}" if run.record.backend else "",
    )


def _cell(scores: _Scores, a: int, mask: NDArray[np.bool_], unread: int) -> Cell:
    right, n = int(scores.right[mask, a].sum()), int(mask.sum())
    patients = len(np.unique(scores.patients[mask]))
    return Cell(right, n, scores.share(a, mask).interval, scores.p_guess(a, mask), patients, unread)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def as_json(comparison: Comparison) -> dict[str, object]:
    """Return all values as plain data for ``summary.json``; shares, 0-1."""
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
            raise MismatchError(
                f"runs '{first_name}' ({first.folder}) and '{name}' ({run.folder}) differ in their {what} "
                f"({a[:12]}, {b[:12]}; bench files {ours.bench}, {theirs.bench}): run both on the same"
            )
    missing = {answer.id for answer in first.answers} ^ {answer.id for answer in run.answers}
    if missing:
        raise MismatchError(
            f"run '{first_name}' ({first.folder}) answers {len(first.answers)} of {ours.questions} questions and "
            f"'{name}' ({run.folder}) {len(run.answers)} of {theirs.questions} (only one has '{min(missing)}'): re-run "
            "both with the same `limit`, or without one; each continues"
        )
    images = {answer.id: answer.images_sha256 for answer in first.answers}
    changed = [answer.id for answer in run.answers if images[answer.id] != answer.images_sha256]
    if changed:
        raise MismatchError(
            f"runs '{first_name}' and '{name}' used different images for question '{changed[0]}'"
        )
