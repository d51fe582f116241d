"""Errors in what was typed (an unknown option, a missing or wrong value), in one line with the nearest known name."""

import re
from typing import Any

from mgll_encoder.common.errors import did_you_mean
from mgll_encoder.common.old_options import OLD_OPTIONS

_CHOICE = re.compile(r"'(?P<found>[^']*)' is not one of (?P<known>'.*')\.$")


def typing_error(error: Any) -> str:
    """Return the message of an exception of Typer, with a suggestion if one is near."""
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        return _unknown_option(error.option_name, error.ctx)
    if missing := _missing(error):
        return f"missing: {', '.join(missing)}; see {error.ctx.command_path} --help"
    message: str = error.format_message().replace("Value error, ", "")
    if choice := _CHOICE.search(message):
        near = did_you_mean(choice["found"], re.findall(r"'([^']*)'", choice["known"]))
        return f"{message} {near[0].upper()}{near[1:].strip()}" if near else message
    invalid_value = hasattr(error, "param")  # its message says what is valid
    if getattr(error, "ctx", None) is not None and not invalid_value:
        return f"{message} See {error.ctx.command_path} --help"
    return message


# Typer's exceptions below are known by name: their classes are in its private copy of click.


def asked_help(error: Any) -> str | None:
    """Return the help text that Typer raises as an error for a group without arguments; None for other errors."""
    return error.format_message() if type(error).__name__ == "NoArgsIsHelpError" else None


def _missing(error: Any) -> list[str]:
    """Return all required options and arguments that are missing; empty for other errors."""
    if type(error).__name__ != "MissingParameter" or error.ctx is None:
        return []
    # Click reads what was given before it misses anything.
    unread = [one for one in error.ctx.command.params if one.required and one.name not in error.ctx.params]
    return [one.opts[0] if one.param_type_name == "option" else one.name.upper() for one in unread]


def _unknown_option(found: str, context: Any) -> str:
    """Name the option, the nearest one of the command, and how to list all of them."""
    known = {
        name: name
        for parameter in context.command.params
        if parameter.param_type_name == "option"
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    others = {old: new for renamed in OLD_OPTIONS.values() for old, new in renamed.items() if new in known}
    others |= getattr(context.command, "old_options", {})
    near = did_you_mean(found, [*known, *others])
    for old, new in others.items():
        if old not in known:
            near = near.replace(f"'{old}'", f"'{new}'")
    return f"no such option: {found}; {near}see {context.command_path} --help"
