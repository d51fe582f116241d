"""The chat-completions interface of OpenAI: what is sent for a question, and how an answer is read. No network."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval_mcq.backends.server import server_fault
from eval_mcq.items.schema import LETTERS
from eval_mcq.scoring.modes import Score, parsed
from eval_mcq.scoring.prompt import Ask, render

if TYPE_CHECKING:
    from PIL.Image import Image

CHAT_VERSION = "chat-completions-1"
"""Recorded in every run; incremented whenever what is sent for a question, or how its answer is read, changes."""

TOP = (20, 5)
"""Numbers of likeliest tokens to ask for: OpenAI's limit, vLLM's default limit, and that of stricter servers."""

IMAGE = "<image>"
"""Stands for an image in the recorded example."""

_MARKERS = "▁Ġ "
"""Signs for a space in the names of tokens (SentencePiece, byte-level BPE)."""

Settings = Mapping[str, Any]
"""What is sent besides model and messages."""


def letter_settings() -> list[Settings]:
    """Return settings that ask for the probabilities of the first token, in the order in which they are tried.

    Newer models of OpenAI refuse ``max_tokens`` and ``temperature``.
    """
    limits: list[Settings] = [{"max_tokens": 1, "temperature": 0}, {"max_completion_tokens": 1}]
    return [{**limit, "logprobs": True, "top_logprobs": top} for limit in limits for top in TOP]


def reply_settings(tokens: int) -> list[Settings]:
    """Return settings that ask for a written reply, in the order in which they are tried."""
    return [{"max_tokens": tokens, "temperature": 0}, {"max_completion_tokens": tokens}]


def picture_url(image: "Image", longest_side: int | None) -> str:
    """Return an image as a data URL: PNG, which loses nothing, without any metadata.

    Args:
        image: The image, RGB.
        longest_side: Reduce its longer side to this many pixels.
    """
    if longest_side is not None and max(image.size) > longest_side:
        image = image.copy()
        image.thumbnail((longest_side, longest_side))
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def messages(ask: Ask, pictures: Sequence[str]) -> list[dict[str, Any]]:
    """Return the conversation of a question: its images, then its text."""
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    text = {"type": "text", "text": render(ask.item, ask.rotation)}
    return [{"role": "user", "content": [*shown, text]}]


def example(ask: Ask) -> str:
    """Return a question as it is sent, for the reader of a record."""
    return "\n".join([*(IMAGE for _ in ask.item.images), render(ask.item, ask.rotation)])


def top_tokens(answer: Mapping[str, Any]) -> list[tuple[str, float]] | None:
    """Return the likeliest first tokens of an answer with their log-probabilities; None if there are none.

    Raises:
        UserError: they are malformed.
    """
    places = (_choice(answer).get("logprobs") or {}).get("content") or []
    listed = places[0].get("top_logprobs") if places else None
    if not listed:
        return None
    try:
        found = [(str(one["token"]), float(one["logprob"])) for one in [*listed, places[0]]]
    except (KeyError, TypeError, ValueError):
        raise server_fault("has no token and logprob in 'top_logprobs'", listed[:2]) from None
    if any(math.isnan(value) or value > 1e-3 for _, value in found):
        raise server_fault("has log-probabilities that are none", found[:3])
    return found[:-1] if found[-1] in found[:-1] else found  # the chosen token is usually one of them


def read_letters(ask: Ask, answer: Mapping[str, Any]) -> Score | None:
    """Read the letters' probabilities; None if the server gives no log-probabilities.

    A letter's probability is the sum over the listed tokens that spell it; one that is not listed has 0. If none is
    listed, or the answer is empty (filtered, or ended at once), nothing is chosen.

    Raises:
        UserError: the answer is malformed.
    """
    listed = top_tokens(answer)
    if listed is None:
        return Score([0.0] * len(ask.item.options), letter_mass=0.0) if _empty(answer) else None
    by_letter = dict.fromkeys(LETTERS[: len(ask.item.options)], 0.0)
    for token, logprob in listed:
        if (letter := token.strip(_MARKERS).strip()) in by_letter:
            by_letter[letter] += math.exp(min(logprob, 0.0))
    mass = sum(by_letter.values())
    return Score([by_letter[letter] / mass if mass else 0.0 for letter in ask.letters], letter_mass=mass)


def read_reply(ask: Ask, answer: Mapping[str, Any]) -> Score:
    """Read and parse a written reply; an empty one (cut off, or filtered) is unread.

    Raises:
        UserError: the answer is malformed.
    """
    message = _choice(answer).get("message")
    if not isinstance(message, Mapping):
        raise server_fault("has no 'message'", answer.get("choices"))
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise server_fault("has a 'content' that is not text", content)
    return parsed(ask, content or "")


def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise server_fault("has no 'choices'", answer)
    return choices[0]


def _empty(answer: Mapping[str, Any]) -> bool:
    message = _choice(answer).get("message")
    return isinstance(message, Mapping) and message.get("content") in (None, "")
