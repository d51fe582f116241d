"""User errors are exceptions by cause, all with the same base class."""

import ast
import json
import shutil
from pathlib import Path

import pytest

import eval_mcq
import mgll_encoder
import mllm_adapters
from eval_mcq import compare, load_benchmark
from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import (
    BadDataError,
    IncompatibleTowerError,
    InvalidArgumentError,
    MismatchError,
    MissingPackageError,
    NotFoundError,
    OutputTakenError,
    UnknownNameError,
    UnsupportedCheckpointError,
    UserError,
)
from mgll_encoder.common.extras import require
from mllm_adapters import plan_swap
from tests import environments
from tests.mllm_adapters.llava_checkpoints import a_tower


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_tower(tmp_path_factory.mktemp("towers") / "mgll")


def test_what_is_not_there(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    for call in (
        lambda: inspect_tower(tmp_path / "nope"),
        lambda: plan_swap(tmp_path / "nope", tower),
        lambda: load_benchmark(tmp_path / "nope.jsonl"),
        lambda: compare({"base": tmp_path}),
    ):
        with pytest.raises(NotFoundError, match=r"nope|is not a run"):
            call()


def test_what_is_taken(tiny_llava: Path, tower: Path, tmp_path: Path) -> None:
    plan = plan_swap(tiny_llava, tower)
    with pytest.raises(OutputTakenError, match=str(tmp_path)):
        plan.write(tmp_path)
    with pytest.raises(OutputTakenError, match="input"):
        plan.write(tiny_llava, force=True)


def test_what_is_damaged_or_not_supported_or_does_not_fit(
    tiny_llava: Path, tower: Path, tmp_path: Path
) -> None:
    (tmp_path / "bench.jsonl").write_text("no JSON\n")
    with pytest.raises(BadDataError, match=r"bench\.jsonl"):
        load_benchmark(tmp_path / "bench.jsonl")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedCheckpointError, match="gpt2"):
        plan_swap(tmp_path, tower)
    with pytest.raises(IncompatibleTowerError, match="30"):
        plan_swap(tiny_llava, tower, image_size=30)


def test_a_name_that_is_not_known(tower: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'llava-med'"):
        plan_swap("lava-med", tower)


def test_a_package_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments.installed(tmp_path, "peft", "0.1.0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match=r"peft.*pip install"):
        require("train", "this", "peft")


def test_arguments_that_contradict_each_other_and_inputs_that_do_not_belong_together(
    tiny_llava: Path, tower: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgumentError, match="image_size"):
        plan_swap(tiny_llava, tower, tokens=16, image_size=28)
    config = json.loads((tiny_llava / "config.json").read_text())
    shutil.copytree(tiny_llava, tmp_path / "mixed")
    config["vision_config"]["hidden_size"] *= 2
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="mixed"):
        plan_swap(tmp_path / "mixed", tower)


def test_every_refusal_names_its_cause() -> None:
    """All raise a subclass: the base class says only that the user can fix it."""
    for package in (eval_mcq, mgll_encoder, mllm_adapters):
        for file in Path(package.__path__[0]).rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            bare = [call.lineno for call in calls if getattr(call.func, "id", "") == "UserError"]
            assert not bare, (file, bare)
    assert all(kind.__doc__ for kind in UserError.__subclasses__())
