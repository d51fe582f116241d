import csv
import io
from decimal import Decimal

import pytest
from rich.console import Console
from scipy.stats import binom

from eval_mcq.tables.multi_model import like_paper_pairs, long_table
from eval_mcq.tables.published import load_published
from eval_mcq.tables.render import UNMARKED, as_csv, as_latex, as_markdown, as_text, show, terminal_table
from eval_mcq.tables.rounding import PaperRounding, Rounding, mean_of_printed
from eval_mcq.tables.summary import compare, compare_models
from eval_mcq.tables.table_layout import by_disease, like_paper
from mgll_encoder.common.errors import MismatchError
from tests.eval_mcq.helpers import run_of_counts

NO_COMMON_DENOMINATOR = {("InstructBLIP", "base"), ("LLaVA-Med", "base")}
"""Rows with a cell that is no k/n of its disease: 80.17, 59.30 and 16.67."""


def column(grid, heading: str) -> dict[str, str]:
    place = grid.columns.index(heading)
    return {row[0]: row[place] for row in grid.rows}


def test_all_published_averages_are_the_mean_of_the_printed_cells():
    rows = load_published().rows
    assert len(rows) == 16
    for row in rows:
        assert str(mean_of_printed([Decimal(cell) for cell in row.cells.values()])) == row.average


def test_all_published_gains_are_differences_of_the_rounded_averages():
    rows = load_published().rows
    for base, mgll in zip(rows[::2], rows[1::2], strict=True):
        places = len(mgll.gain.partition(".")[2])
        gain = PaperRounding().gain(Decimal(base.average), Decimal(mgll.average), 0.0, places)
        assert str(gain) == mgll.gain


def test_counts_of_right_answers_become_the_published_row():
    table = load_published()
    reproduced = 0
    for row in table.rows:
        if (row.model, row.arm) in NO_COMMON_DENOMINATOR:
            continue
        grid = like_paper(compare({"model": run_of_row(table, row)}), paper_rounding=True)
        assert grid.columns == ["", *row.cells, "Average"]
        assert list(csv.reader(io.StringIO(as_csv(grid))))[3] == ["model", *row.cells.values(), row.average]
        reproduced += 1
    assert reproduced == 14


def run_of_row(table, row):
    return run_of_counts({d: (table.count(row, d), n) for d, n in table.questions.items()})


def test_the_whole_published_table_comes_out_of_the_counts_behind_it():
    table = load_published()
    models = {m: {r.arm: run_of_row(table, r) for r in rows} for m, rows in table.models.items()}
    grid = like_paper_pairs(compare_models(models), paper_rounding=True, published=table)
    ours = [row for row in grid.rows if not row[0].startswith(("  ", "n", "chance", "published"))]
    theirs = [row for row in grid.rows if row[0].startswith("published") and len(row[0]) > 1]
    assert len(ours) == len(theirs) == 16
    off = 0
    for row, mine, printed in zip(table.rows, ours, theirs, strict=True):
        assert [cell.rstrip("‡") for cell in printed[1:-1]] == list(row.cells.values())
        if (row.model, row.arm) in NO_COMMON_DENOMINATOR:
            off += 1
            continue
        assert [cell.translate(UNMARKED) for cell in mine[1:-1]] == list(row.cells.values())
        average, _, gain = mine[-1].partition(" ")
        assert average == row.average
        if row.gain and (row.model, "base") not in NO_COMMON_DENOMINATOR:
            # All gains are printed to one decimal, but Janus-Pro's to two.
            assert gain == {"10.88": "↑10.9"}.get(row.gain, f"↑{row.gain}")
            assert printed[-1] == f"{average} ↑{row.gain}"
    assert off == 2
    assert sum(cell.endswith("‡") for row in theirs for cell in row) == 3
    note = next(note for note in grid.notes if note.startswith("‡"))
    assert "InstructBLIP base AMD 80.17; InstructBLIP base Glaucoma 59.30; LLaVA-Med base DME 16.67" in note
    assert grid.rows[-1][:4] == ["n (published, inferred)", "171", "20", "7"]


def test_three_arms_of_two_models_stand_in_one_table(comparison):
    runs = {
        "base": {"DR": (10, 40), "CSR": (0, 7)},
        "ft": {"DR": (8, 40), "CSR": (0, 7)},
        "mgll": {"DR": (20, 40), "CSR": (1, 7)},
    }
    arms = {name: run_of_counts(counts) for name, counts in runs.items()}
    grid = like_paper_pairs(compare_models({"LLaVA": arms, "Other": dict(reversed(arms.items()))}))
    names = [row[0] for row in grid.rows if not row[0].startswith("  ")]
    assert names == ["n", "chance", "LLaVA (base)", "+ ft", "+ mgll", "Other (mgll)", "+ ft", "+ base"]
    assert grid.rows[6] == ["+ mgll", "50.0*", "14.3†°", "32.1 ↑19.6"]
    assert grid.rows[-2] == ["+ base", "25.0*°", "0.0†°", "12.5 ↓19.6"]
    assert any(note.startswith("mgll against ft: Average +22.1 [") for note in grid.notes)
    assert r"32.1 $\uparrow$19.6" in as_latex(grid)
    beside = like_paper_pairs(compare_models({"": arms}), published=load_published())
    assert (
        sum(row[0].startswith("published") for row in beside.rows) == 16
    )  # no model of that name: all of them
    assert next(row for row in beside.rows if row[0] == "published: + mgll")[1:] == ["82.55", "28.57", "–"]
    assert any("over other diseases" in note for note in beside.notes)


def test_small_p_values_are_written_without_an_equals_sign():
    runs = {"base": (30, 100), "control": (40, 100), "mgll": (90, 100)}
    arms = {name: run_of_counts({"DR": counts}) for name, counts in runs.items()}
    found = compare(arms)
    grids = [by_disease(found), like_paper(found), like_paper_pairs({"": found})]
    texts = [render(grid) for grid in grids for render in (as_text, as_markdown)]
    assert all("p < 0.001" in text for text in texts[2:])  # the notes of the paper's layouts
    assert all("<0.001" in text for text in texts[:2])  # a column headed p
    assert not any("= <" in text or "= &lt;" in text or "= –" in text for text in texts)
    assert "mgll against base: Average" in texts[0]
    assert ", p < 0.001." in next(note for note in grids[0].notes if note.startswith("mgll against base"))


def test_the_long_table_has_every_figure_once(comparison):
    grid = long_table({"m": comparison})
    rows = [dict(zip(grid.columns, row, strict=True)) for row in grid.rows]
    assert len(rows) == 3 * 4
    dr = next(row for row in rows if (row["arm"], row["disease"]) == ("mgll", "DR"))
    assert (dr["n"], dr["right"], dr["accuracy"], dr["gain"], dr["p"]) == (
        "40",
        "20",
        "0.5",
        "0.25",
        "0.00195312",
    )
    assert float(dr["p_guess"]) == pytest.approx(binom.sf(19, 40, 0.25), rel=1e-5)
    assert next(row for row in rows if row["disease"] == "macro")["gain"] == ""


def test_replies_that_were_not_read_have_a_column(comparison):
    run = run_of_counts({"DR": (10, 40), "CSR": (0, 7)})
    rows = [
        row.model_copy(update={"chosen": None, "probabilities": [0.0] * 4}) if row.id == "CSR-3" else row
        for row in run.rows
    ]
    unread = type(run)(run.folder, run.record.model_copy(update={"mode": "generate"}), rows)
    grid = by_disease(compare({"x": unread}))
    assert column(grid, "unread") == {"DR": "0", "CSR": "1", "Average": "1", "All questions": "1"}
    assert any("1 of 47 replies could not be parsed and count as wrong" in check for check in grid.checks)
    assert not any("calibration" in check for check in grid.checks)
    assert ["x: unread", "0", "1", "1"] in like_paper(compare({"x": unread})).rows


def test_half_up_needs_decimal_arithmetic():
    assert str(PaperRounding().gain(Decimal("72.73"), Decimal("79.98"), 0.0725, 1)) == "7.3"
    assert f"{79.98 - 72.73:.1f}" == "7.2"  # what the paper's 7.3 becomes in binary floats
    assert str(Rounding().cell(1 / 16)) == "6.3"


@pytest.fixture
def comparison():
    base = run_of_counts({"DR": (10, 40), "CSR": (0, 7)})
    better = run_of_counts({"DR": (20, 40), "CSR": (1, 7)})
    worse = run_of_counts({"DR": (8, 40), "CSR": (0, 7)})
    return compare({"base": base, "ft": worse, "mgll": better})


def test_a_table_worked_out_by_hand(comparison):
    grid = by_disease(comparison)
    assert [row[0] for row in grid.rows] == ["DR", "CSR", "Average", "All questions"]
    assert column(grid, "n") == {"DR": "40", "CSR": "7", "Average": "47", "All questions": "47"}
    assert column(grid, "chance")["Average"] == "25.0"
    base = column(grid, "base")
    assert base["DR"] == "25.0° [14.2, 40.2]"
    assert base["CSR"] == "0.0†° [0.0, 35.4]"
    assert base["Average"].startswith("12.5 ")  # (25 + 0) / 2, not 10 / 47
    assert base["All questions"].startswith("21.3° ")  # 10 / 47
    assert column(grid, "mgll")["Average"].startswith("32.1 ")  # (50 + 14.29) / 2
    assert column(grid, "mgll over base")["DR"].startswith("+25.0 ")
    assert column(grid, "mgll over base")["Average"].startswith("+19.6 ")
    assert column(grid, "ft over base")["DR"].startswith("-5.0 ")  # losses are shown as well
    assert column(grid, "ft over base")["CSR"].startswith("0.0 ")
    first, second = (i for i, heading in enumerate(grid.columns) if heading == "p")
    assert [row[second] for row in grid.rows] == [
        "0.004",
        "1.000",
        "–",
        "<0.001",
    ]  # 2 * 2 * 0.5**10; 2 * 0.5**11
    assert grid.rows[0][first] == "1.000"  # 2 losses, no win: 0.5, times 2 for Holm


def test_the_layout_of_the_paper_has_the_average_last(comparison):
    grid = like_paper(comparison)
    assert grid.columns == ["", "DR", "CSR", "Average"]
    assert [row[0] for row in grid.rows] == [
        "n", "chance", "base", "base: 95% interval",
        "ft", "ft: 95% interval", "ft over base", "ft over base: 95% interval", "ft over base: p",
        "mgll", "mgll: 95% interval", "mgll over base", "mgll over base: 95% interval", "mgll over base: p",
    ]  # fmt: skip
    assert grid.rows[9] == ["mgll", "50.0*", "14.3†°", "32.1"]
    assert any("CSR (7)" in note for note in grid.notes)
    assert any(note.startswith("base, all questions (micro): 21.3 ") for note in grid.notes)


def test_every_format_shows_the_same_figures(comparison):
    grid = like_paper(comparison)
    assert list(csv.reader(io.StringIO(as_csv(grid)))) == [
        grid.columns, *([cell.translate(UNMARKED) for cell in row] for row in grid.rows)
    ]  # fmt: skip
    assert not set("*†°") & set(as_csv(grid))
    markdown = as_markdown(grid).splitlines()
    assert markdown[2] == "|  | DR | CSR | Average |"
    assert "| mgll | 50.0* | 14.3†° | 32.1 |" in markdown
    latex = as_latex(grid)
    assert r"mgll & 50.0* & 14.3\textdagger{}$^\circ$ & 32.1 \\" in latex
    assert r"base: 95\% interval" in latex
    assert latex.count(r"\midrule") == 4
    terminal = as_text(by_disease(comparison))
    assert "25.0° [14.2, 40.2]" in terminal
    assert "0.0†° [0.0, 35.4]" in terminal
    assert any(note.startswith("° Guessing reaches") for note in grid.notes)


def test_a_narrow_terminal_gets_several_tables_and_whole_figures(comparison):
    grid = by_disease(comparison)
    narrow, wide = (Console(file=io.StringIO(), width=width, color_system=None) for width in (80, 200))
    assert len(terminal_table(grid).parts(wide, 200)) == 1
    parts = terminal_table(grid).parts(narrow, 80)
    assert len(parts) == len(comparison.arms) - 1
    show(grid, narrow)
    lines = [line for line in narrow.file.getvalue().splitlines() if "Questions" not in line]
    for row in grid.rows:
        for cell in row[3:]:
            value, _, interval = cell.partition(" [")
            assert any(value in line for line in lines)
            assert any(f"[{interval}".replace(", ", ",") in line for line in lines), (
                "no figure is broken or cut"
            )


def test_names_with_signs_of_markdown_or_latex_stay_names():
    grid = like_paper(compare({"a|b_c & 100%": run_of_counts({"D#1": (1, 2), "E": (1, 1)})}))
    assert r"| a\|b_c & 100% |" in as_markdown(grid)
    assert r"a|b\_c \& 100\% & " in as_latex(grid)
    assert r"D\#1" in as_latex(grid)
    assert "a|b_c & 100%" in as_text(grid)


def test_names_with_brackets_are_no_markup():
    run = run_of_counts({"[/DR]": (1, 2), "E [late]": (1, 1)})
    run = type(run)(run.folder, run.record.model_copy(update={"bench_name": "[/b]"}), run.rows)
    text = as_text(by_disease(compare({"[red]a": run, "[/b]": run})))
    for name in ("[/DR]", "E [late]", "[/b]: accuracy", "[red]a", "[/b] over [red]a"):
        assert name in text


def test_a_model_that_does_not_answer_with_letters_is_pointed_out(comparison):
    silent = run_of_counts({"DR": (10, 40), "CSR": (0, 7)})
    silent = type(silent)(
        silent.folder, silent.record, [a.model_copy(update={"letter_mass": 0.01}) for a in silent.rows]
    )
    assert any(
        "silent rarely answers with letters" in check
        for check in like_paper(compare({"silent": silent})).checks
    )
    assert not any("hardly" in check for check in like_paper(comparison).checks)


def test_the_order_of_the_answers_in_the_file_does_not_matter():
    run = run_of_counts({"DR": (10, 40), "CSR": (3, 7)})
    backwards = type(run)(run.folder, run.record, run.rows[::-1])
    assert compare({"x": backwards}) == compare({"x": run})


def test_runs_of_different_benches_are_not_compared():
    a, b = run_of_counts({"DR": (1, 2)}), run_of_counts({"DR": (1, 2)}, bench="c" * 64)
    with pytest.raises(MismatchError, match="differ in their bench"):
        compare({"a": a, "b": b})


def test_runs_that_answer_different_questions_are_not_compared():
    a, b = run_of_counts({"DR": (1, 2)}), run_of_counts({"DR": (1, 3)})
    with pytest.raises(MismatchError, match=r"answers 2 of 2 .* 3 of 3 .*'DR-2'.*same `limit`"):
        compare({"a": a, "b": b})


def test_a_partial_run_says_so():
    run = run_of_counts({"DR": (1, 2)})
    record = run.record.model_copy(update={"questions": 5, "categories": ["DR", "AMD"]})
    notes = by_disease(compare({"x": type(run)(run.folder, record, run.rows)})).notes
    assert any("Only 2 of the benchmark's 5 questions" in note for note in notes)
    assert any("not in the Average: AMD" in note for note in notes)
