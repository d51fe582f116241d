"""All options of a program, as rows: for the table in the docs, and for checks that each word has one meaning."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

Kind = Literal["flag", "number", "path", "text"]

COMMON = frozenset({"--help", "-h", "--version", "--install-completion", "--show-completion"})
"""Options that every command has."""


@dataclass(frozen=True)
class OptionRow:
    """An option, or a positional argument, of one command.

    Attributes:
        command: The command, such as ``eval-mcq run``.
        name: Its name with dashes; that of a positional argument in capitals.
        off: The name that switches it off; empty if there is none.
        argument: The argument of the Python function.
        kind: What it takes.
        choices: The values it takes; empty if others are possible.
        repeatable: Whether it can be given several times.
        required: Whether it must be given.
        default: Its default; empty if the help text says what holds without it.
        about: Its help text.
    """

    command: str
    name: str
    off: str
    argument: str
    kind: Kind
    choices: tuple[str, ...]
    repeatable: bool
    required: bool
    default: str
    about: str

    @property
    def takes(self) -> str:
        """What it takes, in words."""
        found = " | ".join(self.choices) or self.kind
        return f"{found}, repeatable" if self.repeatable else found


def option_rows(command: Any, path: str) -> Iterator[OptionRow]:
    """Yield the options of a command, and of the commands below it.

    Args:
        command: Command as built by Typer.
        path: Its name.
    """
    for parameter in command.params:
        if not COMMON & {*parameter.opts} and not getattr(parameter, "hidden", False):
            yield _row(parameter, path)
    for name, below in getattr(command, "commands", {}).items():
        yield from option_rows(below, f"{path} {name}")


def _row(parameter: Any, path: str) -> OptionRow:
    option = parameter.param_type_name == "option"
    annotation = parameter.type_descriptor.annotation
    repeatable = get_origin(annotation) is list or parameter.nargs == -1
    inner = get_args(annotation)[0] if get_origin(annotation) is list else annotation
    default = parameter.default
    return OptionRow(
        command=path,
        name=parameter.opts[0] if option else (parameter.metavar or parameter.name).upper(),
        off=(parameter.secondary_opts or [""])[0],
        argument=parameter.name.rstrip("_"),
        kind=_kind(inner),
        choices=tuple(map(str, get_args(inner))) if get_origin(inner) is Literal else (),
        repeatable=repeatable,
        required=parameter.required,
        default="" if default in (None, False, "", ()) or callable(default) else str(default),
        about=parameter.help or "",
    )


def _kind(annotation: Any) -> Kind:
    kinds: dict[Any, Kind] = {bool: "flag", int: "number", float: "number", Path: "path"}
    return kinds.get(annotation, "text")


def option_markdown(rows: Iterable[OptionRow]) -> str:
    """Return the rows as a table in Markdown, one line for each option that several commands share."""
    shared: dict[OptionRow, list[str]] = {}
    for row in rows:
        like = OptionRow(**{**vars(row), "command": "", "argument": ""})
        shared.setdefault(like, []).append(row.command)
    lines = ["| option | commands | takes | default | meaning |", "|---|---|---|---|---|"]
    for row in sorted(shared, key=lambda row: (not row.name.startswith("--"), row.name, shared[row])):
        name = f"{row.name}, {row.off}" if row.off else row.name
        default = "required" if row.required else row.default
        cells = (f"`{name}`", ", ".join(shared[row]), row.takes, default, row.about)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def renamed_markdown(renamed: Mapping[str, Mapping[str, str]]) -> str:
    """Return the old names of options as a table in Markdown."""
    lines = ["| command | old | now |", "|---|---|---|"]
    lines += [
        f"| {command} | `{old}` | `{new}` |"
        for command, names in renamed.items()
        for old, new in names.items()
    ]
    return "\n".join(lines) + "\n"
