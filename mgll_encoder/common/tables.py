"""Label tables: CSV files that people have."""

import csv
from collections.abc import Iterable
from pathlib import Path

from mgll_encoder.common.errors import UserError


def read_table(path: Path, option: str) -> tuple[list[dict[str, str]], list[str]]:
    """Read a label file.

    Args:
        path: UTF-8 CSV with a header line; a byte-order mark does not matter.
        option: The option that named it, for the error message.

    Returns:
        Its rows (the first one is row 2 of the file), and its columns.

    Raises:
        UserError: it is missing, or no UTF-8 CSV.
    """
    if not path.is_file():
        raise UserError(f"label file {path} does not exist or is not a file: check {option}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restval="")
            return list(reader), list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"label file {path} is not a UTF-8 CSV: {error}") from None


def check_columns(path: Path, found: Iterable[str], wanted: Iterable[tuple[str, str | None]]) -> None:
    """Refuse a table that lacks a column.

    Args:
        path: The table, for the error message.
        found: Its columns.
        wanted: What asks for a column (an option), and the column; None where none is asked for.

    Raises:
        UserError: one is missing.
    """
    columns = list(found)
    for asked_by, column in wanted:
        if column is not None and column not in columns:
            raise UserError(
                f"label file {path} has no column '{column}' ({asked_by}): its columns are {', '.join(columns)}"
            )
