"""The cells of a table of a comparison: values rounded for print, with their intervals, gains and marks."""

from dataclasses import dataclass, replace
from decimal import Decimal

from eval_mcq.tables.intervals import Interval
from eval_mcq.tables.results import Arm, Average, Comparison, Gain
from eval_mcq.tables.rounding import Rounding

SMALL = 20
"""Diseases with fewer questions are marked as too small to interpret."""

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
            figure = TableCell(str(value), bracket(cell.interval, rounding), marks=marks, unread=cell.unread)
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
        bracket(average.estimate.interval, rounding),
        unread=arm.diagnosis.unread,
    )
    if not arm.against:
        return figure
    if average.gain is None:
        return replace(figure, gain=TOO_FEW, p=NONE)
    points, interval = rounding.cell(average.gain.value), bracket(average.gain.interval, rounding)
    return replace(figure, gain=signed(points), gain_interval=interval, p=NONE)


def _with_gain(
    figure: TableCell, before: Decimal, after: Decimal, gain: Gain, p: float, rounding: Rounding
) -> TableCell:
    if gain.estimate is None:
        return replace(figure, gain=TOO_FEW, p=NONE)
    points = rounding.gain(before, after, gain.estimate.value, places=2)
    return replace(
        figure, gain=signed(points), gain_interval=bracket(gain.estimate.interval, rounding), p=p_text(p),
        marks=(SURE if p < ALPHA else "") + figure.marks,
    )  # fmt: skip


def _macro_figure(arm: Arm, base: Arm, rounding: Rounding) -> TableCell:
    before, after = (rounding.average([cell.share for cell in a.cells.values()]) for a in (base, arm))
    figure = TableCell(str(after), bracket(arm.macro.interval, rounding), unread=arm.diagnosis.unread)
    if arm.micro_gain is None:
        return figure
    if arm.macro_gain is None:
        return replace(figure, gain=TOO_FEW, p=NONE)
    points = rounding.gain(before, after, arm.macro_gain.value, places=1)
    gain_interval = bracket(arm.macro_gain.interval, rounding)
    return replace(figure, gain=signed(points), gain_interval=gain_interval, p=NONE)


def _micro_figure(arm: Arm, base: Arm, rounding: Rounding) -> TableCell:
    before, after = (rounding.cell(a.micro.value) for a in (base, arm))
    marks = LUCK if arm.p_guess >= ALPHA else ""
    interval = bracket(arm.micro.interval, rounding)
    figure = TableCell(str(after), interval, marks=marks, unread=arm.diagnosis.unread)
    if arm.micro_gain is None:
        return figure
    return _with_gain(figure, before, after, arm.micro_gain, arm.micro_gain.p, rounding)


def bracket(interval: Interval, rounding: Rounding) -> str:
    """Return an interval in brackets, rounded."""
    low, high = (_plain(rounding.cell(bound)) for bound in (interval.low, interval.high))
    return f"[{low}, {high}]"


def signed(value: Decimal) -> str:
    """Return a number with its sign."""
    return f"+{value}" if value > 0 else _plain(value)


def _plain(value: Decimal) -> str:
    return str(abs(value) if value == 0 else value)


def p_text(value: float) -> str:
    """Return a p-value as printed in a table."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def p_words(cell: str) -> str:
    """Return a p-value's cell as the end of a phrase: ``, p = 0.012``, ``, p < 0.001``; empty if there is none."""
    if cell == NONE:
        return ""
    return f", p < {cell[1:]}" if cell.startswith("<") else f", p = {cell}"
