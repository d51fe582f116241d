"""Audit of a printed table of percentages: which claims its numbers of questions can support."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from eval_mcq.tables.entries import p_text
from eval_mcq.tables.intervals import wilson
from eval_mcq.tables.published import Published, PublishedRow
from eval_mcq.tables.rounding import half_up, mean_of_printed
from eval_mcq.tables.stats import exact_mcnemar, p_of_guessing
from eval_mcq.tables.table_layout import Grid

ALPHA = 0.05


@dataclass(frozen=True)
class Misfit:
    """A cell that is not a fraction of its number of questions, with the nearest possible values."""

    row: PublishedRow
    disease: str
    neighbors: list[tuple[int, str]]


@dataclass(frozen=True)
class Change:
    """A row compared with its model's base in one disease, or in all together.

    The printed table does not say which questions changed, so the exact McNemar test is bounded by two cases: no
    question lost (best), and as many lost and regained as the counts allow (worst).

    Attributes:
        row: The row.
        net: Questions gained minus questions lost.
        best: Smallest p-value of any pairing.
        worst: Largest p-value of any pairing.
    """

    row: PublishedRow
    net: int
    best: float
    worst: float


@dataclass(frozen=True)
class Audit:
    """Results of an audit.

    Attributes:
        table: The audited table.
        misfits: Cells that are not a fraction of their number of questions.
        averages: Number of rows whose average is the mean of their printed cells, rounded half up.
        gains: Number of gains that are the difference of the printed averages.
        changes: Disease -> changes of all rows except the base rows.
        pooled: The same over all diseases together.
        guessing: Cells of base rows that guessing reaches with a probability of 5 % or more.
        macro_error: Row -> standard error of its average in points, for independent questions.
    """

    table: Published
    misfits: list[Misfit]
    averages: int
    gains: int
    changes: dict[str, list[Change]]
    pooled: list[Change]
    guessing: list[tuple[PublishedRow, str, float]]
    macro_error: dict[tuple[str, str], float]

    @property
    def compared(self) -> int:
        """Number of cells that are compared with a base."""
        return sum(map(len, self.changes.values()))

    @property
    def unsupported(self) -> int:
        """Number of those that cannot reach p < 0.05 under any pairing."""
        return sum(change.best >= ALPHA for changes in self.changes.values() for change in changes)


def audit(table: Published) -> Audit:
    """Audit a printed table."""
    pairs = [(rows[0], row) for rows in table.models.values() for row in rows[1:]]
    bases = [rows[0] for rows in table.models.values()]
    cells = [(row, disease) for row in table.rows for disease in table.diseases]
    guesses = [(base, d, _guess(table, base, d)) for base in bases for d in table.diseases]
    return Audit(
        table=table,
        misfits=[Misfit(row, d, _neighbors(table, row, d)) for row, d in cells if not table.fits(row, d)],
        averages=sum(str(_mean(row)) == row.average for row in table.rows),
        gains=sum(_gain_fits(base, row) for base, row in pairs),
        changes={d: [_change(table, base, row, [d]) for base, row in pairs] for d in table.diseases},
        pooled=[_change(table, base, row, table.diseases) for base, row in pairs],
        guessing=[entry for entry in guesses if entry[2] >= ALPHA],
        macro_error={(row.model, row.arm): _macro_error(table, row) for row in table.rows},
    )


def _mean(row: PublishedRow) -> Decimal:
    return mean_of_printed([Decimal(cell) for cell in row.cells.values()])


def _gain_fits(base: PublishedRow, row: PublishedRow) -> bool:
    places = -int(Decimal(row.gain).as_tuple().exponent) if row.gain else 0
    return str(half_up(Decimal(row.average) - Decimal(base.average), places)) == row.gain


def _neighbors(table: Published, row: PublishedRow, disease: str) -> list[tuple[int, str]]:
    n, value = table.questions[disease], Decimal(row.cells[disease])
    below = int(value * n / 100)
    return [(k, str(half_up(Decimal(100 * k) / n, 2))) for k in (below, below + 1)]


def _change(table: Published, base: PublishedRow, row: PublishedRow, diseases: Sequence[str]) -> Change:
    before = [table.count(base, d) for d in diseases]
    after = [table.count(row, d) for d in diseases]
    missed = [table.questions[d] - k for d, k in zip(diseases, after, strict=True)]
    net = sum(after) - sum(before)
    # Bounds of the number of questions that changed from right to wrong.
    least = sum(max(0, b - a) for b, a in zip(before, after, strict=True))
    most = sum(min(b, m) for b, m in zip(before, missed, strict=True))
    p_values = [exact_mcnemar(net + lost, lost) for lost in range(least, most + 1)]
    return Change(row, net, min(p_values), max(p_values))


def _guess(table: Published, row: PublishedRow, disease: str) -> float:
    return p_of_guessing(table.count(row, disease), {table.options: table.questions[disease]})


def _macro_error(table: Published, row: PublishedRow) -> float:
    """Compute the standard error of the average in points; shares are shrunk by one question, so that 0 % has one."""
    variance = 0.0
    for disease, n in table.questions.items():
        share = (table.count(row, disease) + 0.5) / (n + 1)
        variance += share * (1 - share) / n
    return 100 * math.sqrt(variance) / len(table.questions)


def by_column(findings: Audit) -> Grid:
    """Build the table of what each disease's number of questions allows, with the findings on the whole as notes."""
    table = findings.table
    rows = []
    for disease, n in table.questions.items():
        changes = findings.changes[disease]
        shares = [table.count(row, disease) for row in table.rows]
        widths = [wilson(k, n) for k in shares]
        half = 100 * max(interval.high - interval.low for interval in widths) / 2
        cannot = sum(change.best >= ALPHA for change in changes)
        misfits = sum(misfit.disease == disease for misfit in findings.misfits)
        rows.append(
            [
                disease, str(n), f"{100 / n:.2f}", f"{half:.1f}", f"{100 / table.options:.0f}",
                f"{100 * _reached_by_luck(n, table.options):.1f}", f"{cannot} of {len(changes)}", str(misfits),
            ]
        )  # fmt: skip
    columns = [
        "Disease", "n (inferred)", "one question", "widest ± (95%)", "chance", "luck reaches", "cannot be p < 0.05",
        "no k/n",
    ]  # fmt: skip
    return Grid(
        "What the printed figures can support, in % and points", columns, rows, [], _notes(findings), []
    )


def by_model(findings: Audit) -> Grid:
    """Build the table of each model's gain over all questions, for the best and worst pairing."""
    table = findings.table
    rows = []
    for change in findings.pooled:
        base = table.models[change.row.model][0]
        right = [sum(table.count(row, d) for d in table.diseases) for row in (base, change.row)]
        n = sum(table.questions.values())
        cannot = sum(
            c.best >= ALPHA for changes in findings.changes.values() for c in changes if c.row is change.row
        )
        rows.append(
            [
                change.row.model, base.average, change.row.average, f"+{change.row.gain}" if change.row.gain else "",
                f"{findings.macro_error[base.model, base.arm]:.1f}", *(f"{100 * k / n:.2f}" for k in right),
                f"{change.net:+d}", p_text(change.best), p_text(change.worst), f"{cannot} of {len(table.diseases)}",
            ]
        )  # fmt: skip
    columns = [
        "Model", "Average", "after", "gain", "± SE", "micro", "micro after", "net questions", "p at best", "p at worst",
        "cannot be p < 0.05",
    ]  # fmt: skip
    return Grid("Over all questions, from the inferred counts", columns, rows, [], [], [])


def _reached_by_luck(n: int, options: int) -> float:
    """Return the highest share that guessing reaches with a probability of 5 % or more."""
    return max(k for k in range(n + 1) if p_of_guessing(k, {options: n}) >= ALPHA) / n


def _notes(findings: Audit) -> list[str]:
    table = findings.table
    pairs = len(findings.pooled)
    notes = [
        f"{table.source}.",
        f"{table.about}",
        f"{findings.averages} of {len(table.rows)} printed Averages are the mean of the printed cells (half up); "
        f"{findings.gains} of {pairs} printed gains are the difference of the printed Averages.",
        f"{findings.unsupported} of {findings.compared} cells cannot reach p < {ALPHA} by exact McNemar under any "
        "pairing of the questions, before any correction for so many tests.",
        f"{len(findings.guessing)} of {pairs * len(table.diseases)} base cells are reached by guessing among "
        f"{table.options} options with a probability of {ALPHA:.0%} or more.",
    ]
    notes += [
        f"{m.row.model} {m.row.arm}, {m.disease}: {m.row.cells[m.disease]} is not k/{table.questions[m.disease]} "
        f"(nearest: {', '.join(f'{k} = {printed}' for k, printed in m.neighbors)})."
        for m in findings.misfits
    ]
    return notes
