"""Tables of a comparison, in two layouts: diseases as rows (terminal) or as columns (as in the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass

from eval_mcq.tables.entries import (
    AVERAGE,
    NONE,
    TableCell,
    entries_of,
    order_entries,
    p_words,
)
from eval_mcq.tables.intervals import CONFIDENCE
from eval_mcq.tables.notes import checks_of, notes_of
from eval_mcq.tables.results import Arm, Comparison
from eval_mcq.tables.rounding import PaperRounding, Rounding


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
    names = [arm.name for arm in comparison.arms]
    figures = dict(zip(names, average.figures, strict=True))
    base = names[0]
    told = sorted((arm for arm in comparison.arms if arm.against), key=lambda arm: arm.against == base)
    return [
        f"{arm.name} against {arm.against}: {_gain(figures[arm.name])} points on average over "
        f"{len(comparison.categories)} diseases ({figures[arm.name].value} % against "
        f"{figures[arm.against].value} %; chance {average.chance} %)"
        + "".join(
            f"; {order.heading.removeprefix(f'{AVERAGE}, ')} {_gain(order.figures[names.index(arm.name)])}"
            for order in order_entries(comparison, rounding)
        )
        + "."
        for arm in told
    ]


def _gain(figure: TableCell) -> str:
    return f"{figure.gain} {figure.gain_interval}".rstrip()
