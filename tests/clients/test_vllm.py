"""Swapped folders in vLLM, and ``eval-mcq run --engine vllm`` against this project's engine: same letters.

``make test-clients`` makes the environment (``.venv-clients/vllm-*``); MGLL_VLLM_PYTHON names another one.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel

from eval_mcq import run
from eval_mcq.backends.local import LocalModel
from eval_mcq.backends.vllm_engine import PYTHON, VLLMModel
from eval_mcq.items.schema import Bench, load_bench
from eval_mcq.records.run_record import load_run
from eval_mcq.runs.merge import merge
from eval_mcq.scoring.answerer import Answerer
from eval_mcq.scoring.modes import Score
from eval_mcq.scoring.prompt import Ask
from mgll_encoder import Tower, save_tower
from mgll_encoder.common.errors import BadDataError, MismatchError, UnsupportedCheckpointError
from mgll_encoder.common.images import open_image
from mgll_encoder.tower.spec import TowerSpec
from mllm_adapters import plan_swap
from tests import builders
from tests.clients.environments import workplace
from tests.eval_mcq.helpers import DISEASES, question, write_bench
from tests.mllm_adapters import complete

ROOT = Path(__file__).parents[2]
VERSION = "0.32.0"
PYTHON_OF_VLLM = ROOT / ".venv-clients" / f"vllm-{VERSION}" / "bin" / "python"

CASES = {
    "llava-hf": "own", "llava-med": "own", "llava-qwen2": "own", "janus-pro": "llava", "internvl": "llava",
    "paligemma": "own", "aya-vision": "own",
}  # fmt: skip
"""Host -> layout of its result."""

REFUSED = {
    "paligemma": "does not load",
    "aya-vision": "computes otherwise",
}
"""Host -> why vLLM does not take its result."""

TEXT = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
"""A language model whose heads have 32 dimensions: vLLM's attention on a CPU has no smaller ones."""

TOLERANCE = 1e-4
OPTIONS = {
    "max_model_len": 512, "enforce_eager": True, "kv_cache_memory_bytes": 2**26, "distributed_executor_backend": "uni",
}  # fmt: skip
os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # tiny models: one process starts sooner than three


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Result:
    """What vLLM made of a folder, against this project's engine."""

    same: int
    questions: int
    log_probabilities: float
    pixels: float | None


def python() -> Path:
    """Where vLLM is; without it the test is skipped, or fails where it is required."""
    found = Path(os.environ.get(PYTHON) or PYTHON_OF_VLLM)
    if not found.is_file():
        if os.environ.get("MGLL_REQUIRE_CLIENTS"):
            pytest.fail("no environment with vLLM")
        pytest.skip("no environment with vLLM: make test-clients makes it")
    return found


def encoder(folder: Path) -> Path:
    """An MGLL tower whose heads have 32 dimensions: 28 px in 4 patches."""
    torch.manual_seed(5)
    config = builders.tower_config(hidden_size=128)
    spec = TowerSpec(
        width=128, depth=3, heads=4, mlp_width=64, patch_size=14, image_size=28, activation="gelu"
    )
    return save_tower(Tower.from_model(CLIPVisionModel(config), spec), folder)


@cache
def swapped(case: str) -> Path:
    """A result of swap-encoder whose language model is wide enough for vLLM."""
    place = workplace("vllm") / case
    place.mkdir()
    tower = encoder(place / "encoder")
    host = complete.BUILDERS[case](place / "host", lambda: ROOT / "tests" / "golden")
    plan_swap(host, tower, layout=CASES[case]).write(place / "narrow")
    wide = widened(place / "narrow", place / "wide")
    plan_swap(wide, tower).write(place / "swapped")
    return place / "swapped"


def widened(source: Path, folder: Path) -> Path:
    """The same architecture with another language model and weights large enough that answers differ."""
    config = AutoConfig.from_pretrained(source)
    config.text_config.update(TEXT)
    if hasattr(config, "projection_dim"):
        config.projection_dim = TEXT["hidden_size"]
        config.vision_config.projection_dim = TEXT["hidden_size"]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.08 if "embed" not in name else 0.5)
    model.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(source)
    processor.chat_template = processor.chat_template or builders.CHAT_TEMPLATE
    processor.save_pretrained(folder)
    return folder


@cache
def bench() -> Bench:
    """Questions on real photographs, several on one, with two to four options."""
    photographs = sorted((ROOT / "tests" / "data" / "fundus" / "images").iterdir())
    questions = [
        question(
            f"q{i}", str(photographs[i // 2 % len(photographs)]), question="What is seen" + " here" * (i % 3) + "?",
            options=["drusen", "a cataract", "nothing", "much"][: 2 + i % 3], answer=i % 2,
            category=DISEASES[i % 2], patient=f"p{i // 2}",
        )
        for i in range(24)
    ]  # fmt: skip
    return load_bench(
        write_bench(workplace("vllm") / "bench.jsonl", questions, categories=["AMD", "Cataract"])
    )


def scores(answerer: Answerer) -> list[Score]:
    """Every question in two rotations."""
    found = []
    for item in bench().items:
        images = [open_image(path) for path in bench().image_paths(item)]
        prepared = answerer.prepare([Ask(item, 0), Ask(item, 1)], images)
        found.append(prepared)
    return [score for of_item in answerer.answer(found) for score in of_item]


def log_probabilities(score: Score) -> np.ndarray:
    """Of the option letters, within the whole vocabulary."""
    return np.log(np.array(score.probabilities) * score.letter_mass)


@cache
def compare(case: str) -> Result:
    """Score with both."""
    theirs = VLLMModel(swapped(case), "letters", "float32", python(), OPTIONS)
    theirs.identity  # noqa: B018 - refuses
    answerer = theirs.load()
    found, expected = scores(answerer), scores(LocalModel(swapped(case), dtype="float32").load())
    answerer.process.close()
    differences = [
        np.abs(log_probabilities(a) - log_probabilities(b)).max()
        for a, b in zip(found, expected, strict=True)
    ]
    same = sum(a.choice == b.choice for a, b in zip(found, expected, strict=True))
    return Result(same, len(found), float(max(differences)), answerer.pixel_difference)


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_letters_are_those_of_this_engine(case):
    found = compare(case)
    assert found.same == found.questions
    assert found.log_probabilities < TOLERANCE
    assert found.pixels == 0


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_does_not_take_is_refused_with_the_reason(case):
    python()
    with pytest.raises(UnsupportedCheckpointError, match=REFUSED[case]):
        compare(case)


def run_(engine: str, folder: Path, **changes) -> Path:
    """The bench on the swapped LLaVA, with two rotations."""
    where = {"vllm_python": python(), "vllm_options": [f"{k}={json.dumps(v)}" for k, v in OPTIONS.items()]}
    settings = {"rotations": 2, "batch_size": 8, "precision": "float32", "engine": engine}
    run(
        swapped("llava-hf"),
        bench().path,
        folder,
        **settings,
        **(where if engine == "vllm" else {}),
        **changes,
    )
    return folder


def test_a_run_is_continued_and_merged_and_never_mixed(tmp_path):
    ours = load_run(run_("auto", tmp_path / "ours"))
    begun = run_("vllm", tmp_path / "vllm", limit=6)
    first = (begun / "answers.jsonl").read_text()
    whole = load_run(run_("vllm", begun))
    assert len(first.splitlines()) == 12
    assert (begun / "answers.jsonl").read_text().startswith(first)  # what was answered stays as it is
    assert whole.complete
    assert [row.chosen for row in whole.rows] == [row.chosen for row in ours.rows]
    assert whole.record.backend.name == "vllm"
    assert whole.record.backend.version.startswith(VERSION)

    parts = [run_("vllm", tmp_path / f"part{i}", shard=f"{i}/2") for i in range(2)]
    merged = merge(parts, tmp_path / "merged")
    assert merged.complete
    assert [row.key for row in merged.rows] == [row.key for row in whole.rows]
    assert [row.chosen for row in merged.rows] == [row.chosen for row in ours.rows]

    with pytest.raises(MismatchError, match="different"):
        run_("auto", begun)
    with pytest.raises(BadDataError, match="different"):
        merge([parts[0], run_("auto", tmp_path / "own", shard="1/2")], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def table() -> str:
    """The table of docs/clients.md."""
    rows = []
    for case in CASES:
        try:
            found = compare(case)
        except UnsupportedCheckpointError as error:
            rows.append(f"| vLLM {VERSION} | {case} | refused: {error} | | | |")
            continue
        rows.append(
            f"| vLLM {VERSION} | {case} | yes | {found.same}/{found.questions} | {found.log_probabilities:.0e} | "
            f"{found.pixels:.1g} |"
        )
    head = (
        "| client | swapped folder | loads | same letters | log-probabilities of the letters, largest difference | "
        "pixels, largest difference |\n|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"
