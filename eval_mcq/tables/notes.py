"""The notes below a table of a comparison: what its values mean, and how the models chose."""

from eval_mcq.tables.entries import (
    ALPHA,
    AVERAGE,
    FEW,
    LUCK,
    NONE,
    POOLED,
    SMALL,
    SURE,
    TOO_FEW,
    bracket,
    p_text,
    p_words,
    signed,
)
from eval_mcq.tables.intervals import CONFIDENCE, FEWEST, Estimate
from eval_mcq.tables.results import Arm, Comparison
from eval_mcq.tables.rounding import Rounding

LOW_MASS = 0.5
"""Below this mean probability of the letters, a model is reported not to answer with letters."""


def notes_of(comparison: Comparison) -> list[str]:
    """Return the notes on the values."""
    base, *others = comparison.arms
    answered = f"{comparison.answered} questions"
    if comparison.answered < comparison.questions:
        answered = f"Only {comparison.answered} of the benchmark's {comparison.questions} questions"
    notes = [
        f"{answered} on {comparison.clusters} patients (or images, where no patient is "
        f"known); scored by {comparison.mode}, prompt {comparison.prompt}.",
        f"Average: unweighted mean over diseases (macro). Brackets: {CONFIDENCE:.0%} score intervals (Wilson; gains: "
        "Tango; Average: square-and-add), questions of a patient counted by their design effect.",
    ]
    if comparison.orders > 1:
        notes.append(
            f"Every question is asked in up to {comparison.orders} orders of its options. {AVERAGE}: the answer is the "
            "most probable option over all orders together. One order: each order is scored separately. All "
            f"{comparison.orders} orders: a question is right only if it is right in each of them. A model that "
            "prefers a letter loses little in the first, more in the second and most in the third."
        )
    if comparison.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in comparison.left_out.items())
        notes.append(
            f"The benchmark was built without {sum(comparison.left_out.values())} entries: {reasons}."
        )
    notes += [
        f"LEAK: of {arm.name}, {arm.leak}; its results are too optimistic."
        for arm in comparison.arms
        if arm.leak
    ]
    if elsewhere := [f"{arm.name} by {arm.answered_by}" for arm in comparison.arms if arm.answered_by]:
        notes.append(f"Not answered by this project's engine: {', '.join(elsewhere)}.")
    if others:
        against: dict[str, list[str]] = {arm.against: [] for arm in others}
        for arm in others:
            against[arm.against].append(arm.name)
        pairs = "; ".join(f"{', '.join(names)} against {reference}" for reference, names in against.items())
        notes.append(
            f"Gains: {pairs}, on the same questions. p: exact McNemar, Holm-adjusted over the "
            "diseases of an arm; over all questions unadjusted."
        )
        notes.append(f"{SURE} p < {ALPHA} by that test.")
        notes += _too_few(others[0])
    small = [f"{c} ({base.cells[c].n})" for c in comparison.categories if base.cells[c].n < SMALL]
    if small:
        notes.append(f"{FEW} Fewer than {SMALL} questions, see the interval: {', '.join(small)}.")
    lucky = [c.p_guess >= ALPHA for arm in comparison.arms for c in arm.cells.values()]
    if any(lucky) or any(arm.p_guess >= ALPHA for arm in comparison.arms):
        notes.append(f"{LUCK} Guessing reaches the value with a probability of {ALPHA:.0%} or more (exact).")
    notes += [
        f"{c.name} against {c.against}: Average {_points(c.macro)}, all questions {_points(c.micro.estimate)}"
        f"{p_words(p_text(c.micro.p) if c.micro.estimate else NONE)}."
        for c in comparison.contrasts
    ]
    if comparison.unanswered:
        notes.append(f"No answers, and not in the Average: {', '.join(comparison.unanswered)}.")
    return notes


def _too_few(arm: Arm) -> list[str]:
    few = [f"{c} ({gain.patients})" for c, gain in arm.gains.items() if gain.estimate is None]
    if not few:
        return []
    few += [AVERAGE, POOLED] if arm.macro_gain is None else []
    return [
        f"{TOO_FEW}: with fewer than {FEWEST} patients (or images) no gain can reach p < {ALPHA} by that test, so "
        f"none is reported: {', '.join(few)}."
    ]


def checks_of(comparison: Comparison) -> list[str]:
    """Return notes on how the arms chose."""
    checks = []
    for arm in comparison.arms:
        letters = ", ".join(
            f"{letter} {p.chosen} ({p.true}{'' if p.recall is None else f', {p.recall:.0%} right'})"
            for letter, p in arm.diagnosis.positions.items()
        )
        mass = "" if arm.letter_mass is None else f"; probability of the letters {arm.letter_mass:.2f}"
        checks.append(f"{arm.name}: letters chosen (true, of these right): {letters}{mass}.")
        checks += _more_checks(arm)
        if arm.letter_mass is not None and arm.letter_mass < LOW_MASS:
            checks.append(f"{arm.name} rarely answers with letters, so its choice among them means little.")
    return checks


def _more_checks(arm: Arm) -> list[str]:
    how, checks = arm.diagnosis, []
    if how.calibration:
        checks.append(
            f"{arm.name}: expected calibration error {how.calibration.ece:.3f} ({len(how.calibration.bins)} bins), "
            f"Brier score {how.calibration.brier:.3f}."
        )
    if how.unread:
        checks.append(
            f"{arm.name}: {how.unread} of {how.rows} replies could not be parsed and count as wrong."
        )
    return checks


def _points(estimate: Estimate | None) -> str:
    if estimate is None:
        return TOO_FEW
    rounding = Rounding()
    value = signed(rounding.cell(estimate.value))
    return f"{value} {bracket(estimate.interval, rounding)}"
