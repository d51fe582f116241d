"""Reading text, JSON and YAML files, with one-line errors that name the file.

JSON and YAML are read strictly. Both formats allow more than a setting should contain: duplicate keys (the last would
win silently), NaN and infinity, numbers of thousands of digits, unlimited nesting, lone surrogates.
"""

import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from mgll_encoder.common.errors import BadDataError
from mgll_encoder.common.faults import find_fault
from mgll_encoder.common.files import regular_file

DIGITS = 40
"""Maximum digits of an integer; the longest in use, a tokenizer's ``model_max_length`` of 1e30, has 31."""

DEPTH = 100
"""Maximum nesting of lists and objects; recursive libraries fail at some hundreds."""

POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of a pointer file, which replaces a large file in a repository cloned without Git LFS."""

_HALF = re.compile("[\ud800-\udfff]")

T = TypeVar("T")


def read_text(path: Path, kind: str) -> str:
    """Read a UTF-8 text file, without its byte order mark.

    Args:
        path: The file.
        kind: What it is, for the error: ``preset``.

    Raises:
        UserError: it is not an ordinary file (see `regular_file`), cannot be read, or is not UTF-8.
    """
    regular_file(path, kind)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDataError(
            f"{kind} {path} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None
    except OSError as error:
        fault = find_fault(error)
        raise BadDataError(f"{kind} {fault.line() if fault else f'{path}: {error}'}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file cannot be read (see `read_text`), is not strict JSON (see `parse_json`), or not an object.
    """
    text = read_text(path, "file")
    refuse_pointer(path, text[: len(POINTER)].encode())
    content = parse_json(text, str(path))
    if not isinstance(content, dict):
        raise BadDataError(f"{path} contains a JSON {kind_of(content)}: expected an object")
    return content


def refuse_pointer(path: Path, head: bytes) -> None:
    """Refuse a Git LFS pointer.

    Raises:
        UserError: ``head``, the beginning of the file, is that of a pointer.
    """
    if head.startswith(POINTER):
        raise BadDataError(
            f"{path} is a Git LFS pointer ({path.stat().st_size} bytes), not the file itself: run `git lfs pull` in "
            "its folder, or download the file"
        )


def parse_json(text: str, where: str, *, nan: bool = False) -> Any:
    """Parse a JSON text strictly.

    Args:
        text: The text.
        where: Its location for the error message: a file, and perhaps a line.
        nan: Whether NaN is allowed, which pandas writes for missing values.

    Raises:
        UserError: it is not JSON, has a duplicate key, contains NaN, an infinite number, an integer of more than
            `DIGITS` digits or a lone surrogate, or is nested too deeply.
    """
    try:
        found = (NAN_DECODER if nan else DECODER).decode(text)
    except RecursionError:
        raise BadDataError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:
        raise BadDataError(f"{where} is not JSON: {error}") from None
    check_content(found, where)
    return found


def read_as(kind: type[T], path: Path, what: str, advice: str = "") -> T:
    """Read a JSON file into a known type.

    Args:
        kind: A pydantic model or a dataclass.
        path: The file.
        what: Its name in error messages.
        advice: What to do, appended to the message.

    Raises:
        UserError: see `parse_json` and `checked`.
    """
    where = f"{what} {path}"
    return checked(kind, parse_json(read_text(path, what), where), where, advice)


def checked(kind: type[T], content: Any, where: str, advice: str = "") -> T:
    """Validate parsed content as the type that it should have.

    Raises:
        UserError: it is invalid; the first field that is missing, unknown or wrong is named, with what was found.
    """
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise BadDataError(f"{where}: {first_fault(error)}{advice and f'; {advice}'}") from None


def first_fault(error: ValidationError, *within: str) -> str:
    """Describe the first error of a pydantic report: field (``within`` others), message, and what was found."""
    fault = error.errors(include_url=False, include_context=False)[0]
    field, message = ".".join(map(str, (*within, *fault["loc"]))), fault["msg"].removeprefix("Value error, ")
    found = textwrap.shorten(repr(fault["input"]), 60, placeholder=" ...")
    shown = "" if fault["type"] in ("missing", "value_error") else f" (found {found})"
    return f"field '{field}': {message}{shown}" if field else f"{message}{shown}"


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML text of plain settings strictly: only YAML's own tags, no anchors, no duplicate keys.

    Raises:
        UserError: it is not YAML, or contains more than plain settings (see `parse_json`).
    """
    try:
        found = yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise BadDataError(f"{where} is nested too deeply to be read") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise BadDataError(f"{where} is not YAML: {error.problem or error.context}{place}") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise BadDataError(f"{where} is not YAML: {error}") from None
    check_content(found, where)
    return found


class _PlainLoader(yaml.SafeLoader):
    """Loads YAML's own types; refuses anchors and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"found the alias '*{event.anchor}': write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            # Any error of a value that does not have the type that its tag or form implies.
            kind, reason = node.tag.rpartition(":")[2], str(error) if isinstance(error, ValueError) else ""
            shown = f"'{str(node.value)[:40]}'" if isinstance(node.value, str) else "this"
            problem = f"{shown} is not a valid {kind}{reason and f': {reason}'}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            twice = _twice(self.construct_object(key, deep=True) for key, _ in node.value)
            raise yaml.constructor.ConstructorError(None, None, twice, node.start_mark)
        return found

    def construct_yaml_float(self, node: Any) -> float:
        return _finite(super().construct_yaml_float(node))

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > DIGITS:
            raise ValueError(f"a number of {len(node.value)} digits")
        return super().construct_yaml_int(node)


for _tag, _construct in (
    ("float", _PlainLoader.construct_yaml_float),
    ("int", _PlainLoader.construct_yaml_int),
):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct)


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(text: str | float) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(_twice(name for name, _ in pairs))
    return found


def _twice(keys: Iterable[Any]) -> str:
    key, times = Counter(keys).most_common(1)[0]
    return f"key '{key}' appears {times} times"


def check_content(content: Any, where: str) -> None:
    """Refuse what parsers accept: deep nesting, and strings with lone surrogates.

    Raises:
        UserError: the content has either.
    """
    level = [content]
    for _ in range(DEPTH):
        if not level:
            return
        for text in (value for value in level if isinstance(value, str)):
            if not text.isascii() and _HALF.search(text):
                raise BadDataError(
                    f"{where} holds half of a surrogate pair ({text[:40]!r}): expected Unicode text"
                )
        level = [child for value in level for child in _children(value)]
    raise BadDataError(f"{where} is nested too deeply to be read: expected at most {DEPTH} levels")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return (*value.keys(), *value.values())
    return value if isinstance(value, list | tuple) else ()


_STRICT: Mapping[str, Any] = {"parse_float": _finite, "parse_int": _integer, "object_pairs_hook": _once}

DECODER = json.JSONDecoder(parse_constant=_refused, **_STRICT)
"""Reads JSON strictly; for texts read piece by piece. Each piece must go through `check_content`."""

NAN_DECODER = json.JSONDecoder(parse_constant=float, **_STRICT)
"""As `DECODER`, with NaN for missing values."""


def kind_of(value: Any) -> str:
    """Return JSON's name for the type of a value, for messages."""
    kinds = {dict: "object", list: "list", str: "string", bool: "truth value", int: "number", float: "number"}
    return kinds.get(type(value), "null")
