"""Reading other tools' files row by row: TSV, CSV, JSON, JSON Lines, or a folder of JSON files."""

import csv
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eval_mcq.items.schema import read_lines
from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.files import regular_file
from mgll_encoder.common.texts import parse_json, read_text


class SourceRow(NamedTuple):
    """One row of a file, and its location for error messages."""

    where: str
    cells: dict[str, Any]


def read_rows(path: Path) -> Iterator[SourceRow]:
    """Read the rows of a file, or of all JSON files in a folder, sorted by name.

    Raises:
        UserError: there is no such file, its suffix is unknown, or it is damaged; names file and row.
    """
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise BadDataError(
                f"folder {path} contains no .json file: give the folder with the question files"
            )
        for file in files:
            yield from _json(file)
        return
    regular_file(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadDataError(
            f"file {path} ends with '{path.suffix}', expected {', '.join(READERS)} (or a folder of .json files)"
        )
    yield from reader(path)


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    return parse_json(read_text(path, "file"), f"file {path}", nan=True)


def _separated(separator: str) -> Callable[[Path], Iterator[SourceRow]]:
    def read(path: Path) -> Iterator[SourceRow]:
        csv.field_size_limit(sys.maxsize)  # a base64 image is one field
        try:
            with path.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.DictReader(stream, delimiter=separator, restval="", strict=True)
                for number, cells in enumerate(reader, start=2):
                    if None in cells:
                        raise BadDataError(f"{path} row {number} has more fields than the header has columns")
                    yield SourceRow(f"{path} row {number}", cells)
        except (UnicodeDecodeError, csv.Error) as error:
            raise BadDataError(
                f"{path} is not a UTF-8 table with '{separator!r}' between fields: {error}"
            ) from None

    return read


def _json(path: Path) -> Iterator[SourceRow]:
    data = load_json(path)
    if not (isinstance(data, list) and all(isinstance(entry, dict) for entry in data)):
        raise BadDataError(f"file {path} must contain a list of objects, one per question")
    for number, cells in enumerate(data, start=1):
        yield SourceRow(f"{path} entry {number}", cells)


def _json_lines(path: Path) -> Iterator[SourceRow]:
    for number, line in enumerate(read_lines(path, "file"), start=1):
        if not line.strip():
            continue
        cells = parse_json(line, f"{path} line {number}", nan=True)
        if not isinstance(cells, dict):
            raise BadDataError(f"{path} line {number} is not a JSON object")
        yield SourceRow(f"{path} line {number}", cells)


READERS: Mapping[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".tsv": _separated("\t"),
    ".csv": _separated(","),
    ".json": _json,
    ".jsonl": _json_lines,
}
"""File suffix -> reader."""
