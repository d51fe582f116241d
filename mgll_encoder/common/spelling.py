"""Translate the arguments and functions named in messages of the library into options and commands.

A message names them as Python does, in backticks: ``layout=llava``, ``parts['tower']=PATH``, ``feature_cache=False``,
``pretrain()``, ``convert(mllm=FOLDER)``. A command prints its own options and the names of commands instead:
``--layout llava``, ``--part tower=PATH``, ``--no-feature-cache``, ``mgll-encoder pretrain``,
`` `swap-encoder convert --mllm FOLDER` ``. This requires that the parameter of an option has the name of the library's
argument. An argument that only another program has is named with that program: ``swap-encoder's --part tower=PATH``.
Other unknown names are not translated.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from mgll_encoder.common.errors import ARGUMENT

CALL = re.compile(r"`(?P<name>[a-z]\w*)\((?P<arguments>[^`]*)\)`")

COMMANDS: Mapping[str, str] = {
    "build_benchmark": "eval-mcq build",
    "build_fundus": "mgll-encoder data fundus",
    "compose": "swap-encoder compose",
    "convert": "swap-encoder convert",
    "convert_tower": "mgll-encoder convert",
    "estimate_memory": "--estimate",
    "export_benchmark": "eval-mcq export",
    "export_gguf": "swap-encoder export",
    "finetune_lora": "finetune-lora",
    "import_benchmark": "eval-mcq import",
    "load_run": "eval-mcq table",
    "plan_swap": "swap-encoder",
    "pretrain": "mgll-encoder pretrain",
    "retrain_projector": "retrain-projector",
    "run": "eval-mcq run",
    "write_delta": "swap-encoder --delta-only",
}
"""Function -> equivalent command or option."""

ELSEWHERE: Mapping[str, tuple[str, str]] = {
    "encoder": ("swap-encoder", "--encoder"),
    "image_size": ("swap-encoder", "--image-size"),
    "layout": ("swap-encoder", "--layout"),
    "mllm": ("swap-encoder", "--mllm"),
    "parts": ("swap-encoder", "--part"),
    "qlora": ("finetune-lora", "--qlora"),
    "tokens": ("swap-encoder", "--tokens"),
}
"""Argument -> program and option, for messages about checkpoints that every command with a model can meet."""


@dataclass
class Spelling:
    """The options of a program by argument.

    Attributes:
        options: Argument -> option, over all its commands.
        negations: Argument -> the option that switches it off.
    """

    options: dict[str, str] = field(default_factory=dict)
    negations: dict[str, str] = field(default_factory=dict)

    def learn(self, command: Any) -> None:
        """Read the options of a program; those of a command take precedence while it runs."""
        self.options.clear()
        self.negations.clear()
        for one in with_commands_below(command):
            self._take(one)
            if one.callback is not None:
                one.callback = self._taking(one)

    def spell(self, message: str) -> str:
        """Replace arguments and functions in a message by options and commands."""
        return CALL.sub(_command, ARGUMENT.sub(self._option, message))

    def _take(self, command: Any) -> None:
        for parameter in command.params:
            argument = parameter.name.rstrip("_")
            if found := [name for name in parameter.opts if name.startswith("--")]:
                self.options[argument] = found[0]
            if off := parameter.secondary_opts:
                self.negations[argument] = off[0]

    def _taking(self, command: Any) -> Callable[..., Any]:
        called = command.callback

        @wraps(called)
        def taking(*args: Any, **kwargs: Any) -> Any:
            self._take(command)
            return called(*args, **kwargs)

        return taking

    def _option(self, found: re.Match[str]) -> str:
        name, key, value = found["name"], found["key"], found["value"]
        if value == "False":
            return self.negations.get(name, found[0])
        option = self.options.get(name) or "'s ".join(ELSEWHERE.get(name, ()))
        if not option:
            return found[0]
        if value == "True":
            return option
        return " ".join(filter(None, (option, "=".join(filter(None, (key, value))))))


def _command(found: re.Match[str]) -> str:
    if found["name"] not in COMMANDS:
        return found[0]
    words = [COMMANDS[found["name"]], *map(_word, filter(None, found["arguments"].split(", ")))]
    line = " ".join(words)
    return f"`{line}`" if " " in line.removeprefix(COMMANDS[found["name"]]).strip() else line


def _word(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if not equals:
        return argument
    option = f"--{name.replace('_', '-')}"
    return option if value in ("True", "...") else f"{option} {value}"


def with_commands_below(command: Any) -> Iterator[Any]:
    """Yield the commands below a command, and the command itself."""
    for one in getattr(command, "commands", {}).values():
        yield from with_commands_below(one)
    yield command
