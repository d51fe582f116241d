"""Label tables in common formats: delimited text (CSV, TSV), Excel workbooks, Parquet.

The format is detected from the content. Anything detected beyond a plain UTF-8 CSV is logged once.
"""

import codecs
import csv
import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mgll_encoder.common import workbooks
from mgll_encoder.common.errors import BadDataError, InvalidArgumentError, NotFoundError, did_you_mean
from mgll_encoder.common.skipped import Skipped

_logger = logging.getLogger(__name__)

Uncertain = Literal["ignore", "positive", "negative"]

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""Column delimiters; on a tie the first wins."""

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)
"""First line that declares the delimiter to Excel."""

_LOOKED_AT = 50
"""Number of rows from which the delimiter is detected."""


@dataclass(frozen=True)
class TableOptions:
    """What the user specifies about a label table, if the file does not.

    Attributes:
        encoding: Encoding of a text file; None for UTF-8, or UTF-16 and UTF-32 with a byte order mark.
        sheet: Sheet of a workbook; None for the first.
        label_separator: Separator of the labels in a cell; None to detect it, ``none`` if a cell is one label.
        uncertain: How uncertain cells count, see `mgll_encoder.data.label_cells`.
    """

    encoding: str | None = None
    sheet: str | None = None
    label_separator: str | None = None
    uncertain: Uncertain = "ignore"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        path: Its file.
        columns: Names of its columns.
        rows: Number of each row in the file (that of the header is 1), and its cells by column.
        sheet: The sheet it comes from; empty if the file has only one table.
        others: Names of the other sheets.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[int, dict[str, str]]] = field(repr=False)
    sheet: str = ""
    others: tuple[str, ...] = ()

    def where(self, number: int) -> str:
        """Return the location of a row for messages."""
        return f"label file {self.path} row {number}"

    def check_columns(self, wanted: Iterable[tuple[str, str | None]]) -> None:
        """Refuse a table that lacks a column.

        Args:
            wanted: Pairs of what asks for a column (an option) and the column; None if none is asked for.

        Raises:
            UserError: a column is missing.
        """
        for asked_by, column in wanted:
            if column is not None and column not in self.columns:
                raise BadDataError(
                    f"label file {self.path} has no column '{column}' ({asked_by}): "
                    f"{did_you_mean(column, self.columns)}its columns are {', '.join(self.columns)}{self._elsewhere}"
                )

    @property
    def _elsewhere(self) -> str:
        if not self.others:
            return ""
        return f"; that is sheet '{self.sheet}', `sheet` chooses another: {', '.join(self.others)}"


def read_table(
    path: Path, option: str, skipped: Skipped | None = None, reading: TableOptions | None = None
) -> Table:
    """Read a label table.

    Args:
        path: Text with a header line and columns separated by commas, semicolons, tabs or bars; an Excel workbook
            (.xlsx, .xls); or Parquet.
        option: The option that named it, for the error message.
        skipped: Collects rows with more or fewer cells than columns, and counts all rows; None: stop at the first.
        reading: What the file does not specify itself.

    Raises:
        UserError: it is missing, is not a table, has another encoding, has duplicate columns, has no sheet of that
            name or, if ``skipped`` is strict or None, a row has more or fewer cells than there are columns.
    """
    if not path.is_file():
        raise NotFoundError(f"label file {path} does not exist or is not a file: check {option}")
    skipped, reading = skipped or Skipped(strict=True), reading or TableOptions()
    book = workbooks.kind_of(path)
    if book and reading.encoding:
        raise InvalidArgumentError(
            f"`encoding` has no effect on label file {path}, which is {book.name}: leave it out"
        )
    if reading.sheet is not None and not (book and book.sheets):
        raise InvalidArgumentError(
            f"`sheet` has no effect on label file {path}, which is not an Excel workbook: leave it out"
        )
    if book:
        sheet = book.read(path, reading.sheet)
        lines: Iterable[tuple[int, list[str] | str]] = enumerate(sheet.lines, start=1)
    else:
        sheet = workbooks.Sheet([])
        lines = _text_lines(path, reading.encoding)
    if sheet.others:
        others = ", ".join(f"'{name}'" for name in sheet.others)
        _logger.info(f"{path.name}: sheet '{sheet.name}' is read, not {others} (`sheet` chooses)")
    numbered = iter(lines)
    columns = _columns(path, numbered)
    table = Table(path, columns, [], sheet.name, sheet.others)
    for number, cells in numbered:
        _take(table, number, cells, skipped)
    return table


def _take(table: Table, number: int, cells: list[str] | str, skipped: Skipped) -> None:
    """Add a row to the table, or to the skipped rows; blank rows are ignored."""
    if not isinstance(cells, str) and not any(cell.strip() for cell in cells):
        return
    skipped.read += 1
    if isinstance(cells, str):
        skipped.add("row with stray quotes", f"{table.where(number)}: {cells}")
    elif len(cells) != len(table.columns):
        more = "more" if len(cells) > len(table.columns) else "fewer"
        skipped.add(
            f"row with {more} cells than columns",
            f"{table.where(number)} has {len(cells)} cells, expected {len(table.columns)} as in the header: "
            "quote cells that contain a separator",
        )
    else:
        table.rows.append((number, dict(zip(table.columns, cells, strict=True))))


def _columns(path: Path, lines: Iterator[tuple[int, list[str] | str]]) -> tuple[str, ...]:
    _, header = next(lines, (1, []))
    if isinstance(header, str):
        raise BadDataError(f"label file {path} row 1: {header}")
    columns = tuple(name.strip() for name in header)
    if not any(columns):
        raise BadDataError(
            f"label file {path} is empty: expected a header line with the names of its columns"
        )
    twice = [name for name, count in Counter(columns).items() if count > 1 and name]
    if twice:
        raise BadDataError(
            f"label file {path} has two columns '{twice[0]}': rename or remove one, because they may differ"
        )
    return columns


def _text_lines(path: Path, encoding: str | None) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the number and cells of each row of a text file, or what is wrong with its quotes."""
    text = _decoded(path, encoding)
    declared = _SEPARATOR_LINE.match(text)
    text = text[declared.end() :] if declared else text
    delimiter = declared[1] if declared else _delimiter(text)
    if delimiter != ",":
        _logger.info(f"{path.name}: columns are separated by {DELIMITERS.get(delimiter, repr(delimiter))}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number, above = 1, 0
    while True:
        try:
            cells: list[str] | str = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > above + 1 or "end of data" in str(error):
                raise BadDataError(
                    f"label file {path} row {number}: the quote opened on line {above + 1} is not closed at the "
                    f'end of a cell (line {reader.line_num}): write a quote within a cell as ""'
                ) from None
            cells = f'a quote does not end its cell: write a quote within a cell as "" ({error})'
        yield number, cells
        number, above = number + 1, reader.line_num


def _decoded(path: Path, encoding: str | None) -> str:
    content = path.read_bytes()
    codec = encoding or next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(codec).removeprefix("\ufeff")
    except LookupError:
        raise InvalidArgumentError(
            f"`encoding` is '{encoding}', which is not known: give one such as utf-8, cp1252, gb18030"
        ) from None
    except UnicodeDecodeError as error:
        if b"\0" not in content:
            raise BadDataError(
                f"label file {path} line {content[: error.start].count(10) + 1} is not {codec.upper()} text (byte "
                f"0x{content[error.start]:02X}): give its `encoding`, such as cp1252 where Excel saved it on Windows, "
                "or save it as 'CSV UTF-8'"
            ) from None
        text = content.decode("latin-1")
    if "\0" in text:
        raise BadDataError(
            f"label file {path} line {text[: text.index(chr(0))].count(chr(10)) + 1} contains a NUL character, which "
            "text does not have: the file is damaged, or give its `encoding`, such as utf-16-le"
        )
    return text


def _delimiter(text: str) -> str:
    """Return the delimiter for which most of the first rows have as many cells as the header, and more than one."""

    def fit(delimiter: str) -> tuple[int, int]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        counts = []
        try:
            for cells in reader:
                counts.append(len(cells))
                if len(counts) > _LOOKED_AT:
                    break
        except csv.Error:
            pass  # quotes are checked when the rows are read
        if not counts or counts[0] < 2:
            return 0, 0
        return counts.count(counts[0]), counts[0]

    return max(DELIMITERS, key=fit)


def listed(columns: str) -> tuple[str, ...]:
    """Split a text into column names at its commas."""
    return tuple(name.strip() for name in columns.split(",") if name.strip())
