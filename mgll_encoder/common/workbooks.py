"""Tables in binary files: Excel workbooks (through pandas) and Parquet (through pyarrow)."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import BadDataError, UserError, unknown_name
from mgll_encoder.common.extras import require


@dataclass(frozen=True)
class Sheet:
    """The cells of a table.

    Attributes:
        lines: Its rows, the header first, padded to equal length.
        name: Name of the sheet; empty if the file has only one table.
        others: Names of the other sheets.
    """

    lines: list[list[str]]
    name: str = ""
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A file format.

    Attributes:
        name: Its name in messages.
        sheets: Whether it has sheets.
        read: Reads the sheet of the given name (None: the first).
    """

    name: str
    sheets: bool
    read: Callable[[Path, str | None], Sheet]


def kind_of(path: Path) -> Kind | None:
    """Detect the format of a file from its first bytes; None for text."""
    with path.open("rb") as stream:
        start = stream.read(8)
    return next((kind for mark, kind in _KINDS.items() if start.startswith(mark)), None)


def _excel(path: Path, wanted: str | None, engine: Any) -> Sheet:
    require("excel", f"label file {path}, an Excel workbook,", "pandas", engine)
    import pandas as pd

    try:
        with pd.ExcelFile(path, engine=engine) as book:
            names = [str(name) for name in book.sheet_names]
            name = names[0] if wanted is None else wanted
            if name not in names:
                raise unknown_name(f"sheet of label file {path}", name, names)
            frame = book.parse(name, header=None, dtype=str, keep_default_na=False)
    except UserError:
        raise
    except ImportError:  # a version that pandas does not support
        raise BadDataError(
            f"label file {path}, an Excel workbook, needs {engine}: pip install 'mgll-mllm[excel]', or save it as CSV"
        ) from None
    except Exception as error:  # damaged workbooks raise errors of any kind
        raise BadDataError(
            f"label file {path} is a damaged or locked Excel workbook ({error}): save it again, without a "
            "password, or as CSV"
        ) from None
    lines = [["" if pd.isna(cell) else str(cell) for cell in row] for row in frame.itertuples(index=False)]
    return Sheet(lines, name, tuple(other for other in names if other != name))


def _parquet(path: Path, _: str | None) -> Sheet:
    require("excel", f"label file {path}, a Parquet file,", "pyarrow")
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, use_threads=False)
        rows = [[_as_text(cell) for cell in row.values()] for row in table.to_pylist()]
    except Exception as error:  # damaged files raise errors of any kind
        raise BadDataError(
            f"label file {path} is damaged Parquet ({error}): write or copy it again"
        ) from None
    return Sheet([list(table.column_names), *rows])


def _as_text(cell: Any) -> str:
    if isinstance(cell, list):
        return json.dumps(cell, default=str)
    return "" if cell is None else str(cell)


_KINDS = {
    b"PK\x03\x04": Kind("an Excel workbook", True, lambda path, sheet: _excel(path, sheet, "openpyxl")),
    b"\xd0\xcf\x11\xe0": Kind("an Excel workbook", True, lambda path, sheet: _excel(path, sheet, "xlrd")),
    b"PAR1": Kind("Parquet", False, _parquet),
}
"""First bytes -> file format."""
