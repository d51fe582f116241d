"""Tables of a comparison, in two layouts: diseases as rows (terminal) or as columns (as in the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from eval_mcq.tables.intervals import CONFIDENCE, FEWEST, Estimate, Interval
from eval_mcq.tables.rounding import PaperRounding, Rounding
from eval_mcq.tables.summary import Arm, Average, Comparison, Gain

SMALL = 20
"""Diseases with fewer questions are marked as too small to interpret."""

LOW_MASS = 0.5
"""Below this mean probability of the letters, a model is reported not to answer with letters."""

AVERAGE = "Average"
POOLED = "All questions"
NONE = "–"

TOO_FEW = "too few"
"""Shown instead of a gain with fewer than `FEWEST` patients."""

FEW = "†"
"""Marks a value from fewer than :data:`SMALL` questions."""

LUCK = "°"
"""Marks a value that guessing reaches with a probability of :data:`ALPHA` or more."""

ODD = "‡"
"""Marks a printed percentage that is not a fraction of its number of questions."""

SURE = "*"
"""Marks a value that differs from that of the reference arm: Holm-adjusted exact McNemar below :data:`ALPHA`."""

MARKS = FEW + LUCK + ODD + SURE

ALPHA = 0.05


@dataclass(frozen=True)
class Grid:
    """A table before rendering.

    Attributes:
        title: Its title.
        columns: Headings.
        rows: Cells, one per heading.
        breaks: Indices of the rows that begin a new block.
        notes: Notes on the values.
        checks: Notes on how the models chose their letters, which are not meant for publication.
        fixed: Number of leading columns, repeated in every part if the table is split for a narrow terminal.
        group: Number of following columns that are kept together.
        headline: Lines above the notes: the gains of the arms over their references.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    breaks: list[int]
    notes: list[str]
    checks: list[str]
    fixed: int = 1
    group: int = 1
    headline: Sequence[str] = ()


@dataclass(frozen=True)
class TableCell:
    """The cell of one arm for one disease or average, ready to print."""

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
    """A disease or an average, with one cell per arm."""

    heading: str
    n: int
    chance: str
    figures: list[TableCell]


def by_disease(comparison: Comparison, paper_rounding: bool = False) -> Grid:
    """Build a table with one row per disease: per arm accuracy with interval, gain over its reference, and p-value.

    If options were shown in several orders, the Averages of single orders and of all orders follow.
    """
    rounding = PaperRounding() if paper_rounding else Rounding()
    base, *others = comparison.arms
    unread = any(arm.diagnosis.unread for arm in comparison.arms)
    columns = ["Disease", "n", "chance", base.name, *(["unread"] if unread else [])]
    fixed = len(columns)
    for arm in others:
        columns += [arm.name, *(["unread"] if unread else []), gain_heading(arm), "p"]
    entries = entries_of(comparison, rounding)
    orders = order_entries(comparison, rounding)
    rows = []
    for entry in [*entries, *orders]:
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
        [len(comparison.categories), *([len(entries)] if orders else [])],
        notes_of(comparison),
        checks_of(comparison),
        fixed=fixed,
        group=4 if unread else 3,
        headline=headline_of(comparison, rounding),
    )


def gain_heading(arm: Arm) -> str:
    """Return the heading of an arm's gain column."""
    return f"{arm.name} over {arm.against}"


def like_paper(comparison: Comparison, paper_rounding: bool = False) -> Grid:
    """Build a table with diseases as columns, Average last; accuracy, interval, gain and p-value per arm as rows."""
    rounding = PaperRounding() if paper_rounding else Rounding()
    *shown, pooled = entries_of(comparison, rounding)
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
        note = f"{arm.name}, all questions (micro): {of_all.value} {of_all.interval}"
        if a > 0:
            heading = gain_heading(arm)
            rows.append([heading, *(f.gain for f in figures)])
            rows.append(
                [f"{heading}: {CONFIDENCE:.0%} interval", *(f.gain_interval or NONE for f in figures)]
            )
            rows.append([f"{heading}: p", *(f.p for f in figures)])
            note += f", gain {f'{of_all.gain} {of_all.gain_interval}'.rstrip()}{p_words(of_all.p)}"
        notes.append(f"{note}.")
    notes += order_notes(comparison, rounding)
    return Grid(
        f"{comparison.bench}: accuracy in %",
        ["", *(e.heading for e in shown)],
        rows,
        breaks,
        notes,
        checks_of(comparison),
        headline=headline_of(comparison, rounding),
    )


def entries_of(comparison: Comparison, rounding: Rounding) -> list[Entry]:
    """Return the diseases in order, then the macro and the micro average, ready to print."""
    base, reference = comparison.arms[0], {arm.name: arm for arm in comparison.arms}
    entries = []
    for category in comparison.categories:
        figures = []
        for arm in comparison.arms:
            cell = arm.cells[category]
            value = rounding.cell(cell.share)
            marks = (FEW if cell.n < SMALL else "") + (LUCK if cell.p_guess >= ALPHA else "")
            figure = TableCell(str(value), _bracket(cell.interval, rounding), marks=marks, unread=cell.unread)
            if gain := arm.gains.get(category):
                before = rounding.cell(reference[arm.against].cells[category].share)
                figure = _with_gain(figure, before, value, gain, gain.p_holm, rounding)
            figures.append(figure)
        chance = rounding.cell(comparison.chance[category])
        entries.append(Entry(category, base.cells[category].n, str(chance), figures))
    pairs = [(arm, reference.get(arm.against, arm)) for arm in comparison.arms]
    macro = [_macro_figure(*pair, rounding) for pair in pairs]
    entries.append(Entry(AVERAGE, comparison.answered, str(rounding.cell(comparison.macro_chance)), macro))
    micro = [_micro_figure(*pair, rounding) for pair in pairs]
    entries.append(Entry(POOLED, comparison.answered, str(rounding.cell(comparison.micro_chance)), micro))
    return entries


def order_entries(comparison: Comparison, rounding: Rounding) -> list[Entry]:
    """Return the Average of single orders of the options, and of all orders; empty with a single order."""
    if comparison.orders == 1:
        return []
    base = comparison.arms[0]
    rows = sum(position.true for position in base.diagnosis.positions.values())
    one = [_average_figure(arm.one_order, arm, rounding) for arm in comparison.arms if arm.one_order]
    every = [_average_figure(arm.every_order, arm, rounding) for arm in comparison.arms if arm.every_order]
    chances = [
        str(rounding.cell(share)) for share in (comparison.macro_chance, comparison.chance_every_order)
    ]
    return [
        Entry(f"{AVERAGE}, one order", rows, chances[0], one),
        Entry(f"{AVERAGE}, all {comparison.orders} orders", comparison.answered, chances[1], every),
    ]


def _average_figure(average: Average, arm: Arm, rounding: Rounding) -> TableCell:
    figure = TableCell(
        str(rounding.cell(average.estimate.value)),
        _bracket(average.estimate.interval, rounding),
        unread=arm.diagnosis.unread,
    )
    if not arm.against:
        return figure
    if average.gain is None:
        return replace(figure, gain=TOO_FEW, p=NONE)
    points, interval = rounding.cell(average.gain.value), _bracket(average.gain.interval, rounding)
    return replace(figure, gain=_signed(points), gain_interval=interval, p=NONE)


def order_notes(comparison: Comparison, rounding: Rounding) -> list[str]:
    """Return the same in words, for layouts with diseases as columns."""
    if not (orders := order_entries(comparison, rounding)):
        return []
    headline, one, every = entries_of(comparison, rounding)[-2], *orders
    return [
        f"{arm.name}: {AVERAGE} {h.value} {h.interval}; one order {o.value} {o.interval}; "
        f"all {comparison.orders} orders {e.value} {e.interval}."
        for arm, h, o, e in zip(comparison.arms, headline.figures, one.figures, every.figures, strict=True)
    ]


def headline_of(comparison: Comparison, rounding: Rounding) -> list[str]:
    """Return each arm's average gain over its reference, in words; the control's gain last."""
    average = entries_of(comparison, rounding)[-2]
    figures = dict(zip((arm.name for arm in comparison.arms), average.figures, strict=True))
    base = comparison.arms[0].name
    told = sorted((arm for arm in comparison.arms if arm.against), key=lambda arm: arm.against == base)
    return [
        f"{arm.name} against {arm.against}: {figures[arm.name].gain} {figures[arm.name].gain_interval}".rstrip()
        + f" points on average over {len(comparison.categories)} diseases ({figures[arm.name].value} % against "
        f"{figures[arm.against].value} %; chance {average.chance} %)."
        for arm in told
    ]


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
        f"{p_words(_p(c.micro.p) if c.micro.estimate else NONE)}."
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


def p_words(cell: str) -> str:
    """Return a p-value's cell as the end of a phrase: ``, p = 0.012``, ``, p < 0.001``; empty if there is none."""
    if cell == NONE:
        return ""
    return f", p < {cell[1:]}" if cell.startswith("<") else f", p = {cell}"
