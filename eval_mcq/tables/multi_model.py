"""Tables of several models in the paper's layout: rows grouped by model, gains as arrows, published rows included."""

from collections.abc import Mapping, Sequence
from decimal import Decimal

from eval_mcq.tables.entries import AVERAGE, NONE, ODD, TOO_FEW, entries_of, p_words
from eval_mcq.tables.intervals import CONFIDENCE, FEWEST
from eval_mcq.tables.notes import checks_of, notes_of
from eval_mcq.tables.published import Published, PublishedRow
from eval_mcq.tables.results import Arm, Comparison
from eval_mcq.tables.rounding import PaperRounding, Rounding
from eval_mcq.tables.table_layout import Grid, headline_of, order_notes

ONE_ORDER, EVERY_ORDER = "macro, one order", "macro, all orders"
UP, DOWN, SAME = "↑", "↓", "="


def like_paper_pairs(
    models: Mapping[str, Comparison], paper_rounding: bool = False, published: Published | None = None
) -> Grid:
    """Build a table with diseases as columns, the Average with its gain last.

    Args:
        models: Model name -> comparison; all on one benchmark. A single model may have the name "".
        paper_rounding: Round like the published table.
        published: A printed table whose rows are added below the model of the same name; all of them at the end if it
            contains none of the models.
    """
    rounding = PaperRounding() if paper_rounding else Rounding()
    first = next(iter(models.values()))
    *entries, _ = entries_of(first, rounding)
    rows = [["n", *(str(e.n) for e in entries)], ["chance", *(e.chance for e in entries)]]
    breaks: list[int] = []
    common, notes, checks = notes_of(first), [], []
    matched = _matched(models, published) if published else {}
    for model, comparison in models.items():
        breaks.append(len(rows))
        rows += _model_rows(model, comparison, rounding)
        notes += _model_notes(model, comparison, rounding, common)
        checks += [f"{model} {check}".strip() for check in checks_of(comparison)]
        if published and model in matched:
            rows += _published_rows(published, matched[model], first)
    if published:
        if not matched:
            for rows_of_model in published.models.values():
                breaks.append(len(rows))
                rows += _published_rows(published, rows_of_model, first)
        breaks.append(len(rows))
        rows.append(
            [
                "n (published, inferred)",
                *_columns(published, first, {d: str(n) for d, n in published.questions.items()}, ""),
            ]
        )
        notes += _published_notes(published, first)
    columns = ["", *first.categories, AVERAGE]
    headline = [f"{model} {line}".strip() for model, c in models.items() for line in headline_of(c, rounding)]
    title = f"{first.bench}: accuracy in %"
    return Grid(title, columns, rows, breaks, [*common, *notes], checks, headline=headline)


def long_table(models: Mapping[str, Comparison]) -> Grid:
    """Build a table with one row per model, arm and disease and unrounded values, for further analysis; shares, 0-1."""
    columns = [
        "model", "arm", "against", "disease", "n", "patients", "right", "unread", "accuracy", "low", "high", "chance",
        "p_guess", "gain", "gain_low", "gain_high", "p", "p_holm",
    ]  # fmt: skip
    rows = [
        _long_row(model, arm, comparison, disease)
        for model, comparison in models.items()
        for arm in comparison.arms
        for disease in [*comparison.categories, "macro", "micro", *_orders(comparison)]
    ]
    bench = next(iter(models.values())).bench
    note = f"Gains and p are omitted with fewer than {FEWEST} patients (or images)."
    return Grid(f"{bench}: all figures", columns, rows, [], [note], [], fixed=3)


def _orders(comparison: Comparison) -> list[str]:
    return [ONE_ORDER, EVERY_ORDER] if comparison.orders > 1 else []


def _long_row(model: str, arm: Arm, comparison: Comparison, disease: str) -> list[str]:
    n = sum(cell.n for cell in arm.cells.values())
    right: int | None = sum(cell.right for cell in arm.cells.values())
    p_guess: float | None = arm.p_guess
    unread, patients, of = arm.diagnosis.unread, comparison.clusters, arm.micro_gain
    gain, p_holm = of.estimate if of else None, None
    if disease == "macro":
        interval, share, chance = arm.macro.interval, arm.macro.value, comparison.macro_chance
        gain, right, p_guess, of = arm.macro_gain, None, None, None
    elif disease in (ONE_ORDER, EVERY_ORDER):
        average = arm.one_order if disease == ONE_ORDER else arm.every_order
        assert average is not None  # these rows exist only with several orders
        interval, share, gain = average.estimate.interval, average.estimate.value, average.gain
        chance = comparison.macro_chance if disease == ONE_ORDER else comparison.chance_every_order
        right, p_guess, of = None, None, None
    elif disease == "micro":
        interval, share, chance = arm.micro.interval, arm.micro.value, comparison.micro_chance
    else:
        cell, of = arm.cells[disease], arm.gains.get(disease)
        n, right, unread, share, interval = cell.n, cell.right, cell.unread, cell.share, cell.interval
        patients, chance, p_guess = cell.patients, comparison.chance[disease], cell.p_guess
        gain, p_holm = (of.estimate, of.p_holm) if of else (None, None)
    told = of if of and of.estimate else None  # with too few patients, p is not reported either
    figures = [
        share, interval.low, interval.high, chance, p_guess, gain.value if gain else None,
        gain.interval.low if gain else None, gain.interval.high if gain else None,
        told.p if told else None, p_holm if told else None,
    ]  # fmt: skip
    counts = [str(n), str(patients), "" if right is None else str(right), str(unread)]
    return [
        model,
        arm.name,
        arm.against,
        disease,
        *counts,
        *("" if f is None else f"{f:.6g}" for f in figures),
    ]


def _model_rows(model: str, comparison: Comparison, rounding: Rounding) -> list[list[str]]:
    rows = []
    *entries, _ = entries_of(comparison, rounding)
    for a, arm in enumerate(comparison.arms):
        figures = [entry.figures[a] for entry in entries]
        cells = [f.marked for f in figures]
        if a > 0:
            cells[-1] += f" {_arrow_of(figures[-1].gain)}"
        rows.append([_heading(model, arm.name, a), *cells])
        rows.append([f"  {CONFIDENCE:.0%} interval", *(f.interval for f in figures)])
        if arm.diagnosis.unread:
            rows.append(["  unread", *(str(f.unread) for f in figures)])
    return rows


def _heading(model: str, arm: str, place: int) -> str:
    if place > 0:
        return f"+ {arm}"
    return f"{model} ({arm})" if model else arm


def arrow(gain: Decimal) -> str:
    """Format a gain in points as in the paper: an arrow and its size."""
    sign = UP if gain > 0 else DOWN if gain < 0 else SAME
    return f"{sign}{abs(gain)}"


def _arrow_of(gain: str) -> str:
    return gain if gain == TOO_FEW else arrow(Decimal(gain))


def _model_notes(model: str, comparison: Comparison, rounding: Rounding, common: Sequence[str]) -> list[str]:
    *_, macro, micro = entries_of(comparison, rounding)
    notes = []
    for a, arm in enumerate(comparison.arms):
        name = f"{model} {arm.name}".strip()
        of_all, average = micro.figures[a], macro.figures[a]
        note = f"{name}, all questions (micro): {of_all.value} {of_all.interval}"
        if a > 0:
            note += (
                f", gain {of_all.gain} {of_all.gain_interval}".rstrip()
                + f"{p_words(of_all.p)}; gain of the Average {average.gain} {average.gain_interval}".rstrip()
            )
        notes.append(f"{note}.")
    notes += [f"{model} {note}".strip() for note in order_notes(comparison, rounding)]
    return notes + [note for note in notes_of(comparison) if note not in common]


def _matched(models: Mapping[str, Comparison], published: Published) -> dict[str, list[PublishedRow]]:
    by_name = {_plain(name): rows for name, rows in published.models.items()}
    return {model: by_name[_plain(model)] for model in models if _plain(model) in by_name}


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _published_rows(published: Published, rows: Sequence[PublishedRow], shown: Comparison) -> list[list[str]]:
    same = _same_diseases(published, shown)
    lines = []
    for row in rows:
        cells = {d: f"{c}{'' if published.fits(row, d) else ODD}" for d, c in row.cells.items()}
        average = row.average if same else NONE
        if row.gain and same:
            average += f" {arrow(Decimal(row.gain))}"
        heading = f"published: {f'+ {row.arm}' if row.gain else f'{row.model} ({row.arm})'}"
        lines.append([heading, *_columns(published, shown, cells, average)])
    return lines


def _columns(published: Published, shown: Comparison, cells: Mapping[str, str], average: str) -> list[str]:
    by_name = {_plain(disease): disease for disease in published.diseases}
    names = [by_name.get(_plain(category)) for category in shown.categories]
    return [*(cells[name] if name else NONE for name in names), average]


def _same_diseases(published: Published, shown: Comparison) -> bool:
    return {_plain(d) for d in published.diseases} == {_plain(c) for c in shown.categories}


def _published_notes(published: Published, shown: Comparison) -> list[str]:
    notes = [
        f"Published rows: {published.source}. {published.about}",
        "Published rows are of other questions and have no answers to pair: shown for reference, not compared.",
    ]
    if not _same_diseases(published, shown):
        notes.append("Published Averages are over other diseases and are omitted.")
    odd = [
        f"{row.model} {row.arm} {d} {cell}"
        for row in published.rows
        for d, cell in row.cells.items()
        if not published.fits(row, d)
    ]
    if odd:
        notes.append(f"{ODD} No whole number of right answers prints as this: {'; '.join(odd)}.")
    return notes
