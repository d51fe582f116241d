"""Two processes on the CPU: DDP, ZeRO-2 and ZeRO-3 do what one process does on the same global batch."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mllm_adapters.loading.load import load_mllm
from mllm_adapters.training.trainer import WEIGHTS
from tests.mllm_adapters import complete, ranks
from tests.mllm_adapters.retraining import color_rows, loud_llava, turns, uneven_rows, write_json

pytest.importorskip("deepspeed", reason="DeepSpeed is in the extra 'train'")

BASE = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "report_to": "none"}
FAMILIES = ("instructblip", "qwen2_5-vl", "med-flamingo")


@pytest.fixture(scope="module")
def model(tiny_llava, tmp_path_factory):
    return loud_llava(tiny_llava, tmp_path_factory.mktemp("loud") / "loud")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows about images; ``mixed.json`` beside it has more rows without one, so that whole batches have none, and
    answers differ most in length in ``uneven.json``."""
    folder = tmp_path_factory.mktemp("data")
    rows = color_rows(folder / "images")
    texts = [{"id": f"t{i}", "conversations": turns("Hello", "Hi")} for i in range(8)]
    write_json(folder / "mixed.json", rows[:3] + texts)
    write_json(folder / "uneven.json", uneven_rows(folder / "images"))
    for name, settings in ranks.DEEPSPEED.items():
        write_json(folder / f"{name}.json", settings)
    return write_json(folder / "train.json", rows)


@pytest.fixture
def run(model, data, tmp_path):
    def start(number, kind, name=None, file="train.json", model=model, **recipe):
        more = {key: recipe.pop(key) for key in ("resume", "kill", "told", "again") if key in recipe}
        settings = {**BASE, "per_device_train_batch_size": 4 // number, **recipe}
        if kind in ranks.DEEPSPEED:
            settings["deepspeed"] = str(data.parent / f"{kind}.json")
        out = tmp_path / (name or f"{kind}-{number}")
        return ranks.run(number, model, data.parent / file, out, settings, **more), out

    return start


def weights(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_zero_3_trains_like_one_process_and_writes_an_ordinary_checkpoint(run, model):
    (one, alone), (two, shared) = run(1, "ddp"), run(2, "zero3")
    assert two == pytest.approx(one, abs=1e-4)
    assert one[-1] < one[0]
    assert close(weights(alone), weights(shared))
    assert not close(weights(model), weights(shared))
    _, report = AutoModelForImageTextToText.from_pretrained(shared, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    load_mllm(shared)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("stage", ["lora", "lora-vision", "full"])
def test_batches_without_images_on_one_process_do_not_hang_and_weigh_the_same(run, stage, kind):
    more = {} if stage == "full" else {"lora_dropout": 0}
    rate = 1e-3 if stage == "full" else 1e-2
    settings = {"stage": stage, "learning_rate": rate, "file": "mixed.json", **more}
    one, _ = run(1, "ddp", **settings)
    two, _ = run(2, kind, **settings)
    assert two == pytest.approx(one, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_a_run_that_lost_a_process_goes_on_where_it_was_saved(run, kind):
    whole, finished = run(2, kind, name="whole")
    run(2, kind, name="cut", kill=(1, 3))
    resumed, mended = run(2, kind, name="cut", resume=True)
    assert resumed == pytest.approx(whole, abs=1e-6)
    assert close(weights(finished), weights(mended))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_one_process_told_to_end_makes_all_save_at_the_same_step(run, kind):
    """Slurm's signal reaches processes at different moments."""
    whole, finished = run(2, kind, name="whole")
    run(2, kind, name="cut", told=(1, 3), save_steps=100, save_on_signal=True)
    resumed, mended = run(2, kind, name="cut", resume=True, save_steps=100)
    assert resumed == pytest.approx(whole, abs=1e-6)
    assert close(weights(finished), weights(mended))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_train_on_two_processes_as_on_one(run, name, request, tmp_path):
    source = complete.steady(name, tmp_path, lambda: request.getfixturevalue("golden"))
    settings = {"model": source, "file": "uneven.json"}
    # Losses only: Adam makes whole steps of gradients that are zero but for rounding (biases of keys).
    one, _ = run(1, "ddp", **settings)
    for kind in ("ddp", "zero2", "zero3"):
        two, _ = run(2, kind, **settings)
        assert two == pytest.approx(one, abs=2e-5), kind
    apart, _ = run(2, "ddp", "apart", average_tokens_across_devices=False, **settings)
    assert apart != pytest.approx(one, abs=2e-4), "negative control: a mean of each process's mean"


@pytest.mark.slow
def test_two_arms_in_one_command_are_independent(run, tmp_path):
    _, second = run(2, "zero3", again=tmp_path / "first")
    assert close(weights(tmp_path / "first"), weights(second))


@pytest.mark.slow
def test_checkpoints_of_sharded_runs_hold_no_frozen_weights(run):
    _, out = run(2, "zero3")
    saved = out.with_name(f"{out.name}.training") / "checkpoint-4"
    assert set(load_file(saved / WEIGHTS)) == {
        f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    states = next(saved.glob("global_step*/*model_states.pt"))
    assert states.stat().st_size < 300_000
    shutil.rmtree(out)
