"""A model is tested on its training images: refused, or noted wherever its results are shown."""

import json
import shutil

import pytest
from PIL import Image

from eval_mcq.items.schema import load_bench
from eval_mcq.records.leaks import find_leak, trainings_of_model
from mgll_encoder.common.picture_bytes import picture_digest
from mgll_encoder.common.trained_on import Training, write_trainings
from tests.eval_mcq.helpers import small_bench


@pytest.fixture
def bench(tmp_path):
    return small_bench(tmp_path / "data")


@pytest.fixture
def model(tiny_llava, bench, tmp_path):
    """A model whose tower was trained on five of the images, and its projector on three, two of them others."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llava, folder)
    seen = [picture_digest(bench.parent / f"{i}.png") for i in range(7)]
    write_trainings(
        folder,
        [
            Training.of(("tower",), "pretrain", seen[:5]),
            Training.of(("projector",), "retrain-projector", seen[4:]),
        ],
    )
    return folder


def test_a_bench_of_training_images_is_refused_in_one_line(eval_mcq, model, bench, tmp_path):
    message = eval_mcq.refuses("run", "--model", model, "--bench", bench, "--out", tmp_path / "run")
    assert (
        "7 of 10 images were seen in training: 5 by tower (pretrain), 3 by projector (retrain-projector)"
        in message
    )
    assert "--allow-leak" in message
    assert not (tmp_path / "run").exists()


def test_an_allowed_leak_is_said_wherever_the_figures_stand(eval_mcq, model, tiny_llava, bench, tmp_path):
    leaky, clean = tmp_path / "leaky", tmp_path / "clean"
    assert eval_mcq("run", "--model", model, "--bench", bench, "--out", leaky, "--allow-leak") == 0
    said = "7 of 10 images were seen in training"
    assert said in eval_mcq.err
    assert said in " ".join(eval_mcq.out.split())
    assert json.loads((leaky / "run.json").read_text())["leak"] == {
        "images": 10, "seen": 7, "by": {"tower (pretrain)": 5, "projector (retrain-projector)": 3},
    }  # fmt: skip
    assert said in json.loads((leaky / "summary.json").read_text())["arms"][0]["leak"]
    assert eval_mcq("run", "--model", tiny_llava, "--bench", bench, "--out", clean) == 0
    assert said not in eval_mcq.out + eval_mcq.err
    for layout in ("diseases", "paper"):
        arms = (f"base={clean}", f"mgll={leaky}")
        assert eval_mcq("compare", *arms, "--format", "markdown", "--table-layout", layout) == 0
        assert f"LEAK: of mgll, {said}" in eval_mcq.out
    page = tmp_path / "page.html"
    assert eval_mcq("report", f"base={clean}", f"mgll={leaky}", "--out", page) == 0
    assert f"LEAK: of mgll, {said}" in page.read_text()
    assert eval_mcq.refuses("run", "--model", model, "--bench", bench, "--out", leaky)


def test_a_copy_of_a_training_image_with_other_metadata_is_the_same_image(model, bench):
    for i in range(7):
        path = bench.parent / f"{i}.png"
        marks = Image.Exif()
        marks[0x010E] = f"copied on another day, {i}"
        Image.open(path).save(path, exif=marks)
    leak = find_leak(model, load_bench(bench))
    assert leak is not None
    assert leak.seen == 7


def test_what_the_base_of_an_adapter_saw_counts(model, bench, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    write_trainings(adapter, [Training.of(("language_model",), "finetune-lora", [])])
    assert [training.parts for training in trainings_of_model(adapter)] == [
        ("tower",), ("projector",), ("language_model",),
    ]  # fmt: skip
    assert find_leak(adapter, load_bench(bench)).seen == 7


def test_check_tells_what_a_model_was_trained_on(eval_mcq, model, bench):
    eval_mcq("check", "--model", model, "--bench", bench, "--limit", 4)
    assert "trained on: 5 images, tower (pretrain)" in eval_mcq.out
    assert "7 of 10 images were seen in training" in eval_mcq.err


def test_a_model_without_a_record_is_not_held_against_anything(tiny_llava, bench):
    assert find_leak(tiny_llava, load_bench(bench)) is None
