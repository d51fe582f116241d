"""Conversations: check a row, convert it to chat messages.

The format is that of haotian-liu/LLaVA (docs/Finetune_Custom_Data.md): rows of ``id``, ``image`` (a path
below the image folder, a list of them, or nothing) and ``conversations``, where ``human`` and ``gpt``
alternate, after an optional ``system`` turn, and ``<image>`` in a human's turn stands for an image.
`mllm_adapters.data.row_shapes` converts other published shapes to this one.
"""

from collections.abc import Mapping
from itertools import cycle
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mllm_adapters.data.row_shapes import IMAGE_TAG, as_llava

ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant"}
"""Speakers of the format, in their order -> roles of chat messages."""


class Turn(BaseModel):
    """One turn: speaker and text.

    Attributes:
        speaker: ``human`` or ``gpt``, in turn; ``from`` in files.
        value: The text; each ``<image>`` in a human's turn stands for an image.
    """

    model_config = ConfigDict(frozen=True)

    speaker: Literal["human", "gpt"] = Field(alias="from")
    value: str


class Conversation(BaseModel):
    """One row: images, an optional instruction, and the turns about the images.

    Attributes:
        id: Any name of the row.
        images: Paths below the image folder, in the order of their tags; ``image`` in files, which may give one path.
        system: Instruction before the first turn, for models whose template has one.
        turns: From ``human`` first to ``gpt`` last; ``conversations`` in files.
    """

    model_config = ConfigDict(frozen=True)

    id: str | int | None = None
    images: tuple[str, ...] = Field(default=(), alias="image")
    system: str | None = None
    turns: tuple[Turn, ...] = Field(alias="conversations", min_length=2)

    @model_validator(mode="before")
    @classmethod
    def _shape(cls, record: Any) -> Any:
        return as_llava(record)

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
        """Return the turns as chat messages for ``apply_chat_template``."""
        spoken = [{"role": ROLES[turn.speaker], "content": _content(turn.value)} for turn in self.turns]
        if self.system is None:
            return spoken
        return [{"role": "system", "content": [{"type": "text", "text": self.system}]}, *spoken]


def faults_of(error: ValidationError) -> str:
    """Describe the first fault of a row, in one line."""
    fault = error.errors()[0]
    if cause := fault.get("ctx", {}).get("error"):
        return str(cause)
    place = ".".join(str(part) for part in fault["loc"]) or "row"
    found = repr(fault["input"])
    return f"{place}: {fault['msg']}, found {found if len(found) < 60 else found[:57] + '...'}"


def _content(value: str) -> list[dict[str, str]]:
    """Split a turn at its image tags; line breaks next to a tag belong to the tag, as in LLaVA's files."""
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
