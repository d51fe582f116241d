"""How often one swap opens what it reads. Each limit says what the opens are for."""

import shutil
from pathlib import Path

import pytest

from mllm_adapters import plan_swap
from tests.mllm_adapters.llava_checkpoints import a_tower
from tests.opens import opens_below

ENCODER = 3
"""To read headers and values; by torch, which maps a file only by its path; to hash it whole."""

CONFIG = 2
"""To read it, and to hash what was read."""


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
