"""What a user sees of a training: picture, alarms, the benchmark in between; and who may train where."""

import io
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerState

from mgll_encoder.common.resuming import last_checkpoint
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.loading.load import load_mllm
from mllm_adapters.training.callbacks import DivergedError, Watchdog, find_evaluator, loss_plot
from mllm_adapters.training.engine import Extras, train
from mllm_adapters.training.prepare import prepare_training
from mllm_adapters.training.recipe import Recipe, RunOptions
from tests import builders
from tests.eval_mcq.helpers import question, write_bench
from tests.mllm_adapters.retraining import COLORS, color_rows, loud_llava, write_json

FAST = RunOptions(report_to=(), logging_steps=1, save_steps=2)
RECIPE = Recipe(max_steps=4, batch_size=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def place(tiny_llava, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    data = write_json(folder / "train.json", color_rows(folder / "images"))
    return SimpleNamespace(
        model=loud_llava(tiny_llava, folder / "llava"), data=data, images=folder / "images"
    )


@pytest.fixture
def bench(tmp_path):
    """Two categories of unequal size about the two colors."""
    questions = []
    for i, (name, color) in enumerate([*COLORS.items()] * 3):
        builders.picture(tmp_path, f"{i}.png", color)
        options = list(COLORS)
        questions.append(
            question(f"q{i}", f"{i}.png", options=options, answer=options.index(name), category="AB"[i > 3])
        )
    return write_bench(tmp_path / "bench.jsonl", questions, categories=["A", "B"])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The project's entry points as pyproject.toml declares them, whatever is installed."""
    declared = tomllib.loads(Path("pyproject.toml").read_text())["project"]["entry-points"]
    folder = tmp_path / "site" / "mgll_mllm-9.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Name: mgll-mllm\nVersion: 9\n")
    lines = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in rows.items()) for group, rows in declared.items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path / "site")


def run(place, out, extras=None, **flags):
    job = prepare_training(place.model, place.data, place.images, RECIPE)
    return train(job, out, FAST, extras=extras, **flags)


def projector(folder):
    return {key: v for key, v in load_file(folder / "model.safetensors").items() if "projector" in key}


def test_the_loss_plot_is_a_picture_of_the_losses():
    plain, scored = loss_plot([(1, 2.0), (2, 1.0)]), loss_plot([(1, 2.0), (2, 1.0)], [(2, 0.5)])
    assert Image.open(io.BytesIO(plain)).width > 300
    assert plain != scored != loss_plot([(1, 2.0), (2, 3.0)], [(2, 0.5)])


def test_the_best_weights_are_written_and_the_scores_recorded(place, tmp_path):
    class Scores:
        """The second evaluation is the best."""

        def __init__(self):
            self.identity = {"judge": "fixed"}
            self.values = iter([0.2, 0.9, 0.5, 0.1])

        def __call__(self, model, processor):
            assert not model.training
            return next(self.values)

    out = tmp_path / "out"
    outcome = run(place, out, Extras(evaluate=Scores(), eval_every=1))
    assert outcome.best_step == 2
    record = json.loads((out / "training.json").read_text())
    assert record["scores"] == [[1, 0.2], [2, 0.9], [3, 0.5], [4, 0.1]]
    saved = load_file(last_checkpoint(outcome.work).with_name("checkpoint-2") / "trained.safetensors")
    assert {f"model.{key}" for key in projector(out)} == saved.keys()
    assert all(torch.equal(value, saved[f"model.{key}"]) for key, value in projector(out).items())


def test_the_benchmark_is_found_scores_the_macro_average_and_changes_no_weight(place, bench, installed):
    from eval_mcq.items.schema import load_bench
    from eval_mcq.scoring.score import Scorer
    from mgll_encoder.common.images import open_image

    evaluate = find_evaluator(bench)
    model, processor = load_mllm(place.model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    score = evaluate(model, processor)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    items = load_bench(bench).items
    images = [[open_image(bench.parent / name) for name in item.images] for item in items]
    chosen = [found.choice for found in Scorer(model, processor).score(items, images)]
    right = [choice == item.answer for choice, item in zip(chosen, items, strict=True)]
    shares = [
        [ok for ok, item in zip(right, items, strict=True) if item.category == name] for name in ("A", "B")
    ]
    assert score == pytest.approx(sum(sum(share) / len(share) for share in shares) / 2)


def test_the_command_scores_while_it_trains(place, bench, installed, tmp_path):
    outcome = builders.invoke(
        retrain_projector, "--model", place.model, "--data", place.data, "--images", place.images,
        "--out", tmp_path / "out", "--max-steps", 2, "--batch-size", 2, "--workers", 0, "--report-to", "none",
        "--eval-bench", bench, "--eval-every", 1,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "Best score: " in outcome.out
    assert [step for step, _ in json.loads((tmp_path / "out" / "training.json").read_text())["scores"]] == [
        1,
        2,
    ]
    missing = builders.refused(
        retrain_projector, "--model", place.model, "--data", place.data, "--images", place.images,
        "--out", tmp_path / "other", "--eval-bench", tmp_path / "none.jsonl",
    )  # fmt: skip
    assert "none.jsonl" in missing


def test_a_lost_run_says_from_which_step_it_could_go_on(place, tmp_path):
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    model.model.multi_modal_projector.linear_1.weight.fill_(torch.nan)

    with pytest.raises(DivergedError, match=r"at step 4: start over.*`resume=True` continues from step 2"):
        run(place, tmp_path / "out", callbacks=[Poison()])
    assert last_checkpoint(tmp_path / "out.training").name == "checkpoint-2"
    assert run(place, tmp_path / "out", resume=True).steps == 4


def test_a_loss_that_rises_far_is_reported_once(tmp_path, caplog):
    watchdog = Watchdog(tmp_path)
    for step, loss in enumerate([2.0, 0.5, 1.0, 5.0, 9.0], 1):
        state = TrainerState(global_step=step, is_world_process_zero=True)
        watchdog.on_log(None, state, None, logs={"loss": loss})
    assert "\n".join(caplog.messages).count("may be diverging") == 1
