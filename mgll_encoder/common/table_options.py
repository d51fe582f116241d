"""Options of all commands that read a label table; docs/tables.md describes what is read."""

from typing import Annotated

import typer

from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.common.tables import TableOptions, Uncertain

Encoding = Annotated[
    str | None,
    typer.Option(
        "--encoding", help="Encoding of a text table that is not UTF-8, such as cp1252 (Excel on Windows)."
    ),
]
Sheet = Annotated[
    str | None, typer.Option("--sheet", help="Sheet of a workbook, by its name (default: the first).")
]
BinaryColumns = Annotated[
    str,
    typer.Option(
        "--binary-columns",
        help="Columns that each represent one label (1, 0, yes, no, blank ...), separated by commas, instead of "
        "--labels-column.",
    ),
]
LabelSeparator = Annotated[
    str | None,
    typer.Option(
        "--label-separator",
        help="Separator of the labels in a cell; none: a cell is one label (default: detected among ';', '|', ',' "
        "and lists in brackets).",
    ),
]
UncertainCells = Annotated[
    Uncertain,
    typer.Option(
        "--uncertain",
        help="How to count a cell with -1, uncertain or nan; ignore: neither for nor against its label.",
    ),
]


def listed(columns: str) -> tuple[str, ...]:
    """Split an option's comma-separated column names."""
    return tuple(name.strip() for name in columns.split(",") if name.strip())


def reading(
    encoding: str | None, sheet: str | None, label_separator: str | None, uncertain: Uncertain
) -> TableOptions:
    """Build the table options from the values on the command line.

    Raises:
        UserError: the separator is empty.
    """
    if label_separator == "":
        raise InvalidArgumentError(
            "--label-separator is empty: expected a character such as ',', or none if a cell is one label"
        )
    return TableOptions(encoding, sheet, label_separator, uncertain)
