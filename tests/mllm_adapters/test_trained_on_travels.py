"""What weights were trained on goes with them: through the swap, every training, a delta, and back out again."""

import hashlib
import json
from pathlib import Path

import pytest

from eval_mcq.records.model_history import ModelHistory, history_of
from mgll_encoder.common.trained_on import TRAINED_ON, Training, as_numbers, trainings_of, write_trainings
from mllm_adapters.cli.lora import main as finetune_lora
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.cli.swap import main as swap_encoder
from tests.builders import invoke
from tests.mllm_adapters.retraining import color_rows, write_json
from tests.mllm_adapters.test_align import drawn_pictures, written_tower

PRETRAINED = Training.of(("tower",), "pretrain", [hashlib.sha256(b"a photograph").hexdigest()])


@pytest.fixture(scope="module")
def place(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A swap with a tower of ours, its connectors aligned, then retrained, then fine-tuned."""
    folder = tmp_path_factory.mktemp("travels")
    write_trainings(written_tower(folder / "tower"), [PRETRAINED])
    drawn_pictures(folder / "pictures", 20)
    rows = write_json(folder / "rows.json", color_rows(folder / "images"))
    data = ("--data", rows, "--images", folder / "images", "--max-steps", 1, "--workers", 0)
    commands = (
        (swap_encoder, "--mllm", tiny_llava, "--encoder", folder / "tower", "--align", folder / "pictures",
         "--out", folder / "swapped"),
        (retrain_projector, "--model", folder / "swapped", *data, "--out", folder / "retrained"),
        (finetune_lora, "--model", folder / "retrained", *data, "--merge", "--out", folder / "lora"),
    )  # fmt: skip
    for command in commands:
        done = invoke(*command)
        assert done.code == 0, done.err
    return folder


def titles(folder: Path) -> list[str]:
    return [training.title for training in trainings_of(folder)]


TOWER, ALIGNED, RETRAINED, TUNED = (
    "tower (pretrain)", "projector (swap-encoder --align)", "projector (retrain-projector)",
    "projector and language model (finetune-lora)",
)  # fmt: skip


def test_every_step_adds_its_own_images(place: Path) -> None:
    assert titles(place / "swapped") == [TOWER, ALIGNED]
    assert titles(place / "retrained") == [TOWER, ALIGNED, RETRAINED]
    for folder in ("lora", "lora-merged"):
        assert titles(place / folder) == [TOWER, ALIGNED, RETRAINED, TUNED]
    counts = [len(training.images) for training in trainings_of(place / "lora-merged")]
    assert counts == [1, 20, 2, 2], "of eight rows of two colors two pictures differ"


def test_the_loss_of_each_training_goes_along(place: Path) -> None:
    *_, retrained, tuned = trainings_of(place / "lora")
    for folder, training in (("retrained", retrained), ("lora", tuned)):
        losses = json.loads((place / folder / "training.json").read_text())["losses"]
        assert training.losses == tuple((step, pytest.approx(loss, abs=1e-6)) for step, loss in losses)


@pytest.mark.parametrize("folder", ["retrained", "lora", "lora-merged"])
def test_a_run_records_how_its_model_was_made(place: Path, folder: str) -> None:
    history = history_of(place / folder)
    assert history is not None
    assert [training.title for training in history.trainings] == titles(place / folder)
    assert [training.images for training in history.trainings][:3] == [1, 20, 2]
    assert history.alignment is not None
    fit = json.loads((place / "swapped" / "mgll_swap.json").read_text())["plan"]["alignment"]
    assert history.alignment.used == fit["used"] == 20
    assert [one.r2 for one in history.alignment.connectors] == [one["r2"] for one in fit["connectors"]]
    assert "pictures" not in history.model_dump_json()
    assert ModelHistory.model_validate_json(history.model_dump_json()) == history


def test_a_stock_model_has_no_history(tiny_llava: Path) -> None:
    assert history_of(tiny_llava) is None


def test_the_record_is_part_of_what_is_verified(place: Path) -> None:
    for folder in ("swapped", "retrained", "lora-merged"):
        done = invoke(swap_encoder, "verify", place / folder)
        assert done.code == 0, done.out + done.err


def test_it_survives_a_delta(place: Path, tiny_llava: Path, tmp_path: Path) -> None:
    done = invoke(
        swap_encoder, "extract", place / "retrained", "--mllm", tiny_llava, "--out", tmp_path / "delta"
    )
    assert done.code == 0, done.err
    assert titles(tmp_path / "delta") == [TOWER, ALIGNED, RETRAINED]
    whole = ("compose", "--mllm", tiny_llava, "--delta", tmp_path / "delta", "--out", tmp_path / "whole")
    assert invoke(swap_encoder, *whole).code == 0
    assert (tmp_path / "whole" / TRAINED_ON).read_text() == (place / "retrained" / TRAINED_ON).read_text()


def test_another_tower_takes_its_own_record_along(place: Path, tmp_path: Path) -> None:
    tower = written_tower(tmp_path / "other")
    swap = ("--mllm", place / "lora-merged", "--encoder", tower, "--out", tmp_path / "again")
    assert invoke(swap_encoder, *swap).code == 0
    assert titles(tmp_path / "again") == [ALIGNED, RETRAINED, TUNED]


def test_undone_the_tower_leaves_with_its_record(place: Path, tiny_llava: Path, tmp_path: Path) -> None:
    for folder, left in {"swapped": [], "lora-merged": [TUNED]}.items():
        original = ("restore", place / folder, "--mllm", tiny_llava, "--out", tmp_path / folder)
        assert invoke(swap_encoder, *original).code == 0
        assert titles(tmp_path / folder) == left
    encoder = ("restore", place / "swapped", "--to-encoder", "--out", tmp_path / "encoder")
    done = invoke(swap_encoder, *encoder)
    assert done.code == 0, done.err
    assert titles(tmp_path / "encoder") == [TOWER]


def test_nothing_but_bits_of_hashes_is_kept(place: Path) -> None:
    text = (place / "lora-merged" / TRAINED_ON).read_text()
    assert "png" not in text
    assert str(place) not in text
    (training,) = (found for found in trainings_of(place / "lora-merged") if found.title == TOWER)
    assert list(training.images) == list(as_numbers([hashlib.sha256(b"a photograph").hexdigest()]))
