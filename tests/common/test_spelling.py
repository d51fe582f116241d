"""The library names arguments, the command line spells them as its options: one message, two readers."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from mgll_encoder.common.cli import new_app, run
from mgll_encoder.common.errors import ARGUMENT, UserError
from mgll_encoder.common.spelling import CALL, COMMANDS, ELSEWHERE, Spelling
from tests.builders import options_of

ROOT = Path(__file__).parents[2]
PACKAGES = ("mgll_encoder", "mllm_adapters", "eval_mcq")
APPS = (
    "mgll_encoder.cli", "mllm_adapters.cli.swap", "mllm_adapters.cli.retrain", "mllm_adapters.cli.lora",
    "eval_mcq.cli.main",
)  # fmt: skip

DOCUMENTS = {
    "mgll_encoder/tower/card.py", "mllm_adapters/swap/card.py", "mllm_adapters/swap/delta_files.py",
}  # fmt: skip
"""Model cards, which are read by users of both."""

RECORDED = {"swap-encoder --align", "probe --mode finetune"}
"""Names of trainings in records, which stay as they are in old ones."""

TERMINAL = {
    f"mgll_encoder/common/{name}.py"
    for name in (
        "cli",
        "compute_options",
        "old_options",
        "option_table",
        "spelling",
        "table_options",
        "typing_errors",
    )
}
"""Where options belong to."""

OTHER_PROGRAMS = ("torchrun", "deepspeed", "accelerate", "pip", "var(", "lmms_eval", "llama")
"""What has options that are not ours."""

CONVERTER = {"--outfile", "--outtype", "--model-name"}
"""Options of llama.cpp's converter."""


@pytest.fixture
def swap() -> Spelling:
    """How swap-encoder spells arguments."""
    return options_of("mllm_adapters.cli.swap")


@pytest.mark.parametrize(
    ("python", "terminal"),
    [
        ("`image_size=300` is no multiple of 14", "--image-size 300 is no multiple of 14"),
        ("choose another `out`, or replace it with `force=True`", "choose another --out, or replace it with --force"),
        ("say where it is with `parts['tower']=PATH`", "say where it is with --part tower=PATH"),
        ("`images=photos`: 2 are too few", "--align photos: 2 are too few"),  # an option of another name
        ("`convert(mllm=a b, out=a b-hf)`, then that", "`swap-encoder convert --mllm a b --out a b-hf`, then that"),
        ("as `pretrain()` wrote", "as mgll-encoder pretrain wrote"),
        ("add `feature_cache=False`", "add `feature_cache=False`"),  # no option of swap-encoder
        ("`hf auth login` or `nothing()`", "`hf auth login` or `nothing()`"),
    ],
)  # fmt: skip
def test_arguments_become_options(swap: Spelling, python: str, terminal: str) -> None:
    assert swap.spell(python) == terminal


@pytest.mark.parametrize("app", ["mllm_adapters.cli.retrain", "mllm_adapters.cli.lora", "eval_mcq.cli.main"])
def test_an_option_of_another_program_is_named_with_it(app: str) -> None:
    """`eval-mcq run --model` of an incomplete checkpoint spoke of `parts`, which neither program nor shell knows."""
    said = options_of(app).spell("pass `parts['base']=PATH`, or `layout=llava`")
    assert said == "pass swap-encoder's --part base=PATH, or swap-encoder's --layout llava"
    for name, (program, option) in ELSEWHERE.items():
        home = {"swap-encoder": "mllm_adapters.cli.swap", "finetune-lora": "mllm_adapters.cli.lora"}[program]
        assert options_of(home).options[name] == option


def test_messages_about_checkpoints_name_no_argument_that_a_command_cannot_spell() -> None:
    reading = ("mllm_adapters/core/", "mllm_adapters/checkpoints/", "mllm_adapters/families/")
    known = options_of("eval_mcq.cli.main").options.keys() | ELSEWHERE.keys()
    for where, text in _texts():
        if where.startswith(reading):
            assert {found["name"] for found in ARGUMENT.finditer(text)} <= known, (where, text)


def test_a_negation_has_an_option_of_its_own() -> None:
    assert options_of("mllm_adapters.cli.retrain").spell("`feature_cache=False`") == "--no-feature-cache"


def test_the_command_that_runs_spells_first(capsys: pytest.CaptureFixture[str]) -> None:
    app = new_app("Two commands that spell one argument otherwise.")

    @app.command()
    def one(side: int = typer.Option(1, "--width")) -> None:
        raise UserError(f"`side={side}` is odd")

    @app.command()
    def two(side: int = typer.Option(1, "--height")) -> None:
        raise UserError(f"`side={side}` is odd")

    for command, option in (("one", "--width"), ("two", "--height")):
        assert _ran(app, command) == 2
        assert capsys.readouterr().err == f"error: {option} 1 is odd\n"


def test_an_error_says_which_arguments_it_is_about() -> None:
    error = UserError("`tokens=7` and `image_size=224`: give one, `parts['tower']` or `force=True`")
    assert error.arguments == ("tokens", "image_size", "parts", "force")


def test_no_message_of_the_library_names_an_option() -> None:
    named = [
        f"{where}: {text}"
        for where, text in _texts()
        if re.search(r"(?<![\w-])--[a-z]", text)
        and text not in RECORDED | CONVERTER
        and not any(name in text for name in OTHER_PROGRAMS)
    ]
    assert not named


def test_every_argument_in_a_message_is_an_option_of_some_command() -> None:
    known = set().union(*(options_of(app).options for app in APPS))
    unknown = [
        f"{where}: {found[0]}"
        for where, text in _texts()
        for found in ARGUMENT.finditer(text)
        if found["name"] not in known | NO_OPTIONS
    ]
    assert not unknown


def test_every_function_in_a_message_is_a_command() -> None:
    assert {found["name"] for _, text in _texts() for found in CALL.finditer(text)} <= COMMANDS.keys()


NO_OPTIONS: set[str] = set()


def _texts() -> Iterator[tuple[str, str]]:
    """Where a library module has a string that is no docstring, and the string, values as ``{}``."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            where = file.relative_to(ROOT).as_posix()
            if "/cli/" in where or where in DOCUMENTS | TERMINAL:
                continue
            tree = ast.parse(file.read_text("utf-8"))
            docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            inner = {
                id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
            }
            for node in ast.walk(tree):
                if id(node) in docs or id(node) in inner:
                    continue
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{where}:{node.lineno}", node.value
                elif isinstance(node, ast.JoinedStr):
                    parts = (str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
                    yield f"{where}:{node.lineno}", "".join(parts)


def _ran(app: typer.Typer, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["program", *arguments])
        with pytest.raises(SystemExit) as ended:
            run(app)
    return int(ended.value.code or 0)
