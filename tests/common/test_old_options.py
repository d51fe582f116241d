"""Old names of options still work for a release, and each run says so once."""

import importlib

import pytest
import typer

from mgll_encoder.cli import main as mgll_encoder
from mgll_encoder.common.old_options import OLD_OPTIONS, OLD_VALUES
from tests.builders import invoke, refused

APPS = {
    "mgll-encoder": "mgll_encoder.cli", "swap-encoder": "mllm_adapters.cli.swap",
    "retrain-projector": "mllm_adapters.cli.retrain", "finetune-lora": "mllm_adapters.cli.lora",
    "eval-mcq": "eval_mcq.cli.main",
}  # fmt: skip


def command(path: str) -> object:
    """The command of this path, as Typer builds it."""
    program, *words = path.split()
    found = typer.main.get_command(importlib.import_module(APPS[program]).app)
    for word in words:
        found = found.commands[word]
    return found


@pytest.mark.parametrize("path", OLD_OPTIONS)
def test_every_old_name_leads_to_an_option_and_is_none_itself(path: str) -> None:
    names = {name for one in command(path).params for name in (*one.opts, *one.secondary_opts)}
    assert set(OLD_OPTIONS[path].values()) <= names
    assert not names & OLD_OPTIONS[path].keys()


def test_an_old_name_is_read_as_the_new_one_and_said_once() -> None:
    old = invoke(mgll_encoder, "probe", "--encoder", "nope", "--data", "x", "--test", "0.2", "--images", ".")
    new = invoke(mgll_encoder, "probe", "--encoder", "nope", "--labels", "x", "--images", ".")
    warning, error = old.err.splitlines()
    assert warning == (
        "warning: old spelling, accepted until the next release: --data is --labels now, --test is --test-share now"
    )
    assert (
        (old.code, error)
        == (new.code, new.err.strip())
        == (2, "error: nope does not exist: check the path of the tower")
    )


def test_old_and_new_name_together_are_refused() -> None:
    given = ("probe", "--encoder", "nope", "--images", ".", "--labels", "x", "--data", "y")
    assert refused(mgll_encoder, *given) == "--data is the old name of --labels: give --labels only"


def test_a_missing_option_has_its_new_name() -> None:
    assert "--manifest" in refused(mgll_encoder, "pretrain", "--out", "x")


@pytest.mark.parametrize("old", OLD_VALUES["--precision"])
def test_old_words_for_a_number_format_are_read(old: str) -> None:
    said = invoke(mgll_encoder, "pretrain", "--manifest", "nope", "--out", "x", "--precision", old)
    assert f"--precision {old} is {OLD_VALUES['--precision'][old]} now" in said.err
    assert "manifest nope does not exist" in said.err


def test_a_flag_an_argument_and_a_negation_are_read() -> None:
    from eval_mcq.cli.main import main as eval_mcq
    from mllm_adapters.cli.swap import main as swap_encoder

    said = invoke(swap_encoder, "--mllm", "nope", "--encoder", "nope", "--delta", "--reference-tower").err
    assert "--delta is --delta-only now" in said
    assert "--reference-tower requires" not in said
    said = invoke(eval_mcq, "check", "nope").err
    assert "MODEL is --model now" in said
    assert "nope is not a model folder" in said
    said = invoke(eval_mcq, "report", "a=nope", "--html", "x.html", "--no-images").err
    assert "--html is --out now, --no-images is --no-thumbnails now" in said


def test_ranks_of_a_launch_say_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    said = invoke(mgll_encoder, "pretrain", "--data", "nope", "--out", "x").err
    assert said.startswith("error:")


def test_an_unknown_option_gets_the_nearest_new_name() -> None:
    for typed, near in {"--lables": "--labels", "--daat": "--labels", "--lr-rate": "--learning-rate"}.items():
        said = refused(mgll_encoder, "probe", "--encoder", "x", "--images", ".", typed, "1")
        assert f"did you mean '{near}'? see mgll-encoder probe --help" in said
    said = refused(mgll_encoder, "probe", "--encoder", "x", "--images", ".", "--protocol", "finetun")
    assert "Did you mean 'finetune'?" in said
