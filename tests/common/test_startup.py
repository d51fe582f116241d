"""What needs neither torch nor transformers does not import them: imports, help, versions, wrong paths."""

import json
import os
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest
import typer

import eval_mcq
import mgll_encoder
import mllm_adapters
from mgll_encoder.common.option_table import option_rows
from tests.environments import ROOT

ENTRIES = {
    "mgll-encoder": "mgll_encoder.cli:main",
    "swap-encoder": "mllm_adapters.cli.swap:main",
    "retrain-projector": "mllm_adapters.cli.retrain:main",
    "finetune-lora": "mllm_adapters.cli.lora:main",
    "eval-mcq": "eval_mcq.cli.main:main",
    "mgll": "eval_mcq.cli.umbrella:main",
}

WRONG = {
    "mgll-encoder": (
        "inspect nope", "convert nope --out x", "pretrain --manifest nope --out x",
        "probe --encoder nope --images . --labels nope", "probe --encoder . --images . --labels nope",
        "zero-shot --encoder . --images . --labels nope", "retrieval --encoder . --manifest nope",
        "explain --encoder nope --images . --out x.png", "explain --encoder . --images nope --out x.png",
        "data fundus --labels nope --images nope --out x.jsonl", "data xray --dicom nope --out x",
    ),
    "swap-encoder": (
        "--mllm nope --encoder nope", "--mllm ./nope --encoder .", "--mllm nope --encoder .",
        "convert --mllm nope/ --out x", "verify nope", "verify .", "restore nope --to-encoder",
        "restore nope --mllm nope", "compose --delta nope --out x", "extract nope --mllm nope",
    ),
    "retrain-projector": (
        "--model nope --data nope", "--model . --data nope", "--model . --data pyproject.toml --images nope",
        "--model . --data pyproject.toml --control nope", "--model . --data pyproject.toml --recipe nope",
    ),
    "finetune-lora": ("--model nope --data nope", "--model .. --data nope"),
    "mgll": ("swap --mllm nope --encoder nope", "eval run --model nope --bench nope", "lora --model nope --data nope"),
    "eval-mcq": (
        "build --labels nope --images nope --out x.jsonl", "run --model nope --bench nope", "table nope",
        "compare a=nope b=nope", "report nope --out x.html", "merge nope --out x", "check --model nope",
        "import nope --format gmai --out x.jsonl", "export nope --out x", "audit --table nope",
    ),
}  # fmt: skip

PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module

module, function = sys.argv[1].split(":")
main, told = getattr(import_module(module), function), []
for arguments in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["command", *arguments]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    heavy = sorted({"torch", "transformers"} & set(sys.modules))
    told.append([arguments, code, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(told))
"""


def fresh(program: str, *arguments: str, cwd: Path = ROOT) -> str:
    """Return what a program prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ENTRIES)
def test_help_version_and_mistakes_are_answered_without_torch(name: str) -> None:
    mistakes = [command.split() for command in WRONG[name]]
    asked = [["--help"], ["--version"], ["--no-such-option"], *mistakes]
    answers = json.loads(fresh(PROGRAM, ENTRIES[name], json.dumps(asked)))
    shown, version, *refused = answers
    assert shown[1] == 0
    assert "--version" in shown[2]
    assert (version[1], version[2].split()[-1]) == (0, metadata.version("mgll-mllm"))
    for arguments, code, _, err, _ in refused:
        assert code == 2, (arguments, err)
        assert len(err.splitlines()) == 1, err
        assert "nope" in err or "." in arguments or arguments == ["--no-such-option"]
    assert not [(arguments, heavy) for arguments, *_, heavy in answers if heavy]


ALONE = {
    "mgll-encoder": {
        "": None, "data": None, "inspect": "missing: PATH", "explain": "missing: --encoder, --images, --out",
    },
    "swap-encoder": {"": None, "compose": "missing: --delta, --out", "verify": "missing: FOLDER"},
    "retrain-projector": {"": "missing: --model, --data", "--data x": "missing: --model"},
    "finetune-lora": {"": "missing: --model, --data"},
    "eval-mcq": {
        "": None, "build": "missing: --labels, --images, --out", "compare": "missing: RUNS",
        "run --model x": "missing: --bench", "compar": "No such command 'compar'. Did you mean 'compare'?",
    },
    "mgll": {"": None, "swap": None, "eval": None, "encoder data": None, "retrain": "missing: --model, --data"},
}  # fmt: skip
"""What a new user types to see what a command wants -> the error; None for the help text."""


@pytest.mark.parametrize("name", ENTRIES)
def test_a_command_without_arguments_shows_its_help_or_all_that_is_missing(name: str) -> None:
    answers = json.loads(fresh(PROGRAM, ENTRIES[name], json.dumps([line.split() for line in ALONE[name]])))
    for (line, wanted), (_, code, out, err, _) in zip(ALONE[name].items(), answers, strict=True):
        assert (code, out) == (2, ""), (line, out, err)
        if wanted is None:
            first, *rest = err.splitlines()
            assert first.startswith("Usage: ")
            assert {"Options:", "Commands:"} <= set(rest)
            assert "error" not in first
        else:
            assert err.startswith(f"error: {wanted}"), err
            assert err.rstrip().endswith("--help")


def _writing(name: str) -> list[list[str]]:
    """A command line for each command of a program with --out and --force; all else that it requires is missing."""
    module, _ = ENTRIES[name].split(":")
    rows = list(option_rows(typer.main.get_command(import_module(module).app), ""))
    commands = {row.command: [other for other in rows if other.command == row.command] for row in rows}
    found = []
    for command, mine in commands.items():
        named = {row.argument: row for row in mine}
        if {"out", "force"} <= named.keys() and command != " run":
            needed = [row for row in mine if row.required and row.argument != "out"]
            given = [
                word
                for row in needed
                for word in ([row.name] * row.name.startswith("--") + [(*row.choices, "nope")[0]])
            ]
            found.append([*command.split(), *given, named["out"].name, "taken"])
    return found


@pytest.mark.parametrize(("name", "least"), [("mgll-encoder", 8), ("swap-encoder", 7), ("eval-mcq", 7),
                                             ("retrain-projector", 1), ("finetune-lora", 1)])  # fmt: skip
def test_an_output_that_exists_is_refused_before_anything_else(name: str, least: int, tmp_path: Path) -> None:
    """A new user waited half a minute for `swap-encoder example` to build it all, and then to refuse it."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "example").mkdir()
    lines = _writing(name)
    assert len(lines) >= least
    if name == "swap-encoder":
        lines += [["example"], ["--mllm", "nope", "--encoder", "nope", "--out", "taken"]]
    for arguments, code, out, err, heavy in json.loads(
        fresh(PROGRAM, ENTRIES[name], json.dumps(lines), cwd=tmp_path)
    ):
        place = "example" if arguments == ["example"] else "taken"
        option = "--gguf" if "--gguf" in arguments else "--out"
        wanted = f"error: output {place} exists: choose another {option}, or replace it with --force\n"
        assert (code, out, err, heavy) == (2, "", wanted, []), arguments


@pytest.mark.parametrize("package", ["mgll_encoder", "mllm_adapters", "eval_mcq"])
def test_importing_a_package_imports_nothing_heavy_whatever_the_program_is_called(package: str) -> None:
    program = (
        f"import sys; sys.argv = ['any_script.py']; import {package}; print({package}.__version__, dir({package}), "
        "sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    found = fresh(program)
    assert found.startswith(metadata.version("mgll-mllm"))
    assert found.rstrip().endswith("[]")


@pytest.mark.parametrize("package", [mgll_encoder, mllm_adapters, eval_mcq])
def test_every_public_name_is_there(package: object) -> None:
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        package.nothing_of_this_name  # noqa: B018


def test_our_architectures_are_registered_when_asked_for_and_not_before() -> None:
    program = """
import mllm_adapters
from transformers import CONFIG_MAPPING
before = "mgll_janus" in CONFIG_MAPPING
import mllm_adapters.auto
print(before, "mgll_janus" in CONFIG_MAPPING, "mgll_qwen_vl" in CONFIG_MAPPING)
"""
    assert fresh(program).split() == ["False", "True", "True"]
