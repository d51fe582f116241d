"""An output that exists is refused before a command imports or computes anything."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from mgll_encoder.common.files import check_free, optional_path
from mgll_encoder.common.spelling import with_commands_below

F = TypeVar("F", bound=Callable[..., Any])

_CONTINUES = "continues_output"

_CHECKED_LATER = ("estimate", "dry_run", "resume")
"""Options with which a command writes nothing, or goes on with what is there."""


def continues_output(function: F) -> F:
    """Mark a command that may go on with what is in its output folder, and checks that itself."""
    setattr(function, _CONTINUES, True)
    return function


def refuse_taken_outputs(command: Any) -> None:
    """Let every command of a program that has ``--out`` and ``--force`` check its output first."""
    for one in with_commands_below(command):
        named = {parameter.name for parameter in one.params}
        if {"out", "force"} <= named and not hasattr(one.callback, _CONTINUES):
            one.callback = _checking(one.callback)


def _checking(called: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(called)
    def checking(*args: Any, **given: Any) -> Any:
        out = optional_path(given["out"])
        if out is not None and not any(map(given.get, _CHECKED_LATER)):
            check_free(out, given["force"])
        return called(*args, **given)

    return checking
