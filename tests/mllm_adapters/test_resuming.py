"""What becomes of a training that is told to end, killed, or resumed from states that are not whole."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mgll_encoder.common import signals
from mgll_encoder.common.errors import OutputTakenError
from mgll_encoder.common.resuming import last_checkpoint, only_run
from mllm_adapters.cli.retrain import main
from mllm_adapters.training.engine import train
from mllm_adapters.training.prepare import prepare_training
from mllm_adapters.training.recipe import Recipe, RunOptions
from mllm_adapters.training.work_folder import work_folder
from tests.builders import refused
from tests.mllm_adapters.retraining import color_rows, loud_llava, write_json

RECIPE = Recipe(max_steps=5, batch_size=2, learning_rate=1e-2)
SAVING = RunOptions(report_to=(), logging_steps=1, save_steps=2)
FLAGS = (
    "--max-steps", 5, "--batch-size", 2, "--learning-rate", 1e-2, "--logging-steps", 1, "--save-steps", 2,
    "--report-to", "none", "--workers", 0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_llava, tmp_path_factory):
    return loud_llava(tiny_llava, tmp_path_factory.mktemp("loud") / "loud")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_json(folder / "train.json", color_rows(folder / "images"))


@pytest.fixture
def run(model, data, tmp_path):
    def start(name, options=SAVING, callbacks=(), **flags):
        job = prepare_training(model, data, data.parent / "images", RECIPE)
        return train(job, tmp_path / name, options, callbacks=callbacks, **flags)

    return start


class Told(TrainerCallback):
    """Slurm's signal arrives during a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_told_to_end_a_training_saves_where_it_is_and_goes_on_from_there(run, tmp_path):
    whole = run("whole")
    with signals.watched(), pytest.raises(signals.Terminated):
        run("cut", replace(SAVING, save_steps=100, save_on_signal=True), [Told(3)])
    work = work_folder(tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    assert last_checkpoint(work).name == "checkpoint-3"
    resumed = run("cut", resume=True)
    assert resumed.losses == whole.losses
    a, b = weights(whole.out), weights(resumed.out)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_without_being_asked_to_it_ends_at_once(run, tmp_path):
    with signals.watched(), pytest.raises(signals.Terminated):
        run("cut", replace(SAVING, save_steps=100), [Told(3)])
    assert last_checkpoint(work_folder(tmp_path / "cut")) is None
    assert [path.name for path in tmp_path.iterdir()] == ["cut.training"]


@pytest.fixture
def cut(run, tmp_path):
    """A work folder with checkpoints at steps 2 and 4, and the command that resumes it."""
    with signals.watched(), pytest.raises(signals.Terminated):
        run("cut", SAVING, [Told(5)])
    return work_folder(tmp_path / "cut")


def missing(file: Path) -> None:
    file.unlink()


def short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def pickled_code(file: Path) -> None:
    torch.save({"state": Trap()}, file)


class Trap:
    def __reduce__(self):
        return os.system, ("touch trap",)


@pytest.mark.parametrize(
    ("state", "damage"),
    [
        ("optimizer.pt", missing), ("optimizer.pt", short), ("optimizer.pt", pickled_code),
        ("scheduler.pt", missing), ("scheduler.pt", short), ("rng_state.pth", missing), ("rng_state.pth", pickled_code),
        ("trained.safetensors", missing), ("trained.safetensors", short),
    ],
)  # fmt: skip
def test_a_state_that_is_not_whole_is_named_with_the_way_on(cut, model, data, state, damage, monkeypatch):
    monkeypatch.chdir(cut.parent)
    damage(cut / "checkpoint-4" / state)
    command = (
        main, "--model", model, "--data", data, "--images", data.parent / "images",
        "--out", cut.parent / "cut", "--resume", *FLAGS,
    )  # fmt: skip
    message = refused(*command)
    assert f"cannot resume from {cut / 'checkpoint-4'}: " in message
    assert "remove that folder to continue from checkpoint-2" in message
    assert "weights_only" not in message
    assert not (cut.parent / "trap").exists()


def test_a_state_of_the_trainer_that_was_cut_short_makes_its_checkpoint_unfinished(cut, run, caplog):
    short(cut / "checkpoint-4" / "trainer_state.json")
    assert last_checkpoint(cut).name == "checkpoint-2"
    assert "is truncated: checkpoint-4 is ignored" in "\n".join(caplog.messages)
    assert run("cut", resume=True).steps == 5


def test_two_runs_cannot_train_into_one_folder_and_the_lock_leaves_no_trace(run, tmp_path):
    with (
        only_run(tmp_path / "out"),
        pytest.raises(OutputTakenError, match=r"another run is training into .*out"),
    ):
        run("out")
    assert list(tmp_path.iterdir()) == []
    run("out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.training"]
