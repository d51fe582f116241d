"""Exceptions for errors that the user can fix, one class per cause; all derive from `UserError`."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 2000
"""Maximum number of characters in a message."""

NEAR = 0.65
"""difflib ratio from which a name is suggested: 'Katarakt' is near 'Cataract' (0.75), 'Stargardt' is not (0.59)."""

ARGUMENT = re.compile(r"`(?P<name>[a-z]\w*)(?:\['(?P<key>[^'`]+)'\])?(?:=(?P<value>[^`]+))?`")
"""An argument in a message: its name, optionally a key and a value."""


class UserError(Exception):
    """An error in the user's input; shown as one line, exit code 2.

    The message names the file or argument, the field, what was found, what was expected, and what to do next.
    Arguments are in backticks, as Python writes them (``image_size=300``); commands print their options instead, see
    `mgll_encoder.common.spelling`. Control characters are escaped, and the middle of a long message is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments in the message."""
        return tuple(found["name"] for found in ARGUMENT.finditer(str(self)))


class NotFoundError(UserError):
    """A file, folder, hub model or part of a checkpoint does not exist."""


class OutputTakenError(UserError):
    """The output exists already, is being written by another process, or is one of the inputs."""


class BadDataError(UserError):
    """A file is damaged, has another format, or contains an invalid value."""


class UnsupportedCheckpointError(UserError):
    """A checkpoint or tower is readable but of an unsupported kind."""


class IncompatibleTowerError(UserError):
    """A tower does not fit the model, or not at the requested size."""


class MissingPackageError(UserError):
    """An optional package is not installed, or its version does not work with the others."""


class UnknownNameError(UserError):
    """A name (of a family, a label, a mode ...) is not known."""


class InvalidArgumentError(UserError):
    """An argument has an invalid value, has no effect here, or contradicts another one."""


class MismatchError(UserError):
    """Two inputs do not belong together: weights and configuration, delta and base, a run and its benchmark."""


class StorageError(UserError):
    """A disk is full or read-only, or the hub refuses an upload."""


class TrainingError(UserError):
    """Training or scoring cannot go on: values are not finite, memory is short, or a step of a script failed."""


class EndpointError(UserError):
    """A server does not answer, refuses a request, or answers something else than its interface promises."""


def unknown_name(kind: str, found: str, known: Iterable[str]) -> UnknownNameError:
    """Return an error for an unknown name, with the closest known name as a suggestion."""
    names = sorted(known)
    return UnknownNameError(
        f"unknown {kind} '{found}': {did_you_mean(found, names)}known are {', '.join(names)}"
    )


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` for the closest known name, or one that has it as a word; else nothing."""
    names = {name.lower(): name for name in known}
    given = found.lower()
    close = get_close_matches(given, names, n=1, cutoff=NEAR) or [
        name for name in names if given in re.split(r"[^a-z0-9]+", name)
    ]
    return f"did you mean '{names[close[0]]}'? " if close else ""


def one_line(message: str) -> str:
    """Return a message as a single line: no control characters, at most `LONGEST` characters."""
    text = " ".join(message.split())
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
