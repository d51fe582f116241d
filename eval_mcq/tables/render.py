"""Rendering of tables: terminal, Markdown, CSV, LaTeX."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from eval_mcq.tables.entries import MARKS
from eval_mcq.tables.table_layout import Grid

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


def rich_tables(grid: Grid, console: Console) -> list[Table]:
    """Render the table for a terminal, without its notes.

    If it is too wide, intervals are put below their values; if that is not enough, it is split into several tables that
    repeat its first columns.
    """
    whole = _table(grid, range(len(grid.columns)), " ")
    if _width(whole, console) <= console.width:
        return [whole]
    parts: list[list[int]] = []
    for start in range(grid.fixed, len(grid.columns), grid.group):
        group = list(range(start, min(start + grid.group, len(grid.columns))))
        wider = [*parts[-1], *group] if parts else []
        if parts and _width(_table(grid, wider, "\n"), console) <= console.width:
            parts[-1] = wider
        else:
            parts.append([*range(grid.fixed), *group])
    return [_table(grid, columns, "\n") for columns in parts or [list(range(len(grid.columns)))]]


def _table(grid: Grid, columns: Sequence[int], gap: str) -> Table:
    # As `Text`: brackets in names are not markup.
    table = Table(title=Text(grid.title), title_justify="left", header_style="bold")
    if gap != " ":  # save width
        table.box, table.pad_edge, table.collapse_padding = box.SIMPLE_HEAD, False, True
    for i in columns:
        table.add_column(Text(grid.columns[i]), justify="left" if i == 0 else "right")
    for number, row in enumerate(grid.rows):
        if number in grid.breaks:
            table.add_section()
        cells = (
            row[i] if gap == " " else row[i].replace(" [", f"{gap}[").replace(", ", ",") for i in columns
        )
        table.add_row(*map(Text, cells))
    return table


def _width(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def show(grid: Grid, console: Console) -> None:
    """Print the table and its notes to a terminal."""
    for table in rich_tables(grid, console):
        console.print(table)
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
