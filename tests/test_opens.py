"""How often a swap, a retraining and an evaluation open their inputs. Each limit is explained."""

import shutil
from pathlib import Path

import pytest

from eval_mcq import build_benchmark, run
from mllm_adapters import plan_swap, retrain_projector
from tests.eval_mcq.helpers import write_labels
from tests.mllm_adapters.llava_checkpoints import a_tower
from tests.mllm_adapters.retraining import color_rows, write_json
from tests.opens import opens_below

ENCODER = 3
"""To read headers and values; by torch, which maps a file only by its path; to hash it whole."""

CONFIG = 2
"""To read it, and to hash what was read."""

TRAINED_CONFIG = 4
"""To read it; once more for its bytes, which are hashed (an interrupted run is known again by them) and copied; and
twice by transformers, which reads it for the tokenizer and the image processor, whatever it is given."""

PICTURE = 2
"""To decode and hash it before the model is loaded, so that a damaged one costs nothing; and, as not all fit into
memory, again to be scored."""

LOOKED_AT = 8
"""The first questions are also put with blank pictures before anything is answered: theirs are opened once more."""


def test_opens_are_counted_by_file(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1")
    with opens_below(tmp_path) as opens:
        for name in ("one", "one", "two"):
            (tmp_path / name).open("a").close()
    (tmp_path / "one").read_text()
    assert opens == {"one": 2, "two": 1}


@pytest.fixture
def original(golden: Path, tmp_path: Path) -> Path:
    """An original LLaVA in two shards of torch.save, with the CLIP that it names."""
    return shutil.copytree(golden / "llava", tmp_path / "llava")


def test_a_swap_opens_a_training_checkpoint_three_times(original: Path, golden: Path, tmp_path: Path) -> None:
    encoder = shutil.copy(golden / "mgll_official" / "checkpoint_best.pth", tmp_path / "best.pth")
    with opens_below(tmp_path) as opens:
        plan_swap(original, encoder).write(tmp_path / "out")
    assert 0 < opens["best.pth"] <= ENCODER, opens
    assert 0 < opens["llava/checkpoint/config.json"] <= CONFIG, opens


def test_a_swap_opens_the_weights_of_a_tower_folder_twice(tiny_llava: Path, tmp_path: Path) -> None:
    model, tower = shutil.copytree(tiny_llava, tmp_path / "llava"), a_tower(tmp_path / "tower")
    with opens_below(tmp_path) as opens:
        plan_swap(model, tower).write(tmp_path / "out")
    assert 0 < opens["tower/model.safetensors"] <= ENCODER, opens
    assert 0 < opens["llava/config.json"] <= CONFIG, opens


def test_loading_a_swap_in_memory_opens_no_more(tiny_llava: Path, tmp_path: Path) -> None:
    model, tower = shutil.copytree(tiny_llava, tmp_path / "llava"), a_tower(tmp_path / "tower")
    with opens_below(tmp_path / "tower") as opens:
        plan_swap(model, tower).load()
    assert opens["model.safetensors"] == 1, opens


def test_a_retraining_reads_config_json_once(tiny_llava: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llava, tmp_path / "llava")
    data = write_json(tmp_path / "train.json", color_rows(tmp_path / "images"))
    settings = {"max_steps": 1, "batch_size": 2, "report_to": [], "workers": 0}
    with opens_below(tmp_path) as opens:
        retrain_projector(model, data, tmp_path / "images", **settings)
    assert 0 < opens["llava/config.json"] <= TRAINED_CONFIG, opens


def test_an_evaluation_opens_a_picture_to_check_it_and_to_score_it(tiny_llava: Path, tmp_path: Path) -> None:
    names = ("AMD", "Cataract", "DR", "Glaucoma")
    rows = [{"file": f"{d}{i}.png", "labels": d, "patient": f"{d}{i}"} for d in names for i in range(4)]
    labels, bench = write_labels(tmp_path, rows), tmp_path / "bench.jsonl"
    build_benchmark(labels, tmp_path / "photos", bench, diseases=list(names), patient_column="patient")
    with opens_below(tmp_path / "photos") as opens:
        run(tiny_llava, bench, tmp_path / "run")
    assert len(opens) == len(rows)
    more = {name: number for name, number in opens.items() if number > PICTURE}
    assert len(more) <= LOOKED_AT, opens
    assert set(more.values()) <= {PICTURE + 1}, opens
