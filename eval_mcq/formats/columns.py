"""Meaning of the columns of a row: the map of a format, and the user's overrides."""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eval_mcq.formats.enumeration import is_enumerated, labeled, without_label
from eval_mcq.formats.faults import (
    BLANK_OPTION,
    FOREIGN_ANSWER,
    MALFORMED,
    NO_ANSWER,
    NO_COLUMN,
    BadQuestionError,
)
from eval_mcq.formats.rows import SourceRow
from eval_mcq.items.schema import LETTERS
from mgll_encoder.common.errors import InvalidArgumentError, UserError, did_you_mean, unknown_name
from mgll_encoder.data.label_cells import plain

FIELDS = ("id", "image", "question", "hint", "options", "answer", "category", "source", "patient", "tags")
"""Fields of a column map."""

REQUIRED = ("image", "question", "options", "answer")

AnswerKind = Literal["letter", "text", "any"]


@dataclass(frozen=True)
class ColumnMap:
    """Columns of a format.

    Attributes:
        columns: Field -> columns that may contain it; the first one that a row has counts. In ``options``, a name with
            ``{}`` means one column per letter (``option_{}``), comma-separated names mean one column per option, and
            any other name means a column with a list.
        tagged: Columns that become tags ``column=value``.
    """

    columns: Mapping[str, Sequence[str]]
    tagged: Sequence[str] = ()

    def overridden(self, pairs: Sequence[str]) -> "ColumnMap":
        """Return the map with the user's ``FIELD=COLUMN`` pairs instead of this format's columns.

        Raises:
            UserError: a pair does not have that form, or names an unknown field.
        """
        columns = dict(self.columns)
        for pair in pairs:
            name, equals, column = pair.partition("=")
            if not (name and equals and column):
                raise InvalidArgumentError(
                    f"`maps='{pair}'` is not of the form FIELD=COLUMN, such as answer=gt_answer"
                )
            if name not in FIELDS:
                raise unknown_name("field of `maps`", name, FIELDS)
            columns[name] = (column,)
        return ColumnMap(columns, self.tagged)

    def cell(self, row: SourceRow, name: str) -> Any:
        """Return the first filled cell of a field (else a blank one); None if the row has no such column.

        Raises:
            UserError: the field is required, and the row has no column for it.
        """
        cells = [row.cells[column] for column in self.columns.get(name, ()) if column in row.cells]
        if cells:
            return next((cell for cell in cells if cell not in (None, "")), cells[0])
        if name in REQUIRED:
            raise self._missing(row, name)
        return None

    def text(self, row: SourceRow, name: str) -> str:
        """Return the cell of a field as text, empty if there is none."""
        return as_text(self.cell(row, name))

    def options(self, row: SourceRow) -> list[str]:
        """Return the option texts in order.

        Raises:
            UserError: there is no column for options, an option is blank before a filled one, or a list is invalid.
        """
        for column in self.columns["options"]:
            names = _option_columns(column)
            if names is not None and names[0] in row.cells:
                return _filled(row, names)
            if column in row.cells:
                return _as_list(row, column)
        raise self._missing(row, "options")

    def tags(self, row: SourceRow) -> list[str]:
        """Return the tags of the tag column (a list, or JSON of one), and ``column=value`` of the tagged columns."""
        cell = self.cell(row, "tags")
        words = _tag_list(row, cell) if cell not in (None, "") else []
        for column in self.tagged:
            value = as_text(row.cells.get(column))
            words += [f"{column}={value}"] if value else []
        return words

    def _missing(self, row: SourceRow, name: str) -> UserError:
        found = [str(column) for column in row.cells]
        wanted = " or ".join(f"'{column}'" for column in self.columns.get(name, (name,)))
        guesses = [c.format("A") for c in self.columns.get(name, ())]
        suggestion = next(filter(None, (did_you_mean(guess, found) for guess in guesses)), "")
        return BadQuestionError(
            NO_COLUMN,
            f"{row.where} has no column {wanted} for the {name}: {suggestion}its columns are "
            f"{', '.join(found)}; name one with `maps={name}=COLUMN`",
        )


@dataclass(frozen=True)
class RawQuestion:
    """A question as read from a file, before validation.

    Attributes:
        where: File and row, for errors.
        id: Unique id.
        images: For each image its bytes, a path, or ``Same`` for another question's.
        question: The question.
        options: Option texts.
        answer: Index, letter or text of the true option.
        category: The disease, or another category.
        kind: How the answer is written.
        index: The index by which other rows refer to this one; None if the format has no index.
    """

    where: str
    id: str
    images: list["bytes | str | Same"]
    question: str
    options: list[str]
    answer: Any
    category: str
    source: str = ""
    patient: str = ""
    tags: list[str] = field(default_factory=list)
    kind: AnswerKind = "any"
    index: str | None = None


@dataclass(frozen=True)
class Same:
    """Refers to the images of the row with this index."""

    index: str


def true_option(where: str, options: Sequence[str], answer: Any, kind: AnswerKind = "any") -> int:
    """Find the index of the true option.

    Args:
        where: File and row, for errors.
        options: Option texts, with or without a letter or number before each.
        answer: The answer in the file.
        kind: Its form: a letter, the text of an option, or any of these or an index (from 0).

    Raises:
        BadQuestionError: it matches no option, or one as a letter and another as a text.
    """
    if kind == "any" and isinstance(answer, int) and not isinstance(answer, bool):
        return answer  # the item itself checks the range
    text = as_text(answer)
    if not text.strip():
        raise BadQuestionError(
            NO_ANSWER,
            f"{where}: the answer is blank (a test split whose answers are not public cannot be scored)",
        )
    fits = _fitting(text, options, kind)
    if len(fits) == 1:
        return fits.pop()
    if fits:
        raise BadQuestionError(
            FOREIGN_ANSWER,
            f"{where}: answer '{text}' matches several options; give the letter or the full text of one",
        )
    offered = ", ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    raise BadQuestionError(FOREIGN_ANSWER, f"{where}: answer '{text}' is not among the options ({offered})")


def _fitting(text: str, options: Sequence[str], kind: AnswerKind) -> set[int]:
    """Return the options that an answer may mean."""
    bare = [plain(without_label(option)) for option in options] if is_enumerated(options) else []
    texts = [plain(option) for option in options]
    fits: set[int] = set()
    if kind != "letter":
        fits |= {i for i, option in enumerate(texts) if option == plain(text)}
        fits |= {i for i, option in enumerate(bare) if option == plain(text)}
    if not fits and (both := labeled(text)):
        letter, said = both
        place = LETTERS.find(letter) if letter in LETTERS else int(letter) - 1
        if 0 <= place < len(options) and plain(said) in (
            [*texts[place : place + 1], *bare[place : place + 1]]
        ):
            fits.add(place)
    letter = text.strip("(). ").upper()
    if kind != "text" and len(letter) == 1 and letter in LETTERS[: len(options)]:
        fits.add(LETTERS.index(letter))
    return fits


def as_text(cell: Any) -> str:
    """Convert a cell to text; None and NaN are blank, also in a list; a whole number has no decimal point."""
    if isinstance(cell, list):
        cell = [part for part in cell if as_text(part)] or None
    if cell is None or (isinstance(cell, float) and cell != cell):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


def literal_list(text: str) -> list[Any] | None:
    """Parse a list in JSON or Python notation; None if the text is not a list."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested too deeply
            continue
        if isinstance(value, list):
            return value
    return None


def _option_columns(column: str) -> list[str] | None:
    if "{}" in column:
        return [column.format(letter) for letter in LETTERS]
    return [name.strip() for name in column.split(",")] if "," in column else None


def _filled(row: SourceRow, names: Sequence[str]) -> list[str]:
    texts = [as_text(row.cells.get(name)) for name in names]
    filled = [i for i, text in enumerate(texts) if text.strip()]
    for i in range(len(filled)):
        if filled[i] != i:
            raise BadQuestionError(
                BLANK_OPTION, f"{row.where}: option '{names[i]}' is blank, but '{names[filled[i]]}' is not"
            )
    return texts[: len(filled)]


def _as_list(row: SourceRow, column: str) -> list[str]:
    cell = row.cells[column]
    value = literal_list(cell) if isinstance(cell, str) else cell
    if not isinstance(value, list | tuple):
        raise BadQuestionError(
            MALFORMED, f"{row.where}: column '{column}' must contain a list of options, found '{cell}'"
        )
    return [as_text(option) for option in value]


def _tag_list(row: SourceRow, cell: Any) -> list[str]:
    value = literal_list(cell) if isinstance(cell, str) else cell
    if not isinstance(value, list):
        raise BadQuestionError(MALFORMED, f"{row.where}: tags must be a list of words, found '{cell}'")
    return [as_text(tag) for tag in value]
