"""Label tables: CSV and Excel files that people have."""

import csv
from collections.abc import Iterable
from pathlib import Path
from zipfile import BadZipFile

from mgll_encoder.common.errors import UserError, did_you_mean

EXCEL = ".xlsx"


def read_table(path: Path, option: str) -> tuple[list[dict[str, str]], list[str]]:
    """Read a label file.

    Args:
        path: UTF-8 CSV with a header line (a byte-order mark does not matter), or an Excel file whose first sheet
            is such a table.
        option: The option that named it, for the error message.

    Returns:
        Its rows (the first one is row 2 of the file), and its columns.

    Raises:
        UserError: it is missing, or neither a UTF-8 CSV nor an Excel file.
    """
    if not path.is_file():
        raise UserError(f"label file {path} does not exist or is not a file: check {option}")
    if path.suffix.lower() == EXCEL:
        return _read_excel(path)
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
                f"label file {path} has no column '{column}' ({asked_by}): {did_you_mean(column, columns)}"
                f"its columns are {', '.join(columns)}"
            )


def _read_excel(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    import pandas as pd

    try:
        sheet = pd.read_excel(path, dtype=str, keep_default_na=False, engine="openpyxl")
    except ImportError:
        raise UserError(
            f"label file {path} is an Excel file: pip install openpyxl to read it, or save it as CSV"
        ) from None
    except (ValueError, KeyError, OSError, BadZipFile) as error:
        raise UserError(f"label file {path} is not an Excel file: {error}") from None
    columns = [str(name) for name in sheet.columns]
    return [dict(zip(columns, row, strict=True)) for row in sheet.itertuples(index=False)], columns
