"""Options of every command that reads a label table; docs/tables.md says what is read."""

from typing import Annotated

import typer

from mgll_encoder.common.errors import UserError
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
        help="Columns that stand for one label each (1, 0, yes, no, blank ...), separated by commas, instead of "
        "--labels-column.",
    ),
]
LabelSeparator = Annotated[
    str | None,
    typer.Option(
        "--label-separator",
        help="What separates the labels in a cell; none: a cell is one label (default: recognized, of ';', '|', ',' "
        "and lists in brackets).",
    ),
]
UncertainCells = Annotated[
    Uncertain,
    typer.Option(
        "--uncertain",
        help="What a cell with -1, uncertain or nan counts as; ignore: neither for nor against its label.",
    ),
]


def listed(columns: str) -> tuple[str, ...]:
    """Names of columns from an option, where commas separate them."""
    return tuple(name.strip() for name in columns.split(",") if name.strip())


def reading(
    encoding: str | None, sheet: str | None, label_separator: str | None, uncertain: Uncertain
) -> TableOptions:
    """What the options say.

    Raises:
        UserError: the separator is empty.
    """
    if label_separator == "":
        raise UserError(
            "--label-separator is empty: expected a character such as ',', or none where a cell is one label"
        )
    return TableOptions(encoding, sheet, label_separator, uncertain)
