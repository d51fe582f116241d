"""Reading text and JSON files: what is wrong with one is said in a line that names it."""

import json
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import UserError
from mgll_encoder.common.faults import find_fault
from mgll_encoder.common.files import regular_file


def read_text(path: Path, kind: str) -> str:
    """A UTF-8 text file, a byte order mark left out.

    Args:
        path: The file.
        kind: What it is, for the error: ``preset``.

    Raises:
        UserError: it is no ordinary file (see `regular_file`), cannot be read, or is not UTF-8.
    """
    regular_file(path, kind)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{kind} {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        fault = find_fault(error)
        raise UserError(f"{kind} {fault.line() if fault else f'{path}: {error}'}") from None


def parse_json(text: str, where: str) -> Any:
    """Read a JSON text.

    Args:
        text: The text.
        where: Where it stands, for the error: ``bench b.jsonl line 1``.

    Raises:
        UserError: it is no JSON, nested too deeply, or holds a number with thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:  # Python converts no integer of more than 4300 digits
        raise UserError(f"{where} holds a number that is too long to be read: {error}") from None
