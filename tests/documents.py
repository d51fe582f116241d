"""The commands that README, CONTRIBUTING and docs/ show, as somebody would type them."""

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from tests.environments import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]

COMMANDS: Mapping[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
"""Command -> ``module:function``."""

MODULES = {where.partition(":")[0]: name for name, where in COMMANDS.items()}

LAUNCHERS = ("torchrun", "deepspeed", "accelerate", "srun")
"""Programs that start one of our commands; their own options come before it."""

OTHERS = (
    "python", "python3", "pip", "pytest", "make", "git", "docker", "source", "cd", "apt", "export", "curl",
    "llama-server", "ollama", "swift", "vllm",
)  # fmt: skip
"""Programs that pages may begin a line with, besides ours and files of the project."""

EVERYWHERE = ("--help", "-h", "--version", "--install-completion", "--show-completion")
"""Options of every command."""

SHELL = ("bash", "sh", "console")
CODE = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1\s*$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n|\n(?= {4}))+")
SETTINGS = re.compile(r"(?:\w+=(?:\$\([^)]*\)|\S*)\s*)+")
PROMPT = "$ "
SEPARATORS = {"&&", "||", ";", "|"}
LEFT_OUT = {"...", "…"}


@dataclass(frozen=True)
class Line:
    """A command of a page: what a shell would start, without what it does to input and output."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"

    @property
    def command(self) -> tuple[str, ...]:
        """Our command in it with its arguments, also behind a launcher; empty if it has none."""
        if self.words[0] in LAUNCHERS:
            for place, word in enumerate(self.words):
                if word in MODULES and self.words[place - 1] in ("-m", "--module"):
                    return (MODULES[word], *self.words[place + 1 :])
                if word in COMMANDS:
                    return self.words[place:]
        return self.words if self.words[0] in COMMANDS else ()

    @property
    def abbreviated(self) -> bool:
        """Whether something is left out of it."""
        return bool(LEFT_OUT & set(self.words))


def shell_blocks(text: str) -> Iterator[str]:
    """The code blocks of a page that are for a shell: marked as such, or unmarked and beginning with a program."""
    for _, language, code in CODE.findall(text):
        if language in SHELL or (not language and begins_with_program(code)):
            yield code
    for found in INDENTED.finditer(CODE.sub("", text)):
        code = re.sub("^    ", "", found[0], flags=re.MULTILINE)
        if begins_with_program(code):
            yield code


def begins_with_program(code: str) -> bool:
    """Whether a block is one of commands, not of Python, JSON, a table, or a message."""
    first = without_settings(code.removeprefix(PROMPT)).split(maxsplit=1)[:1]
    return any(word in {*COMMANDS, *LAUNCHERS, *OTHERS} or is_path(word) for word in first)


def without_settings(line: str) -> str:
    """A command without the settings of the environment before it."""
    found = SETTINGS.match(line)
    return line[found.end() :] if found else line


def is_path(word: str) -> bool:
    """Whether a word is a path: to a script of this project, or to a program of an environment."""
    return word.startswith("scripts/") or "/bin/" in word


def lines_of(block: str) -> Iterator[tuple[str, ...]]:
    """The commands of a block as words: continued lines joined; comments, prompts, settings and output taken off."""
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    if any(line.startswith(PROMPT) for line in lines):
        lines = [line.removeprefix(PROMPT) for line in lines if line.startswith(PROMPT)]
    for line in lines:
        words: list[str] = []
        for word in [*shlex.split(without_settings(line), comments=True), ";"]:
            if word not in SEPARATORS:
                words.append(word)
            elif words:
                yield tuple(words)
                words = []


def commands_of(page: Path) -> list[Line]:
    """The commands of a page, in order."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    return [Line(name, words) for block in shell_blocks(text) for words in lines_of(block)]


@cache
def app(name: str) -> Any:
    """The real command of a name."""
    return typer.main.get_command(import_module(COMMANDS[name].partition(":")[0]).app)


def parse(command: Any, name: str, arguments: Sequence[str]) -> None:
    """Let a command and its sub-commands parse arguments, without doing anything.

    Raises:
        typer.exceptions.TyperException: a sub-command, option or argument is not one of the command's.
    """
    context = command.make_context(name, list(arguments))
    rest = [*getattr(context, "_protected_args", []), *context.args]
    if hasattr(command, "resolve_command") and rest:
        inner, chosen, left = command.resolve_command(context, rest)
        parse(chosen, f"{name} {inner}", left)


@cache
def options_of(name: str) -> frozenset[str]:
    """All option words of a command and its sub-commands."""
    return frozenset({*EVERYWHERE, *_options(app(name))})


def _options(command: Any) -> set[str]:
    own = {
        word for one in command.params for word in (*one.opts, *one.secondary_opts) if word.startswith("-")
    }
    return own.union(*map(_options, getattr(command, "commands", {}).values()))
