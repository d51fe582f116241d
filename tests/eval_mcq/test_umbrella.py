"""``mgll``: the five commands under one name."""

import json
from importlib import import_module

import pytest

from eval_mcq.cli.umbrella import PROGRAMS, command_of, main
from mgll_encoder.common.spelling import with_commands_below
from tests.builders import invoke, refused
from tests.common.test_startup import fresh

LOADED = """
import json, sys
from contextlib import suppress
from eval_mcq.cli.umbrella import main
sys.argv = ["mgll", "--help"]
with suppress(SystemExit):
    main()
heavy = ("torch", "mgll_encoder.cli", "mllm_adapters.cli.swap", "eval_mcq.cli.main")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


@pytest.mark.parametrize("word", PROGRAMS)
def test_a_command_is_described_as_by_itself(word: str) -> None:
    program = PROGRAMS[word]
    assert import_module(program.module).app.info.help.startswith(program.about)
    command = command_of(program)
    assert command.params
    assert f"Example: mgll {word} " in " ".join(one.help for one in with_commands_below(command))
    assert not [one.name for one in with_commands_below(command) if f"Example: {program.name}" in one.help]


def test_its_help_imports_no_command() -> None:
    assert json.loads(fresh(LOADED).splitlines()[-1]) == []


def test_a_command_runs_as_by_itself() -> None:
    assert invoke(main, "swap", "--version").out.startswith("mgll swap ")
    assert "build" in invoke(main, "eval", "--help").out
    said = invoke(main, "eval", "check", "nope")
    assert "MODEL is --model now" in said.err
    assert "model nope is not a model folder" in said.err
    assert said.code == 2


def test_a_mistyped_word_gets_the_nearest() -> None:
    assert "Did you mean 'eval'" in refused(main, "evla")
    assert "did you mean '--dataset'? see mgll encoder data fundus --help" in refused(
        main, "encoder", "data", "fundus", "--layuot", "x"
    )


def test_completion_knows_the_options_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MGLL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "mgll eval run --prec")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert invoke(main).out.split() == ["--precision"]
