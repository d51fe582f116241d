"""Rendering of tables: terminal, Markdown, CSV, LaTeX."""

import csv
import io
from collections.abc import Callable, Mapping

from rich.console import Console

from eval_mcq.tables.entries import MARKS
from eval_mcq.tables.table_layout import Grid
from mgll_encoder.common.terminal_table import TerminalTable

PLAIN_WIDTH = 200
"""Width of a terminal table written to a file."""

LATEX_SPECIAL = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"$<$",
        ">": r"$>$",
    }
    | {character: f"\\{character}" for character in "&%$#_{}"}
    | {
        "–": "--",
        "±": r"$\pm$",
        "†": r"\textdagger{}",
        "‡": r"\textdaggerdbl{}",
        "°": r"$^\circ$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
    }
)

UNMARKED = str.maketrans("", "", MARKS)


def terminal_table(grid: Grid) -> TerminalTable:
    """Render the table for a terminal, without its notes."""
    table = TerminalTable(grid.title, fixed=grid.fixed, group=grid.group)
    table.add_words(grid.columns[0]).add_figures(*grid.columns[1:])
    for number, row in enumerate(grid.rows):
        if number in grid.breaks:
            table.add_section()
        table.add_row(*row)
    return table


def show(grid: Grid, console: Console) -> None:
    """Print the table and its notes to a terminal."""
    console.print(terminal_table(grid))
    for line in grid.headline:
        console.print(line, style="bold", highlight=False, markup=False, soft_wrap=True)
    for note in [*grid.notes, *grid.checks]:
        console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)


def as_text(grid: Grid) -> str:
    """Render the terminal table as plain text."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None)
    show(grid, console)
    text = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def as_markdown(grid: Grid) -> str:
    """Render a GitHub table, with headline and notes as a list."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    lines = [*(f"**{line}**" for line in grid.headline), *grid.notes, *grid.checks]
    rule = "|---|" + "---:|" * (len(grid.columns) - 1)
    rows = [line(grid.columns), rule, *(line(row) for row in grid.rows)]
    return "\n".join([f"**{grid.title}**", "", *rows, "", *(f"- {line}" for line in lines)]) + "\n"


def as_csv(grid: Grid) -> str:
    """Render headings and rows as CSV, without marks and notes."""
    stream = io.StringIO()
    rows = [[row[0], *(cell.translate(UNMARKED) for cell in row[1:])] for row in grid.rows]
    csv.writer(stream, lineterminator="\n").writerows([grid.columns, *rows])
    return stream.getvalue()


def as_latex(grid: Grid) -> str:
    """Render a LaTeX table (booktabs), with the notes in the caption and the checks as comments."""

    def line(cells: list[str]) -> str:
        return " & ".join(cell.translate(LATEX_SPECIAL) for cell in cells) + r" \\"

    body = []
    for number, row in enumerate(grid.rows):
        body += ([r"\midrule"] if number in grid.breaks else []) + [line(row)]
    caption = " ".join([f"{grid.title}.", *grid.headline, *grid.notes]).translate(LATEX_SPECIAL)
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            *(f"% {check}" for check in grid.checks),
            r"\begin{table}",
            r"\centering\scriptsize",
            rf"\caption{{{caption}}}",
            r"\begin{tabular}{l" + "r" * (len(grid.columns) - 1) + "}",
            r"\toprule",
            line(grid.columns),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


RENDERERS: Mapping[str, Callable[[Grid], str]] = {
    "rich": as_text,
    "markdown": as_markdown,
    "csv": as_csv,
    "latex": as_latex,
}
