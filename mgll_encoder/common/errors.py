"""Exceptions for mistakes that the user can mend, by cause; all are a `UserError`."""

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


class NotFoundError(UserError):
    """A file, folder, model of the hub or part of a checkpoint is not there."""


class OutputTakenError(UserError):
    """What is to be written exists already, or is an input."""


class BadDataError(UserError):
    """A file is damaged, is of another format, or holds a value that it cannot hold."""


class UnsupportedCheckpointError(UserError):
    """A checkpoint or tower that can be read is of a kind that is not supported."""


class IncompatibleTowerError(UserError):
    """A tower does not fit the model, or not at the size that is asked for."""


class MissingPackageError(UserError):
    """An optional package is not installed, or is of a version that does not work with the others."""


class UnknownNameError(UserError):
    """A name is not among the known ones: of a family, a label, a mode ..."""


def unknown_name(kind: str, found: str, known: Iterable[str]) -> UnknownNameError:
    """An error for a name that is not among the known ones, with the nearest suggestion."""
    names = sorted(known)
    return UnknownNameError(
        f"unknown {kind} '{found}': {did_you_mean(found, names)}known are {', '.join(names)}"
    )


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
