"""What a user does, for every family: swap, load, retrain (resumed, too), ask, and swap again."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from eval_mcq.cli.main import main as eval_mcq
from mllm_adapters.cli.retrain import main as retrain_projector
from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.core.family_table import FAMILIES
from tests import builders
from tests.eval_mcq.helpers import small_bench
from tests.mllm_adapters import complete
from tests.mllm_adapters.retraining import turns, write_json

QUICK = ("instructblip", "med-flamingo", "qwen2_5-vl", "janus-pro")
"""Rows of the default run: a Q-Former, cross-attention, a merger, and a tower beside a generator."""

UNABLE: Mapping[str, str] = {"instructblip-t5": "the prompt with an encoder"}
"""Rows that swap and load, and that neither training nor letter scoring can take -> what they are told."""

ROWS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in complete.BUILDERS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tower, conversations about four pictures (and one about none), three questions."""
    folder = tmp_path_factory.mktemp("place")
    for i in range(4):
        builders.picture(folder / "images", f"{i}.png", (60 * i, 250 - 60 * i, 90), size=30 + 9 * i)
    asked = turns("<image>\nWhich?", "Glaucoma", "Sure?", "yes")
    rows = [{"id": i, "image": f"{i}.png", "conversations": asked[: 2 + 2 * (i % 2)]} for i in range(4)]
    rows.append({"id": 4, "conversations": turns("Hello", "hi")})
    return SimpleNamespace(
        encoder=complete.encoder(folder / "mgll"),
        data=write_json(folder / "train.json", rows),
        images=folder / "images",
        bench=small_bench(folder / "bench", 3),
    )


def done(main: Callable[[], None], *arguments: object) -> str:
    outcome = builders.invoke(main, *arguments)
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    return outcome.out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def retrain(place: SimpleNamespace, model: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        retrain_projector, "--model", model, "--out", out, "--data", place.data, "--images", place.images,
        "--max-steps", 2, "--batch-size", 2, "--save-steps", 1, "--workers", 0, "--report-to", "none", *more,
    )  # fmt: skip


def swap(place: SimpleNamespace, model: Path, out: Path, *more: object) -> tuple[object, ...]:
    return swap_encoder, "--mllm", model, "--encoder", place.encoder, "--out", out, *more


@pytest.mark.parametrize("name", ROWS)
def test_from_a_checkpoint_to_answers_and_on(
    name: str, place: SimpleNamespace, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = complete.BUILDERS[name](tmp_path / "host", lambda: request.getfixturevalue("golden"))
    swapped, aligned = tmp_path / "s", tmp_path / "a"
    assert "tokens" in done(*swap(place, source, swapped, "--dry-run"))
    assert not swapped.exists()
    done(*swap(place, source, swapped))
    _, report = AutoModelForImageTextToText.from_pretrained(swapped, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoProcessor.from_pretrained(swapped).chat_template
    if name in UNABLE:
        for refused in (retrain(place, swapped, aligned), ask(place, swapped, tmp_path / "run")):
            assert UNABLE[name] in builders.refused(*refused)
            assert not aligned.exists()
        return

    shown = done(*retrain(place, swapped, aligned, "--gradient-checkpointing"))
    assert "Rows: 4 of 5 (left out: 1 without image" in shown
    before, after = weights(swapped), weights(aligned)
    assert before.keys() == after.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    trained = json.loads((aligned / "training.json").read_text())["trained"]
    assert changed
    assert set(changed) <= set(trained) < set(before)
    assert names(swapped) <= names(aligned), "nothing of the checkpoint is lost"

    aligned.rename(tmp_path / "uninterrupted")
    shutil.rmtree(tmp_path / "a.training" / "checkpoint-2")
    done(*retrain(place, swapped, aligned, "--gradient-checkpointing", "--resume"))
    for key, value in weights(aligned).items():
        assert torch.equal(value, after[key]), f"{key} after an interruption"

    assert "3" in done(*ask(place, aligned, tmp_path / "run"))
    done(*swap(place, aligned, tmp_path / "again"))


def ask(place: SimpleNamespace, model: Path, out: Path) -> tuple[object, ...]:
    return eval_mcq, "run", "--model", model, "--bench", place.bench, "--out", out, "--batch-size", 2


def test_every_family_has_a_row() -> None:
    assert set(FAMILIES) <= set(complete.BUILDERS)
