import csv
import io
import itertools
from decimal import Decimal
from pathlib import Path

import pytest
from rich.console import Console

from eval_mcq.render import as_csv, as_latex, as_markdown, as_text, rich_tables, show
from eval_mcq.rounding import PaperRounding, Rounding, mean_of_printed
from eval_mcq.summary import compare
from eval_mcq.tables import by_disease, like_paper
from mgll_encoder.common.errors import UserError
from tests.eval_mcq.helpers import run_of_counts

PUBLISHED = Path(__file__).parent / "data" / "published_table2.csv"
QUESTIONS = (171, 20, 7, 149, 162, 31, 226, 9, 58, 12)
"""Question counts inferred from the published percentages."""

NO_COMMON_DENOMINATOR = {("InstructBLIP", "base"), ("LLaVA-Med", "base")}
"""Rows with a cell that is no k/n of its disease: 80.17, 59.30 and 16.67."""


def published() -> list[dict[str, str]]:
    lines = PUBLISHED.read_text().splitlines()
    assert lines[0].startswith("# Table 2 of Li")
    return list(csv.DictReader(lines[1:]))


def diseases(row: dict[str, str]) -> dict[str, str]:
    return dict(itertools.islice(row.items(), 2, 12))


def column(grid, heading: str) -> dict[str, str]:
    place = grid.columns.index(heading)
    return {row[0]: row[place] for row in grid.rows}


def test_all_published_averages_are_the_mean_of_the_printed_cells():
    rows = published()
    assert len(rows) == 16
    for row in rows:
        assert str(mean_of_printed([Decimal(cell) for cell in diseases(row).values()])) == row["Average"]


def test_all_published_gains_are_differences_of_the_rounded_averages():
    rows = published()
    for base, mgll in zip(rows[::2], rows[1::2], strict=True):
        printed = mgll["gain_printed"]
        places = len(printed.partition(".")[2])
        gain = PaperRounding().gain(Decimal(base["Average"]), Decimal(mgll["Average"]), 0.0, places)
        assert str(gain) == printed


def test_counts_of_right_answers_become_the_published_row():
    reproduced = 0
    for row in published():
        if (row["model"], row["arm"]) in NO_COMMON_DENOMINATOR:
            continue
        cells = diseases(row)
        counts = {
            d: (round(float(cell) * n / 100), n)
            for (d, cell), n in zip(cells.items(), QUESTIONS, strict=True)
        }
        grid = like_paper(compare({"model": run_of_counts(counts)}), paper_rounding=True)
        assert grid.columns == ["", *cells, "Average"]
        assert grid.rows[2] == ["model", *cells.values(), row["Average"]]
        reproduced += 1
    assert reproduced == 14


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
    assert base["DR"] == "25.0 [14.2, 40.2]"
    assert base["CSR"] == "0.0 [0.0, 35.4]"
    assert base["Average"].startswith("12.5 ")  # (25 + 0) / 2, not 10 / 47
    assert base["All questions"].startswith("21.3 ")  # 10 / 47
    assert column(grid, "mgll")["Average"].startswith("32.1 ")  # (50 + 14.29) / 2
    assert column(grid, "gain of mgll")["DR"].startswith("+25.0 ")
    assert column(grid, "gain of mgll")["Average"].startswith("+19.6 ")
    assert column(grid, "gain of ft")["DR"].startswith("-5.0 ")  # losses are shown as well
    assert column(grid, "gain of ft")["CSR"].startswith("0.0 ")
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
        "ft", "ft: 95% interval", "ft: gain", "ft: gain, 95% interval", "ft: p",
        "mgll", "mgll: 95% interval", "mgll: gain", "mgll: gain, 95% interval", "mgll: p",
    ]  # fmt: skip
    assert grid.rows[9] == ["mgll", "50.0", "14.3", "32.1"]
    assert any("CSR (7)" in note for note in grid.notes)
    assert any(note.startswith("base, all questions alike (micro): 21.3 ") for note in grid.notes)


def test_every_format_shows_the_same_figures(comparison):
    grid = like_paper(comparison)
    assert list(csv.reader(io.StringIO(as_csv(grid)))) == [grid.columns, *grid.rows]
    markdown = as_markdown(grid).splitlines()
    assert markdown[2] == "|  | DR | CSR | Average |"
    assert "| mgll | 50.0 | 14.3 | 32.1 |" in markdown
    latex = as_latex(grid)
    assert r"mgll & 50.0 & 14.3 & 32.1 \\" in latex
    assert r"base: 95\% interval" in latex
    assert latex.count(r"\midrule") == 4
    terminal = as_text(by_disease(comparison))
    assert "25.0 [14.2, 40.2]" in terminal
    assert "0.0 [0.0, 35.4]" in terminal


def test_a_narrow_terminal_gets_several_tables_and_whole_figures(comparison):
    grid = by_disease(comparison)
    narrow, wide = (Console(file=io.StringIO(), width=width, color_system=None) for width in (80, 200))
    assert len(rich_tables(grid, wide)) == 1
    parts = rich_tables(grid, narrow)
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


def test_a_model_that_does_not_answer_with_letters_is_pointed_out(comparison):
    silent = run_of_counts({"DR": (10, 40), "CSR": (0, 7)})
    silent = type(silent)(
        silent.folder, silent.record, [a.model_copy(update={"letter_mass": 0.01}) for a in silent.rows]
    )
    assert any(
        "silent hardly answers with letters" in check
        for check in like_paper(compare({"silent": silent})).checks
    )
    assert not any("hardly" in check for check in like_paper(comparison).checks)


def test_the_order_of_the_answers_in_the_file_does_not_matter():
    run = run_of_counts({"DR": (10, 40), "CSR": (3, 7)})
    backwards = type(run)(run.folder, run.record, run.rows[::-1])
    assert compare({"x": backwards}) == compare({"x": run})


def test_runs_of_different_benches_are_not_compared():
    a, b = run_of_counts({"DR": (1, 2)}), run_of_counts({"DR": (1, 2)}, bench="c" * 64)
    with pytest.raises(UserError, match="differ in their bench"):
        compare({"a": a, "b": b})


def test_runs_that_answer_different_questions_are_not_compared():
    a, b = run_of_counts({"DR": (1, 2)}), run_of_counts({"DR": (1, 3)})
    with pytest.raises(UserError, match=r"answer different questions.*'DR-2'"):
        compare({"a": a, "b": b})


def test_a_partial_run_says_so():
    run = run_of_counts({"DR": (1, 2)})
    record = run.record.model_copy(update={"questions": 5, "categories": ["DR", "AMD"]})
    notes = by_disease(compare({"x": type(run)(run.folder, record, run.rows)})).notes
    assert any("Only 2 of the bench's 5 questions" in note for note in notes)
    assert any("not in the Average: AMD" in note for note in notes)
