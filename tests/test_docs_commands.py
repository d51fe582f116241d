"""Somebody copies a line from README or docs/: its command, sub-command and options exist.

Lines of our commands are parsed by the real ones. Scripts, test modules, make targets and extras that are named exist.
What the lines do is tested by `test_docs_run.py` (slow).
"""

import re
import tomllib
from pathlib import Path

import pytest
import typer

from tests import documents
from tests.documents import COMMANDS, PAGES, Line, app, commands_of, options_of, parse
from tests.environments import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def options_of_script(source: str) -> set[str]:
    """Options of a script: those it spells, and the parameters that Typer makes options of."""
    parameters = re.findall(r"^ *(\w+): (?:Annotated|\w+)", source, re.MULTILINE)
    return {*re.findall(r"--[a-z][\w-]+", source), *(f"--{name.replace('_', '-')}" for name in parameters)}


FOREIGN = {
    "--module", "--no-python", "--nproc-per-node", "--num_gpus", "--no_local_rank", "--local_rank", "--multi_gpu",
    "--num_processes", "--no-deps", "--signal", "--annotate", "--flash-attn",
}  # fmt: skip
"""Options of other programs that texts name."""


GENERATED = {"options.md"}
"""Made from the commands themselves, with the old names of options, which no other page may use."""

OF_SCRIPTS = {
    option
    for script in [*ROOT.glob("scripts/**/*.py"), ROOT / "tests" / "fuzz" / "__main__.py"]
    for option in options_of_script(script.read_text(encoding="utf-8"))
}
"""Options of the project's own scripts."""


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_of_a_page_parses(page: Path) -> None:
    for line in commands_of(page):
        if not (words := line.command):
            known = line.words[0] in documents.OTHERS or documents.is_path(line.words[0])
            assert known, f"{line}: no program that the documents use ({', '.join(documents.OTHERS)})"
        elif line.abbreviated:
            wrong = {one for one in words if one.startswith("--")} - options_of(words[0])
            assert not wrong, f"{line}: {words[0]} has no {wrong}"
        else:
            try:
                parse(app(words[0]), words[0], words[1:])
            except typer.exceptions.TyperException as error:
                pytest.fail(f"{line}: {error.format_message()}")


def test_a_wrong_line_is_found() -> None:
    """The test above can fail: for a command, an option, a value and an argument that do not exist."""
    for line in (
        "eval-mcq rum --model a",
        "eval-mcq run --modle a",
        "swap-encoder --tokens many",
        "eval-mcq audit a b",
    ):
        name, *arguments = line.split()
        with pytest.raises(typer.exceptions.TyperException):
            parse(app(name), name, arguments)


def test_nothing_that_looks_like_our_commands_is_overlooked() -> None:
    """A line of a code block that begins with one of our commands is among those that are parsed."""
    begins = re.compile(rf"^(?: {{4}}|\$ )?((?:{'|'.join(COMMANDS)}) [^=].*?)(?:\\)?$", re.MULTILINE)
    for page in PAGES:
        parsed = [" ".join(line.words) for line in commands_of(page)]
        for found in begins.findall(page.read_text(encoding="utf-8")):
            start = " ".join(found.split()[:2])
            assert any(start in one for one in parsed), f"{named(page)}: {found}"
    assert sum(bool(line.command) for page in PAGES for line in commands_of(page)) > 120


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=named)
def test_every_option_that_a_text_names_exists(page: Path) -> None:
    text = documents.CODE.sub("", page.read_text(encoding="utf-8"))
    known = FOREIGN.union(OF_SCRIPTS, *map(options_of, COMMANDS))
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        first = code.split()[0]
        if first in documents.OTHERS or first in documents.LAUNCHERS:
            continue
        ours = FOREIGN | options_of(first) if first in COMMANDS else known
        wrong = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", code)) - ours
        assert not wrong, f"{named(page)}: `{code}`: no command has {wrong}"


def script_or_module(line: Line) -> tuple[Path | None, list[str]]:
    """The file of this project that a line of Python runs, and the line's options."""
    words = list(line.words)
    if words[0] == "python" and words[1] == "-m" and words[2].startswith("tests."):
        base = ROOT.joinpath(*words[2].split("."))
        return (base.with_suffix(".py") if not base.is_dir() else base / "__main__.py"), words[3:]
    if words[0] == "python" and words[1].endswith(".py"):
        return ROOT / words[1], words[2:]
    return (ROOT / words[0], []) if words[0].startswith("scripts/") else (None, [])


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_scripts_modules_targets_and_extras_exist(page: Path) -> None:
    for line in commands_of(page):
        file, arguments = script_or_module(line)
        if file:
            assert file.is_file(), line
            source = file.read_text(encoding="utf-8")
            wrong = {one for one in arguments if one.startswith("--")} - options_of_script(source)
            assert not wrong, f"{line}: the script has no {wrong}"
        if line.words[0] == "pytest":
            assert (ROOT / line.words[1]).exists(), line
        if line.words[0] == "make":
            assert {word for word in line.words[1:] if re.fullmatch(r"[a-z-]+", word)} <= TARGETS, line
        for extra in re.findall(r"(?:\.|mgll-mllm)\[([\w,]+)\]", " ".join(line.words)):
            assert set(extra.split(",")) <= set(EXTRAS), line
