"""The one exception for mistakes that the user can mend."""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 2000
"""Characters of a message."""


class UserError(Exception):
    """Something is wrong with what the user gave; shown as one line, exit code 2.

    The message names the file or option, the field, what was found, what was expected, and what to do next. What was
    found may be anything: signs that a terminal would obey are written as escapes, and the middle of a long message
    is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def unknown_name(kind: str, found: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not among the known ones, with the nearest suggestion."""
    names = sorted(known)
    return UserError(f"unknown {kind} '{found}': {did_you_mean(found, names)}known are {', '.join(names)}")


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """``"did you mean 'x'? "`` for the nearest of the known names; empty where none is near."""
    names = list(known)
    close = get_close_matches(found.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    nearest = next((n for n in names if close and n.lower() == close[0]), None)
    return f"did you mean '{nearest}'? " if nearest else ""


def one_line(message: str) -> str:
    """A message that a terminal shows in one line: no control signs, at most `LONGEST` characters."""
    text = " ".join(message.split())
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
