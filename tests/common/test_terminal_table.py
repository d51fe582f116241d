"""Tables at every width: all figures and all names are there, whole."""

import ast
import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from mgll_encoder.common.terminal_table import LONGEST_WORD, TerminalTable
from tests.environments import ROOT

WIDTHS = (60, 80, 200)


def drawn(table: TerminalTable, width: int) -> str:
    """A table as it is printed to a file or a pipe of that width."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def check_whole(table: TerminalTable, width: int) -> None:
    """No cell has lost anything, no figure is broken, and no line is too long."""
    text = drawn(table, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    words = set(re.sub(r"[│┃]", " ", text).split())
    for column in table.columns:
        for cell in (str(column.header) if table.show_header else "", *map(str, column.cells)):
            narrow = cell.replace(" [", " \n[").replace(", ", ",")  # an interval may stand below its value
            for word in cell.split():
                assert word in words or len(word) > LONGEST_WORD or set(narrow.split()) <= words, (word, text)


def many_columns() -> TerminalTable:
    table = TerminalTable("Answers [of] two models").add_words("disease", "what it is")
    table.add_figures("questions", "accuracy of the model", "gain", "p value", "seconds", "parameters")
    for disease in ("glaucoma", "diabetic retinopathy", "a/long/path/to/some/place/that/folds.png"):
        table.add_row(
            disease, "words that may wrap", "1,234,567", "66.7 [39.1, 86.2]", "+4.5 [1.2, 3.3]", "<0.001",
            "12.5", "7,062,902,784",
        )  # fmt: skip
    table.add_section()
    table.add_row("all", "", "9", "", "", "", "", "")
    return table


@pytest.mark.parametrize("width", [40, *WIDTHS])
def test_no_figure_and_no_name_is_cut(width: int) -> None:
    check_whole(many_columns(), width)


def test_a_wide_terminal_gets_one_table_and_a_narrow_one_several_with_the_names() -> None:
    assert drawn(many_columns(), 200).count("disease") == 1
    narrow = drawn(many_columns(), 60)
    assert narrow.count("disease") == narrow.count("glaucoma") > 1
    assert narrow.count("Answers [of] two models") == 1, "brackets are no markup"


def test_columns_that_belong_together_are_not_parted() -> None:
    table = (
        TerminalTable(group=2)
        .add_words("name")
        .add_figures(*(f"{name}{i}" for i in range(6) for name in "ab"))
    )
    table.add_row("x", *("1234567" for _ in range(12)))
    for part in table.parts(Console(width=60), 60):
        assert (len(part.columns) - 1) % 2 == 0


def test_a_width_that_nothing_fits_folds_and_still_loses_nothing() -> None:
    table = TerminalTable().add_words("").add_figures("bytes")
    table.add_row(Text("diabetic_retinopathy", "bold"), "7,062,902,784")
    text = "".join(drawn(table, 16).split())
    assert {"7", "8", "4"} <= set(text)
    assert "…" not in text


def test_every_table_of_the_project_is_of_this_kind() -> None:
    """Rich's own tables cut what does not fit; its grids, without lines, fold."""
    using = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for package in ("mgll_encoder", "mllm_adapters", "eval_mcq", "scripts")
        for file in (ROOT / package).rglob("*.py")
        if file.name != "terminal_table.py" and "rich.table" in file.read_text("utf-8")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Table"
    ]
    assert using == []
    assert Path(ROOT / "mgll_encoder" / "common" / "terminal_table.py").is_file()
