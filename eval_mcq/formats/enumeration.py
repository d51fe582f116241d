"""Options with their own letters or numbers ("A. glaucoma"): detected per file, and removed."""

import re
from collections.abc import Sequence

from eval_mcq.items.schema import LETTERS

LABEL = re.compile(r"\s*[(\[]?\s*([A-Za-z]|\d{1,2})\s*[.):\]]\s+(?=\S)")
"""A letter or number before an option, such as "A. ", "(b) ", "3) "."""


def is_enumerated(options: Sequence[str]) -> bool:
    """Return whether every option begins with its letter, or every one with its number (from 1)."""
    labels = [found[1].upper() if (found := LABEL.match(option)) else "" for option in options]
    numbers = [str(place) for place in range(1, len(options) + 1)]
    return labels in (list(LETTERS[: len(options)]), numbers)


def without_label(text: str) -> str:
    """Remove the letter or number before an option's text, and surrounding whitespace."""
    return text[found.end() :].strip() if (found := LABEL.match(text)) else text


def labeled(text: str) -> tuple[str, str] | None:
    """Split an answer such as "B. drusen" into letter or number and text; None for any other form."""
    found = LABEL.match(text)
    return (found[1].upper(), text[found.end() :]) if found else None
