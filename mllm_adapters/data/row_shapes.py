"""Converts the published shapes of conversation rows to LLaVA's: tables of keys, roles and image tags.

Sources: haotian-liu/LLaVA docs/Finetune_Custom_Data.md (``conversations`` of ``human`` and ``gpt``);
huggingface/trl docs, "Dataset formats" (``messages`` of ``role`` and ``content``, ``images``; images without a
placeholder go before the first user turn); hiyouga/LLaMA-Factory data/README.md and modelscope/ms-swift docs, "Custom
dataset" (``<image>`` in the text); QwenLM/Qwen-VL README, "Finetuning" (``Picture 1: <img>PATH</img>`` in the text).
"""

import re
from collections.abc import Mapping
from typing import Any

IMAGE_TAG = "<image>"

SPEAKERS: Mapping[str, str] = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "system": "system",
}
"""Names of speakers in published rows -> LLaVA's, and ``system``."""

TURN_LISTS = ("conversations", "messages", "conversatons")
"""Keys of the list of turns; the last is a misspelling that published medical rows have."""

SPEAKER_KEYS, TEXT_KEYS = ("from", "role"), ("value", "content")

PAIRS = (("question", "answer"), ("query", "response"), ("instruction", "output"))
"""Keys of a question and its answer, in rows that have no list of turns."""

IMAGE_LISTS = ("image", "images")

QWEN_IMAGE = re.compile(r"(?:Picture \d+: ?)?<img>(.*?)</img>\n?", re.DOTALL)
"""An image in the text of a Qwen-VL row, with the text that its template writes around it."""


def as_llava(record: Any) -> Any:
    """Convert a row to LLaVA's shape: ``id``, ``image`` (list of paths), ``system`` and ``conversations``.

    A row of an unknown shape is returned unchanged; the caller's validation reports it.

    Raises:
        ValueError: the row contradicts itself (two lists of turns, images in two places).
    """
    if not isinstance(record, Mapping):
        return record
    key = _only(record, TURN_LISTS, "lists of turns")
    if key is None:
        return _of_pair(record)
    if not isinstance(record[key], list | tuple):
        return record
    images = _images(record)
    inline: list[Any] = []
    turns = [_turn(turn, number, inline) for number, turn in enumerate(record[key], 1)]
    if inline and images:
        raise ValueError(
            f"{len(inline)} images in its turns and {len(images)} outside them: expected only one of these"
        )
    system, turns = _system(record, turns)
    if key == "messages" and images:
        turns = _tagged(turns, len(images))
    return {"id": record.get("id"), "image": images or inline, "system": system, "conversations": turns}


def _of_pair(record: Mapping[str, Any]) -> Any:
    """Convert a row with a question and an answer to two messages."""
    pair = next((pair for pair in PAIRS if all(isinstance(record.get(key), str) for key in pair)), None)
    if pair is None:
        return record
    if "options" in record:
        raise ValueError(
            "a multiple-choice row: convert it with `import_benchmark()`, and pass the benchmark"
        )
    asked, answered = (
        {"role": role, "content": record[key]} for role, key in zip(("user", "assistant"), pair, strict=True)
    )
    rest = {key: value for key, value in record.items() if key not in pair}
    return as_llava({**rest, "messages": [asked, answered]})


def is_blank(value: Any) -> bool:
    """Whether a cell is blank: null, NaN, or white space."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _only(record: Mapping[str, Any], keys: tuple[str, ...], what: str) -> str | None:
    """Return the only one of several keys that a row has; None if it has none."""
    found = [key for key in keys if key in record and not is_blank(record[key])]
    if len(found) > 1:
        raise ValueError(f"{what} under {' and '.join(repr(key) for key in found)}: expected one of them")
    return found[0] if found else None


def _images(record: Mapping[str, Any]) -> list[Any]:
    """Return the row's image paths, without blanks."""
    key = _only(record, IMAGE_LISTS, "images")
    value = record[key] if key else []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key}: expected a path, a list of paths, or nothing, found {value!r:.60}")
    return [_path(one) for one in value if not is_blank(one)]


def _path(image: Any) -> Any:
    """Return the path of an image in the form that ``datasets`` writes (``{"path": ..., "bytes": null}``)."""
    if isinstance(image, Mapping):
        if image.get("bytes"):
            raise ValueError("an image is embedded in the row: write it to a file and give its path")
        return image.get("path") or image.get("url")
    return image


def _system(record: Mapping[str, Any], turns: list[Any]) -> tuple[Any, list[Any]]:
    """Return the instruction of a row, from its own key or the first turn, and the turns after it."""
    first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
    leads = first.get("from") == "system"
    found = [
        text for text in (record.get("system"), first.get("value") if leads else None) if not is_blank(text)
    ]
    if len(found) > 1:
        raise ValueError("a system turn and a field 'system': expected one of them")
    return (found[0] if found else None), turns[leads:]


def _turn(turn: Any, number: int, inline: list[Any]) -> Any:
    """Convert one turn to ``from`` and ``value``; image paths in it are added to ``inline``."""
    if not isinstance(turn, Mapping):
        return turn
    said_by = next((turn[key] for key in SPEAKER_KEYS if key in turn), None)
    value = next((turn[key] for key in TEXT_KEYS if key in turn), None)
    if said_by is None:
        return turn
    if not isinstance(said_by, str) or said_by not in SPEAKERS:
        raise ValueError(f"turn {number} is from {said_by!r}, expected one of {', '.join(SPEAKERS)}")
    if isinstance(value, list | tuple):
        value = "".join(_part(part, number, inline) for part in value)
    elif isinstance(value, str):
        value = QWEN_IMAGE.sub(lambda found: _inline(found[1], inline), value)
    return {"from": SPEAKERS[said_by]} | ({} if value is None else {"value": value})


def _part(part: Any, number: int, inline: list[Any]) -> str:
    """Return the text of one part of a typed content."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("image", "image_url"):
        given = part.get("image") or part.get("path") or part.get("url") or part.get("image_url")
        given = given.get("url") if isinstance(given, Mapping) else given
        return IMAGE_TAG if given is None else _inline(given, inline)
    raise ValueError(f"turn {number} has content of type {kind!r}, expected 'text' or 'image'")


def _inline(path: Any, inline: list[Any]) -> str:
    """Record the path of an image, and return the tag that replaces it."""
    inline.append(path.strip() if isinstance(path, str) else path)
    return f"{IMAGE_TAG}\n"


def _tagged(turns: list[Any], images: int) -> list[Any]:
    """Put the tags of images without a tag before the first user turn, as TRL does."""
    if any(IMAGE_TAG in str(turn.get("value")) for turn in turns if isinstance(turn, Mapping)):
        return turns
    first = next(
        (i for i, turn in enumerate(turns) if isinstance(turn, Mapping) and turn.get("from") == "human"), None
    )
    if first is None or not isinstance(turns[first].get("value"), str):
        return turns
    tagged = {**turns[first], "value": f"{IMAGE_TAG}\n" * images + turns[first]["value"]}
    return [*turns[:first], tagged, *turns[first + 1 :]]
