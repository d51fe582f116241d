"""Every table that a command prints, with what it really prints on small inputs, at three widths and no terminal."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mgll_encoder.common.terminal_table import TerminalTable
from tests import test_docs_run
from tests.common.test_terminal_table import WIDTHS, check_whole
from tests.environments import ROOT
from tests.test_docs_run import run

reader = test_docs_run.files
"""A reader's files."""

LINES = (
    "mgll-encoder inspect mgll-fundus.pt",
    "mgll-encoder probe --list",
    "mgll-encoder probe --encoder mgll-fundus --labels labels.csv --images images --patient-column patient"
    " --min-positives 1",
    "mgll-encoder pretrain --manifest captions.jsonl --images images --tower-size nano --epochs 1 --loss clip"
    " --batch-size 16 --workers 0 --out towers/both",
    "mgll-encoder retrieval --encoder towers/both --manifest captions.jsonl --split train",
    "swap-encoder families",
    "swap-encoder --mllm llava-med --encoder mgll-fundus --align photographs --out swapped",
    "swap-encoder verify swapped --encoder mgll-fundus --mllm llava-med",
    "retrain-projector --model swapped --data train.json --images images --estimate",
    "retrain-projector --model swapped --data train.json --images images --dry-run",
    "eval-mcq build --list",
    "eval-mcq build --labels labels.csv --images images --min-negatives 1 --out b.jsonl",
    "eval-mcq check --model llava-med --bench b.jsonl --limit 8",
    "eval-mcq audit",
)
"""Lines that print all tables of the commands."""


@pytest.fixture(scope="module")
def printed(reader: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[TerminalTable]]:
    """``file:function`` that makes a table -> the tables that were printed."""
    place = tmp_path_factory.mktemp("tables") / "reader"
    shutil.copytree(reader, place)
    found: dict[str, list[TerminalTable]] = {}
    origin: dict[int, str] = {}
    kept: list[TerminalTable] = []
    create, draw = TerminalTable.__init__, TerminalTable.__rich_console__

    def creating(self, *given, **named):
        code = sys._getframe(1).f_code
        origin[id(self)] = f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_name}"
        kept.append(self)  # so that no other one gets its id
        create(self, *given, **named)

    def drawing(self, console, options):
        found.setdefault(origin[id(self)], []).append(self)
        return draw(self, console, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(TerminalTable, "__init__", creating)
        patch.setattr(TerminalTable, "__rich_console__", drawing)
        for line in LINES:
            done = run(tuple(line.split()))
            assert done.code in (0, 2 if " check " in line else 0), (
                f"{line}\n{done.out[-800:]}\n{done.err[-800:]}"
            )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_no_table_of_a_command_is_cut(width: int, printed: dict[str, list[TerminalTable]]) -> None:
    for tables in printed.values():
        for table in tables:
            check_whole(table, width)


@pytest.mark.slow
def test_all_functions_that_make_a_table_were_called(printed: dict[str, list[TerminalTable]]) -> None:
    made = {
        f"{file.relative_to(ROOT)}:{function.name}"
        for package in ("mgll_encoder", "mllm_adapters", "eval_mcq")
        for file in (ROOT / package).rglob("*.py")
        if file.name != "terminal_table.py" and "TerminalTable(" in file.read_text("utf-8")
        for function in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "TerminalTable"
    }
    assert made == set(printed)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("line", [line for line in LINES if line.endswith(("--list", "families", "audit"))])
def test_a_command_prints_within_the_width_of_its_pipe(line: str, width: int) -> None:
    """In a process of its own, whose console nobody has used before."""
    program, *words = line.split()
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *words],
        env={**os.environ, "COLUMNS": str(width)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "…" not in done.stdout
    drawn = [row for row in done.stdout.splitlines() if "│" in row or "─" in row]
    assert drawn
    assert max(map(len, drawn)) <= width, drawn


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "line",
    [
        "retrain-projector",
        "finetune-lora",
        "swap-encoder",
        "mgll-encoder pretrain",
        "mgll-encoder",
        "eval-mcq",
    ],
)
def test_a_help_text_shows_whole_names(line: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = run((*line.split(), "--help"))
    assert done.code == 0
    assert "…" not in done.out
    assert max(map(len, done.out.splitlines())) <= width
    assert "..." not in done.out.partition("Commands:")[2], "a sentence is whole"
