"""Tables of a comparison, in two layouts: diseases as rows (terminal) or as columns (as in the paper)."""

from dataclasses import dataclass, replace
from decimal import Decimal

from eval_mcq.tables.intervals import CONFIDENCE, FEWEST, Estimate, Interval
from eval_mcq.tables.rounding import PaperRounding, Rounding
from eval_mcq.tables.summary import Arm, Comparison, Gain

SMALL = 20
"""Below so many questions a disease is pointed out as too small to read by its value."""

LOW_MASS = 0.5
"""Below this mean probability on the letters, a model is said not to answer with letters."""

AVERAGE = "Average"
POOLED = "All questions"
NONE = "–"

TOO_FEW = "too few"
"""Stands where a gain would, with fewer than `FEWEST` patients."""

FEW = "†"
"""Marks a figure of fewer than :data:`SMALL` questions."""

LUCK = "°"
"""Marks a figure that guessing reaches with a probability of :data:`ALPHA` or more."""

ODD = "‡"
"""Marks a printed percentage that is no share of its number of questions."""

SURE = "*"
"""Marks a figure that differs from the base, Holm-adjusted exact McNemar below :data:`ALPHA`."""

MARKS = FEW + LUCK + ODD + SURE

ALPHA = 0.05


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn.

    Attributes:
        title: Above it.
        columns: Headings.
        rows: Cells, one per heading.
        breaks: Numbers of the rows that begin a new block.
        notes: Below it: what the figures mean.
        checks: Below those: how the models chose their letters. Not part of a table that is published.
        fixed: Leading columns that stand in every part when the table is cut to fit a narrow terminal.
        group: Columns after those that are not parted from each other.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    breaks: list[int]
    notes: list[str]
    checks: list[str]
    fixed: int = 1
    group: int = 1


@dataclass(frozen=True)
class TableCell:
    """What one arm shows for one disease or average, ready to print."""

    value: str
    interval: str
    gain: str = ""
    gain_interval: str = ""
    p: str = ""
    marks: str = ""
    unread: int = 0

    @property
    def marked(self) -> str:
        """The value with its marks."""
        return self.value + self.marks


@dataclass(frozen=True)
class Entry:
    """A disease or an average, with a figure per arm."""

    heading: str
    n: int
    chance: str
    figures: list[TableCell]


def by_disease(comparison: Comparison, paper_rounding: bool = False) -> Grid:
    """One row per disease; per arm its accuracy with interval, and gain and p-value against the first arm."""
    base, *others = comparison.arms
    unread = any(arm.diagnosis.unread for arm in comparison.arms)
    columns = ["Disease", "n", "chance", base.name, *(["unread"] if unread else [])]
    fixed = len(columns)
    for arm in others:
        columns += [arm.name, *(["unread"] if unread else []), f"gain of {arm.name}", "p"]
    rows = []
    for entry in entries_of(comparison, PaperRounding() if paper_rounding else Rounding()):
        row = [entry.heading, str(entry.n), entry.chance]
        for a, figure in enumerate(entry.figures):
            row.append(f"{figure.marked} {figure.interval}")
            row += [str(figure.unread)] if unread else []
            if a > 0:
                row += [f"{figure.gain} {figure.gain_interval}".rstrip(), figure.p]
        rows.append(row)
    return Grid(
        f"{comparison.bench}: accuracy in %",
        columns,
        rows,
        [len(comparison.categories)],
        notes_of(comparison),
        checks_of(comparison),
        fixed=fixed,
        group=4 if unread else 3,
    )


def like_paper(comparison: Comparison, paper_rounding: bool = False) -> Grid:
    """Diseases as columns and the Average last; per arm its accuracy, interval, gain and p-value as rows."""
    entries = entries_of(comparison, PaperRounding() if paper_rounding else Rounding())
    *shown, pooled = entries
    rows = [["n", *(str(e.n) for e in shown)], ["chance", *(e.chance for e in shown)]]
    breaks = []
    notes = notes_of(comparison)
    for a, arm in enumerate(comparison.arms):
        figures = [entry.figures[a] for entry in shown]
        breaks.append(len(rows))
        rows.append([arm.name, *(f.marked for f in figures)])
        rows.append([f"{arm.name}: {CONFIDENCE:.0%} interval", *(f.interval for f in figures)])
        if arm.diagnosis.unread:
            rows.append([f"{arm.name}: unread", *(str(f.unread) for f in figures)])
        of_all = pooled.figures[a]
        note = f"{arm.name}, all questions alike (micro): {of_all.value} {of_all.interval}"
        if a > 0:
            rows.append([f"{arm.name}: gain", *(f.gain for f in figures)])
            rows.append(
                [f"{arm.name}: gain, {CONFIDENCE:.0%} interval", *(f.gain_interval or NONE for f in figures)]
            )
            rows.append([f"{arm.name}: p", *(f.p for f in figures)])
            note += f", gain {f'{of_all.gain} {of_all.gain_interval}'.rstrip()}, p = {of_all.p}"
        notes.append(f"{note}.")
    return Grid(
        f"{comparison.bench}: accuracy in %",
        ["", *(e.heading for e in shown)],
        rows,
        breaks,
        notes,
        checks_of(comparison),
    )


def entries_of(comparison: Comparison, rounding: Rounding) -> list[Entry]:
    """The diseases in order, then the macro, then the micro average, ready to print."""
    base = comparison.arms[0]
    entries = []
    for category in comparison.categories:
        before = rounding.cell(base.cells[category].share)
        figures = []
        for arm in comparison.arms:
            cell = arm.cells[category]
            value = rounding.cell(cell.share)
            marks = (FEW if cell.n < SMALL else "") + (LUCK if cell.p_guess >= ALPHA else "")
            figure = TableCell(str(value), _bracket(cell.interval, rounding), marks=marks, unread=cell.unread)
            if gain := arm.gains.get(category):
                figure = _with_gain(figure, before, value, gain, gain.p_holm, rounding)
            figures.append(figure)
        chance = rounding.cell(comparison.chance[category])
        entries.append(Entry(category, base.cells[category].n, str(chance), figures))
    macro = [_macro_figure(arm, base, rounding) for arm in comparison.arms]
    entries.append(Entry(AVERAGE, comparison.answered, str(rounding.cell(comparison.macro_chance)), macro))
    micro = [_micro_figure(arm, base, rounding) for arm in comparison.arms]
    entries.append(Entry(POOLED, comparison.answered, str(rounding.cell(comparison.micro_chance)), micro))
    return entries


def _with_gain(
    figure: TableCell, before: Decimal, after: Decimal, gain: Gain, p: float, rounding: Rounding
) -> TableCell:
    if gain.estimate is None:
        return replace(figure, gain=TOO_FEW, p=NONE)
    points = rounding.gain(before, after, gain.estimate.value, places=2)
    return replace(
        figure, gain=_signed(points), gain_interval=_bracket(gain.estimate.interval, rounding), p=_p(p),
        marks=(SURE if p < ALPHA else "") + figure.marks,
    )  # fmt: skip


def _macro_figure(arm: Arm, base: Arm, rounding: Rounding) -> TableCell:
    before, after = (rounding.average([cell.share for cell in a.cells.values()]) for a in (base, arm))
    figure = TableCell(str(after), _bracket(arm.macro.interval, rounding), unread=arm.diagnosis.unread)
    if arm.micro_gain is None:
        return figure
    if arm.macro_gain is None:
        return replace(figure, gain=TOO_FEW, p=NONE)
    points = rounding.gain(before, after, arm.macro_gain.value, places=1)
    gain_interval = _bracket(arm.macro_gain.interval, rounding)
    return replace(figure, gain=_signed(points), gain_interval=gain_interval, p=NONE)


def _micro_figure(arm: Arm, base: Arm, rounding: Rounding) -> TableCell:
    before, after = (rounding.cell(a.micro.value) for a in (base, arm))
    marks = LUCK if arm.p_guess >= ALPHA else ""
    interval = _bracket(arm.micro.interval, rounding)
    figure = TableCell(str(after), interval, marks=marks, unread=arm.diagnosis.unread)
    if arm.micro_gain is None:
        return figure
    return _with_gain(figure, before, after, arm.micro_gain, arm.micro_gain.p, rounding)


def notes_of(comparison: Comparison) -> list[str]:
    """What the figures mean."""
    base, *others = comparison.arms
    answered = f"{comparison.answered} questions"
    if comparison.answered < comparison.questions:
        answered = f"Only {comparison.answered} of the bench's {comparison.questions} questions"
    notes = [
        f"{answered} on {comparison.clusters} patients (or images, where no patient is "
        f"known); scored by {comparison.mode}, prompt {comparison.prompt}.",
        f"Average: unweighted mean over diseases (macro). Brackets: {CONFIDENCE:.0%} score intervals (Wilson; gains: "
        "Tango; Average: square-and-add), questions of a patient counted by their design effect.",
    ]
    if comparison.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in comparison.left_out.items())
        notes.append(f"The bench was made without {sum(comparison.left_out.values())} entries: {reasons}.")
    notes += [
        f"LEAK: of {arm.name}, {arm.leak}; its figures are flattered." for arm in comparison.arms if arm.leak
    ]
    if others:
        notes.append(
            f"Gains: against {base.name} on the same questions. p: exact McNemar, Holm-adjusted over the "
            "diseases of an arm; over all questions unadjusted."
        )
        notes.append(f"{SURE} p < {ALPHA} by that test.")
        notes += _too_few(others[0])
    small = [f"{c} ({base.cells[c].n})" for c in comparison.categories if base.cells[c].n < SMALL]
    if small:
        notes.append(f"{FEW} Fewer than {SMALL} questions, read the interval: {', '.join(small)}.")
    lucky = [c.p_guess >= ALPHA for arm in comparison.arms for c in arm.cells.values()]
    if any(lucky) or any(arm.p_guess >= ALPHA for arm in comparison.arms):
        notes.append(f"{LUCK} Guessing reaches the figure with a probability of {ALPHA:.0%} or more (exact).")
    notes += [
        f"{c.name} against {c.against}: Average {_points(c.macro)}, all questions {_points(c.micro.estimate)}, "
        f"p = {_p(c.micro.p)}."
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
        f"{TOO_FEW}: with fewer than {FEWEST} patients (or images) no gain can reach p < {ALPHA} by that test, so that "
        f"none is told: {', '.join(few)}."
    ]


def checks_of(comparison: Comparison) -> list[str]:
    """How the arms chose."""
    checks = []
    for arm in comparison.arms:
        letters = ", ".join(
            f"{letter} {p.chosen} ({p.true}{'' if p.recall is None else f', {p.recall:.0%} right'})"
            for letter, p in arm.diagnosis.positions.items()
        )
        mass = "" if arm.letter_mass is None else f"; probability on the letters {arm.letter_mass:.2f}"
        checks.append(f"{arm.name}: letters chosen (true, of these right): {letters}{mass}.")
        checks += _more_checks(arm)
        if arm.letter_mass is not None and arm.letter_mass < LOW_MASS:
            checks.append(f"{arm.name} hardly answers with letters: its choice among them says little.")
    return checks


def _more_checks(arm: Arm) -> list[str]:
    how, checks = arm.diagnosis, []
    if how.rotations > 1:
        checks.append(
            f"{arm.name}: {how.single:.1%} of single rotations right, {how.all_right:.1%} of questions right in all "
            f"{how.rotations} (guessing: {how.all_right_chance:.2%})."
        )
    if how.calibration:
        checks.append(
            f"{arm.name}: expected calibration error {how.calibration.ece:.3f} ({len(how.calibration.bins)} bins), "
            f"Brier score {how.calibration.brier:.3f}."
        )
    if how.unread:
        checks.append(f"{arm.name}: {how.unread} of {how.rows} replies could not be read and count as wrong.")
    return checks


def _points(estimate: Estimate | None) -> str:
    if estimate is None:
        return TOO_FEW
    rounding = Rounding()
    value = _signed(rounding.cell(estimate.value))
    return f"{value} {_bracket(estimate.interval, rounding)}"


def _bracket(interval: Interval, rounding: Rounding) -> str:
    low, high = (_plain(rounding.cell(bound)) for bound in (interval.low, interval.high))
    return f"[{low}, {high}]"


def _signed(value: Decimal) -> str:
    return f"+{value}" if value > 0 else _plain(value)


def _plain(value: Decimal) -> str:
    return str(abs(value) if value == 0 else value)


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
