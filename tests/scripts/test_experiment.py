"""A researcher shows the claim on photographs: towers from a general one, a model that looks, arms, intervals."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from mgll_encoder.data.phantom.dataset import write_phantom
from mgll_encoder.tower.preprocess import image_processor
from mgll_encoder.tower.spec import IMAGENET_MEAN, IMAGENET_STD, PixelRule

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("experiment_figures")


def sample(figures: ModuleType, right: np.ndarray, weights: np.ndarray) -> object:
    """A share of right answers per seed, [seeds, questions] of 0 and 1."""
    rows = np.concatenate([np.ones((1, right.shape[1])), weights])
    table = 100 * (right @ rows.T) / rows.sum(axis=1)
    return figures.Sample(table[:, 0], table[:, 1:])


def test_a_gain_is_paired_by_question_patient_and_seed(figures: ModuleType) -> None:
    draw = np.random.default_rng(0)
    weights = figures.weights_of([f"patient {i}" for i in range(200)])
    base = (draw.random((3, 200)) < [[0.3], [0.5], [0.7]]).astype(float)
    better = base.copy()
    better[:, :20] = 1
    one, other = sample(figures, base, weights), sample(figures, better, weights)
    gain = other.minus(one).figure
    assert gain.value == pytest.approx(100 * (better - base).mean())
    assert 0 < gain.low < gain.value < gain.high
    assert gain.high - gain.low < one.figure.high - one.figure.low, (
        "seeds that differ do not widen a paired gain"
    )
    nothing = one.minus(one).figure
    assert (nothing.low, nothing.value, nothing.high) == (0, 0, 0)


def test_few_patients_with_many_questions_have_a_wider_interval(figures: ModuleType) -> None:
    right = np.repeat(np.arange(20) % 2, 10)[None].astype(float)
    each = sample(figures, right, figures.weights_of([str(i) for i in range(200)])).figure
    clustered = sample(figures, right, figures.weights_of([str(i // 10) for i in range(200)])).figure
    assert each.value == clustered.value == 50
    assert clustered.high - clustered.low > 2.5 * (each.high - each.low)  # √10 times


def test_seeds_that_differ_widen_the_interval_of_their_mean(figures: ModuleType) -> None:
    weights = figures.weights_of([str(i) for i in range(400)])
    alike = (np.arange(400) % 2)[None].repeat(4, axis=0).astype(float)
    apart = np.stack([(np.arange(400) % 10 < of_seed).astype(float) for of_seed in (1, 3, 7, 9)])
    narrow, wide = sample(figures, alike, weights).figure, sample(figures, apart, weights).figure
    assert narrow.value == wide.value == 50
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_what_alignment_keeps_is_a_ratio_above_chance(figures: ModuleType) -> None:
    weights = figures.weights_of([str(i) for i in range(400)])
    base = (np.arange(400) % 4 < 3)[None].astype(float)
    aligned = (np.arange(400) % 2 < 1)[None].astype(float)
    kept = sample(figures, aligned, weights).less(25).share_of(sample(figures, base, weights).less(25))
    assert kept.value == pytest.approx(50)
    assert kept.low < 50 < kept.high


def general(folder: Path) -> Path:
    """A tiny DINOv2 with random weights, as general_tower.py writes the real one."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=42, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    image_processor(PixelRule(image_size=42, mean=IMAGENET_MEAN, std=IMAGENET_STD)).save_pretrained(folder)
    return folder


def photographs(folder: Path) -> Path:
    """Phantom photographs with the columns of the real ones, from two places."""
    write_phantom(folder, 60, 32, 0, False)
    with (folder / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for place, row in enumerate(rows):
        row["patient_or_source_id"], row["dataset"] = f"p{place}", f"hospital {place % 2 + 1}"
    with (folder / "manifest.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def experiment(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, SCRIPTS / "experiment.py", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_command_goes_from_the_general_tower_to_the_tables_and_does_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = (
        "--data", photographs(tmp_path / "data"), "--general", general(tmp_path / "general"), "--out", out,
        "--lm", "quick", "--seeds", 1, "--image-size", 28, "--preset", "fundus10",
    )  # fmt: skip
    towers = experiment(*settings, "--towers-only")
    assert towers.returncode == 0, towers.stderr
    assert not (out / "models").exists()
    done = experiment(*settings)
    assert done.returncode == 0, done.stderr
    figures = json.loads((out / "figures.json").read_text())
    of_tower = figures["towers"]["all sources"]["probe AUC"]
    assert set(of_tower) == {"general", "clip", "mgll", "mgll over general", "mgll over clip"}
    assert set(figures["looks"][0]["average"]) == {"real", "blank", "shuffled"}
    answers = figures["answers"]["all"]
    assert set(answers["arms"]) == {path.name.removesuffix("-0") for path in (out / "models").iterdir()} - {
        path.name.removesuffix("-0") for path in (out / "models").glob("*.training")
    }
    for gain in answers["gains"].values():
        assert gain["low"] <= gain["value"] <= gain["high"]
    table = (out / "tables.md").read_text()
    for word in (
        "Towers, all sources",
        "MGLL-tuned over CLIP-tuned",
        "Does the base look?",
        "+ MGLL over + CLIP",
    ):
        assert word in table
    again = experiment(*settings)
    assert again.returncode == 0, again.stderr
    assert "$ " not in again.stdout, "no command is run again"
    assert (out / "tables.md").read_text() == table


def test_an_unknown_language_model_is_named(tmp_path: Path) -> None:
    refused = experiment(
        "--data", tmp_path, "--general", tmp_path, "--out", tmp_path / "out", "--lm", "smolm2"
    )
    assert refused.returncode == 2
    assert "did you mean 'smollm2'" in refused.stderr


def test_models_need_the_towers_of_their_seed(tmp_path: Path) -> None:
    refused = experiment(
        "--data", tmp_path, "--general", tmp_path, "--out", tmp_path / "out", "--seeds", 1, "--model-seeds", 2
    )  # fmt: skip
    assert refused.returncode == 2
    assert "--model-seeds is 2: expected at most --seeds, 1" in refused.stderr
    assert not (tmp_path / "out").exists()
