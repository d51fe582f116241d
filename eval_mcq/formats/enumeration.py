"""Options that carry their own letters or numbers ("A. glaucoma"): recognized for a whole file, and taken off."""

import re
from collections.abc import Sequence

from eval_mcq.items.schema import LETTERS

LABEL = re.compile(r"\s*[(\[]?\s*([A-Za-z]|\d{1,2})\s*[.):\]]\s+(?=\S)")
"""A letter or number before an option, such as "A. ", "(b) ", "3) "."""


def is_enumerated(options: Sequence[str]) -> bool:
    """Whether every option begins with its own letter, or every one with its own number (from 1)."""
    labels = [found[1].upper() if (found := LABEL.match(option)) else "" for option in options]
    numbers = [str(place) for place in range(1, len(options) + 1)]
    return labels in (list(LETTERS[: len(options)]), numbers)


def without_label(text: str) -> str:
    """An option's text without the letter or number before it, and without blanks around it."""
    return text[found.end() :].strip() if (found := LABEL.match(text)) else text


def labeled(text: str) -> tuple[str, str] | None:
    """Letter or number, and text, of an answer such as "B. drusen"; None for any other."""
    found = LABEL.match(text)
    return (found[1].upper(), text[found.end() :]) if found else None
