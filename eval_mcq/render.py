"""Drawing a table: terminal, Markdown, CSV, LaTeX."""

import csv
import io
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from eval_mcq.tables import Grid

PLAIN_WIDTH = 200
"""Width of a terminal table that goes into a file."""

LATEX_SPECIAL = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"$<$",
        ">": r"$>$",
    }
    | {character: f"\\{character}" for character in "&%$#_{}"}
    | {"–": "--"}
)


def rich_table(grid: Grid) -> Table:
    """The table for a terminal, without its notes."""
    table = Table(title=grid.title, title_justify="left", header_style="bold")
    for i, column in enumerate(grid.columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for number, row in enumerate(grid.rows):
        if number in grid.breaks:
            table.add_section()
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def show(grid: Grid, console: Console) -> None:
    """Print the table and its notes to a terminal."""
    console.print(rich_table(grid))
    for note in [*grid.notes, *grid.checks]:
        console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)


def as_text(grid: Grid) -> str:
    """The terminal table as plain text."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None)
    show(grid, console)
    text = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def as_markdown(grid: Grid) -> str:
    """A GitHub table with the notes as a list."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(grid.columns) - 1)
    rows = [line(grid.columns), rule, *(line(row) for row in grid.rows)]
    return (
        "\n".join(
            [f"**{grid.title}**", "", *rows, "", *(f"- {note}" for note in [*grid.notes, *grid.checks])]
        )
        + "\n"
    )


def as_csv(grid: Grid) -> str:
    """Headings and rows; notes have no place in a CSV and stay in ``summary.json`` and the other formats."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([grid.columns, *grid.rows])
    return stream.getvalue()


def as_latex(grid: Grid) -> str:
    """A table for the package booktabs, with the notes in the caption and the checks as comments."""

    def line(cells: list[str]) -> str:
        return " & ".join(cell.translate(LATEX_SPECIAL) for cell in cells) + r" \\"

    body = []
    for number, row in enumerate(grid.rows):
        body += ([r"\midrule"] if number in grid.breaks else []) + [line(row)]
    caption = " ".join([f"{grid.title}.", *grid.notes]).translate(LATEX_SPECIAL)
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
