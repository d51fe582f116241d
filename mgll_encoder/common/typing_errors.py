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
    message: str = error.format_message().replace("Value error, ", "")
    if choice := _CHOICE.search(message):
        near = did_you_mean(choice["found"], re.findall(r"'([^']*)'", choice["known"]))
        return f"{message} {near[0].upper()}{near[1:].strip()}" if near else message
    return message


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
