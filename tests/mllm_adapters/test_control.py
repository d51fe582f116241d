"""``--control``: the unswapped model trained in the same way, by one command."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from mllm_adapters.cli.retrain import main as retrain_projector
from tests import builders
from tests.mllm_adapters.retraining import color_rows, loud_llava, write_json


@pytest.fixture
def place(tiny_llava, tmp_path):
    """A model, and the same one with another tower."""
    base = loud_llava(tiny_llava, tmp_path / "base")
    swapped = shutil.copytree(base, tmp_path / "swapped")
    model = LlavaForConditionalGeneration.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(swapped)
    write_json(tmp_path / "train.json", color_rows(tmp_path / "images"))
    return tmp_path


def command(place, model="swapped", *more):
    return (
        retrain_projector, "--model", place / model, "--data", place / "train.json", "--images", place / "images",
        "--out", place / ("out" if model == "swapped" else "alone"), "--max-steps", 3, "--batch-size", 2,
        "--save-steps", 1, "--logging-steps", 1, "--workers", 0, "--report-to", "none", *more,
    )  # fmt: skip


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_control_is_what_the_same_command_makes_of_the_unswapped_model(place):
    outcome = builders.invoke(*command(place, "swapped", "--control", place / "base"))
    assert outcome.code == 0, outcome.err
    assert builders.invoke(*command(place, "base")).code == 0
    control, alone = weights(place / "out-control"), weights(place / "alone")
    assert all(torch.equal(control[key], alone[key]) for key in alone)
    records = [json.loads((place / name / "training.json").read_text()) for name in ("out", "out-control")]
    for key in ("data_sha256", "seed", "learning_rate", "batch_size", "steps", "rows"):
        assert records[0][key] == records[1][key]
    assert records[0]["model_sha256"] != records[1]["model_sha256"]
    assert records[0]["arms"] == records[1]["arms"]
    assert records[0]["arms"]["control"] == {"model": "base", "out": "out-control"}

    shutil.rmtree(place / "out-control")
    shutil.rmtree(place / "out-control.training" / "checkpoint-3")
    again = builders.invoke(*command(place, "swapped", "--control", place / "base", "--resume"))
    assert again.code == 0, again.err
    assert "out is finished" in again.err.replace("\n", "")
    control = weights(place / "out-control")
    assert all(torch.equal(control[key], alone[key]) for key in alone)


def test_a_control_that_would_be_no_control_is_refused_before_anything_is_trained(place):
    def told(*more):
        return builders.refused(*command(place, "swapped", "--control", *more))

    assert "is the model itself" in told(place / "swapped")
    assert "does not exist" in told(place / "none")
    (place / "out-control").mkdir()
    assert "out-control exists" in told(place / "base")
    (place / "out-control").rmdir()
    # 16 tokens per image instead of 4: answers in "blue" are too long now, those in "red" just not.
    config = json.loads((place / "base" / "processor_config.json").read_text())
    config["image_processor"]["size"] = config["image_processor"]["crop_size"] = {"height": 56, "width": 56}
    write_json(place / "base" / "processor_config.json", config)
    assert "the arms would see different data" in told(place / "base", "--max-length", 45)
    assert not (place / "out").exists()
