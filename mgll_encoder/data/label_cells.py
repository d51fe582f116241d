"""Cells of label tables: one truth value, or a list of labels. ``docs/tables.md`` lists what is read."""

import ast
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator

from mgll_encoder.common.errors import BadDataError

_logger = logging.getLogger(__name__)

NUMBERS = {1.0: True, 0.0: False, -1.0: None}
WORDS: dict[str, bool | None] = {
    "true": True, "yes": True, "false": False, "no": False, "": False,
    **dict.fromkeys(("uncertain", "unknown", "nan", "na", "n/a", "null", "?")),
}  # fmt: skip
"""Cell of a binary column, in lowercase -> whether the label is true; None if uncertain."""

EXPECTED = "1, 0, yes, no, true, false, -1 or uncertain, or nothing"

ONE_LABEL = "none"
"""The separator setting that makes a cell one label, whatever it contains."""

_SURE = re.compile(r"[;|；]")
_COMMA = re.compile(r"[,，]")
_JOINTS = re.compile(r"\s*[,，/+&]\s*|\s+and\s+")
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_LIST = re.compile(rf"\[\s*(?:{_QUOTED}(?:\s*,\s*{_QUOTED})*)?\s*,?\s*\]")


def truth_of(cell: str) -> bool | None:
    """Return whether a label is true, from a cell of its binary column; None if uncertain.

    Raises:
        ValueError: the cell has an unknown value.
    """
    word = cell.strip().casefold()
    if word in WORDS:
        return WORDS[word]
    try:
        return NUMBERS[float(word)]
    except (ValueError, KeyError):
        raise ValueError(f"is '{cell}': expected {EXPECTED}") from None


def plain(label: str) -> str:
    """Normalize a label for comparison: lowercase, single spaces."""
    return " ".join(label.casefold().split())


class LabelLists:
    """Reads the cells of a column of label lists.

    Args:
        separator: Separator of labels given by the user; None to detect it.
        cells: The whole column, from which it is decided whether commas separate labels: they do if all parts that
            they join occur alone in other cells.
        known: Labels known from elsewhere, normalized by `plain`.
        where: Name of the column in messages.

    Raises:
        UserError: no separator is given, and a label consists of other labels: one class or two?
    """

    def __init__(
        self, separator: str | None, cells: Iterable[str], known: Collection[str], where: str
    ) -> None:
        self._separator = re.compile(re.escape(separator)) if separator else _SURE
        self._one = separator == ONE_LABEL
        if separator is None:
            self._recognize(cells, known, where)

    def __call__(self, cell: str) -> frozenset[str]:
        """Return the labels of a cell, normalized; empty if they are unknown.

        Raises:
            ValueError: it is a list that cannot be read.
        """
        return frozenset(
            label for label in self._parts(cell) if WORDS.get(label, True) is not None and label != "-1"
        )

    def _parts(self, cell: str) -> Iterator[str]:
        cell = cell.strip()
        if self._one:
            parts = [cell]
        elif cell.startswith("["):
            parts = _list(cell)
        else:
            parts = self._separator.split(cell)
        return (plain(part) for part in parts if part.strip())

    def _recognize(self, cells: Iterable[str], known: Collection[str], where: str) -> None:
        labels: set[str] = set()
        for cell in cells:
            try:
                labels.update(self._parts(cell))
            except ValueError:
                continue  # reported when the row is read
        alone = {label for label in labels if not _JOINTS.search(label)} | set(known)
        joined = {label for label in labels - set(known) if alone.issuperset(_JOINTS.split(label))} - alone
        commas = {label for label in labels - set(known) if _COMMA.search(label)}
        if commas and commas == joined:
            self._separator = re.compile(f"{_SURE.pattern}|{_COMMA.pattern}")
            _logger.info(f"{where}: labels are separated by commas")
        elif joined:
            label = min(joined)
            joint = _JOINTS.search(label)
            whole = min(commas - joined, default="")
            but = f", but '{whole}' does not" if whole else ""
            raise BadDataError(
                f"{where}: '{label}' consists of other labels of the table{but}: give "
                f"`label_separator='{joint[0].strip() if joint else ','}'` if it is several, or "
                f"`label_separator={ONE_LABEL}` if every cell is one label"
            )
        elif commas:
            _logger.info(
                f"{where}: '{min(commas)}' is read as one label, because its parts do not occur alone elsewhere "
                "(`label_separator=,` splits it)"
            )


def _list(cell: str) -> list[str]:
    """Parse a list in JSON or Python notation; numpy's notation, without commas, is ambiguous and refused."""
    if not _LIST.fullmatch(cell):
        raise ValueError(
            f"is '{cell[:60]}': expected quoted labels separated by commas, or labels without []"
        )
    try:
        parts = [str(part) for part in json.loads(cell)]
    except ValueError:
        parts = [str(ast.literal_eval(part)) for part in re.findall(_QUOTED, cell)]
    "".join(parts).encode()  # raises for lone surrogates from escapes
    return parts
