"""LLaVA-format conversations: read them, check every row and image, turn them into chat messages.

The format is that of haotian-liu/LLaVA (docs/Finetune_Custom_Data.md): rows of ``id``, ``image`` (a path
below the image folder, a list of them, or nothing) and ``conversations``, where ``human`` and ``gpt`` take
turns and ``<image>`` in a human's turn stands for an image.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mgll_encoder.common.cli import track
from mgll_encoder.common.errors import UserError

IMAGE_TAG = "<image>"

ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant"}
"""Speakers of the format, in the order in which they take turns -> roles of chat messages."""


def _as_tuple(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


class Turn(BaseModel):
    """What one side says."""

    model_config = ConfigDict(frozen=True)

    speaker: Literal["human", "gpt"] = Field(alias="from")
    value: str


class Conversation(BaseModel):
    """One row: images and the turns about them."""

    model_config = ConfigDict(frozen=True)

    id: str | int | None = None
    images: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(default=(), alias="image")
    turns: tuple[Turn, ...] = Field(alias="conversations", min_length=2)

    @model_validator(mode="after")
    def _check_turns(self) -> "Conversation":
        for number, (turn, expected) in enumerate(zip(self.turns, cycle(ROLES), strict=False), 1):
            if turn.speaker != expected:
                raise ValueError(
                    f"turn {number} is from '{turn.speaker}', expected '{expected}' (they alternate)"
                )
            if not turn.value.strip():
                raise ValueError(f"turn {number} ({turn.speaker}) is empty")
            if turn.speaker == "gpt" and IMAGE_TAG in turn.value:
                raise ValueError(f"turn {number} (gpt) has an {IMAGE_TAG} tag: only human turns may")
        if self.turns[-1].speaker != "gpt":
            raise ValueError("the last turn is from 'human': the answer of 'gpt' is missing")
        tags = sum(turn.value.count(IMAGE_TAG) for turn in self.turns)
        if tags != len(self.images):
            raise ValueError(f"{tags} {IMAGE_TAG} tags for {len(self.images)} images: each image needs one")
        return self

    def messages(self) -> list[dict[str, Any]]:
        """The turns as chat messages of the form that ``apply_chat_template`` takes."""
        return [{"role": ROLES[turn.speaker], "content": _content(turn.value)} for turn in self.turns]


@dataclass(frozen=True)
class Corpus:
    """A conversations file that has passed every check that needs no model.

    Attributes:
        path: The file.
        folder: What the image paths are relative to.
        rows: Its rows.
        sizes: Image path -> (width, height) in pixels.
    """

    path: Path
    folder: Path
    rows: Sequence[Conversation]
    sizes: Mapping[str, tuple[int, int]]


def read_corpus(path: Path, folder: Path) -> Corpus:
    """Read a conversations file, check every row, and read the header of every image.

    Raises:
        UserError: see `read_conversations` and `image_sizes`.
    """
    rows = read_conversations(path)
    return Corpus(path, folder, rows, image_sizes(rows, folder))


def read_conversations(path: Path) -> list[Conversation]:
    """Read a JSON list or JSON Lines of conversations and check every row.

    Raises:
        UserError: the file is missing, empty or no JSON, or a row breaks the format; the message names the
            first such row, what is wrong with it, and how many more there are.
    """
    rows: list[Conversation] = []
    faults: list[str] = []
    for number, record in _records(path):
        try:
            rows.append(Conversation.model_validate(record))
        except ValidationError as error:
            name = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
            faults.append(f"{path}: row {number}{name}: {_describe(error)}")
    if faults:
        raise UserError(faults[0] + (f" (and {len(faults) - 1} more bad rows)" if len(faults) > 1 else ""))
    if not rows:
        raise UserError(f"{path} holds no conversations: expected a JSON list, or one JSON object per line")
    return rows


def image_sizes(rows: Sequence[Conversation], folder: Path) -> dict[str, tuple[int, int]]:
    """Read the header of every image that the rows name.

    Returns:
        Path below ``folder`` -> (width, height) in pixels.

    Raises:
        UserError: the folder is missing, or images in it are missing or no images; the message counts them.
    """
    if not folder.is_dir():
        raise UserError(f"image folder {folder} does not exist: pass the folder that image paths start from")
    names = list(dict.fromkeys(name for row in rows for name in row.images))
    sizes: dict[str, tuple[int, int]] = {}
    missing: list[str] = []
    unreadable: list[str] = []
    for name in track(names, "checking images"):
        try:
            with Image.open(folder / name) as image:
                sizes[name] = image.size
        except FileNotFoundError:
            missing.append(name)
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
            unreadable.append(name)
    for fault, found in (("are missing in", missing), ("cannot be read as images in", unreadable)):
        if found:
            raise UserError(f"{len(found)} of {len(names)} images {fault} {folder}, first: {found[0]}")
    return sizes


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Row numbers (line numbers in JSON Lines) and rows."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"data file {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"data file {path} is a folder: pass a .json or .jsonl file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    if text.lstrip().startswith("["):
        yield from enumerate(_parse(text, f"{path}"), 1)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, _parse(line, f"{path}, line {number},")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from None


def _describe(error: ValidationError) -> str:
    """The first fault of a row, in one line."""
    fault = error.errors()[0]
    if cause := fault.get("ctx", {}).get("error"):
        return str(cause)
    place = ".".join(str(part) for part in fault["loc"]) or "row"
    found = repr(fault["input"])
    return f"{place}: {fault['msg']}, found {found if len(found) < 60 else found[:57] + '...'}"


def _content(value: str) -> list[dict[str, str]]:
    """Split a turn at its image tags; line breaks beside a tag belong to the tag, as in LLaVA's files."""
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(value.strip().split(IMAGE_TAG)):
        if index:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    if texts := [part for part in parts if part["type"] == "text"]:
        texts[0]["text"] = texts[0]["text"].lstrip()
        texts[-1]["text"] = texts[-1]["text"].rstrip()
    return parts
