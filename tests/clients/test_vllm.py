"""Swapped folders in vLLM, and ``eval-mcq run --engine vllm`` against this project's engine: same letters.

``make test-clients`` makes the environment (``.venv-clients/vllm-*``); MGLL_VLLM_PYTHON names another one.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel

from eval_mcq import run
from eval_mcq.backends.local import LocalModel
from eval_mcq.backends.vllm_engine import PYTHON, VLLMModel
from eval_mcq.backends.vllm_process import VLLMProcess
from eval_mcq.items.schema import Bench, load_bench
from eval_mcq.records.run_record import load_run
from eval_mcq.runs.merge import merge
from eval_mcq.runs.run import answered
from eval_mcq.scoring.answerer import Answerer
from eval_mcq.scoring.modes import Score
from eval_mcq.scoring.prompt import Ask
from mgll_encoder import Tower, save_tower
from mgll_encoder.common.errors import (
    BadDataError,
    MismatchError,
    TrainingError,
    UnsupportedCheckpointError,
)
from mgll_encoder.common.images import open_image
from mgll_encoder.tower.spec import TowerSpec
from mllm_adapters import plan_swap
from tests import builders
from tests.clients.environments import workplace
from tests.eval_mcq.helpers import DISEASES, question, write_bench
from tests.mgll_encoder.test_encoders import saved
from tests.mllm_adapters import complete
from tests.small_llava import SIDE, small_llava

ROOT = Path(__file__).parents[2]
VERSION = "0.32.0"
PYTHON_OF_VLLM = ROOT / ".venv-clients" / f"vllm-{VERSION}" / "bin" / "python"

Build = Callable[[Path], Path]


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


def widened(source: Path, folder: Path, words: Sequence[str]) -> Path:
    """The same architecture with another language model and weights large enough that answers differ."""
    config, processor = AutoConfig.from_pretrained(source), AutoProcessor.from_pretrained(source)
    rows = config.text_config.vocab_size + processor.tokenizer.add_tokens([*words])
    config.text_config.update({**TEXT, "vocab_size": rows})
    if hasattr(config, "projection_dim"):
        config.projection_dim = TEXT["hidden_size"]
        config.vision_config.projection_dim = TEXT["hidden_size"]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.08 if "embed" not in name else 0.5)
    model.save_pretrained(folder)
    processor.chat_template = processor.chat_template or builders.CHAT_TEMPLATE
    processor.save_pretrained(folder)
    return folder


def swapped(family: str, layout: str = "own", words: Sequence[str] = ()) -> Build:
    """A host of a family with another tower, whose language model is wide enough for vLLM.

    Args:
        family: The family.
        layout: The layout of the result.
        words: Added to the vocabulary.
    """

    def build(folder: Path) -> Path:
        tower = encoder(folder / "encoder")
        host = complete.BUILDERS[family](folder / "host", lambda: ROOT / "tests" / "golden")
        plan_swap(host, tower, layout=layout).write(folder / "narrow")
        wide = widened(folder / "narrow", folder / "wide", words)
        plan_swap(wide, tower).write(folder / "swapped")
        return folder / "swapped"

    return build


def siglip_on_qwen3(folder: Path) -> Path:
    """A LLaVA of SigLIP and Qwen3 with another SigLIP."""
    host = small_llava(folder / "host", language="qwen3", **TEXT)
    saved("siglip", folder / "encoder", SIDE)
    plan_swap(host, folder / "encoder").write(folder / "swapped")
    return folder / "swapped"


MODELS: Mapping[str, Build] = {
    "llava-hf": swapped("llava-hf"),
    "llava-med": swapped("llava-med"),
    "llava-qwen2": swapped("llava-qwen2"),
    "janus-pro (`--layout llava`)": swapped("janus-pro", "llava"),
    "internvl (`--layout llava`)": swapped("internvl", "llava"),
    "llava-hf, SigLIP on Qwen3": siglip_on_qwen3,
    "aya-vision": swapped("aya-vision"),
    "paligemma": swapped("paligemma", words=["\n"]),  # vLLM looks it up, and Google's vocabulary has it
}

REFUSED = {
    "aya-vision": pytest.raises(AssertionError),
    "paligemma": pytest.raises(UnsupportedCheckpointError, match=r"does not load .*class_embedding"),
}
"""Those that `eval_mcq.backends.vllm_models` keeps from vLLM, and what would become of them."""


@cache
def model(name: str) -> Path:
    place = workplace("vllm") / f"model-{[*MODELS].index(name)}"
    place.mkdir()
    return MODELS[name](place)


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


def vllm_model(name: str, **options) -> VLLMModel:
    return VLLMModel(model(name), "letters", "float32", python(), {**OPTIONS, **options})


@cache
def expected(name: str) -> list[Score]:
    """Scores of this project's engine."""
    return scores(LocalModel(model(name), dtype="float32").load())


def compare(name: str, **options) -> Result:
    """Score with both, whether or not the model is refused."""
    answerer = vllm_model(name, **options).load()
    found = scores(answerer)
    answerer.process.close()
    pairs = list(zip(found, expected(name), strict=True))
    differences = [np.abs(log_probabilities(a) - log_probabilities(b)).max() for a, b in pairs]
    same = sum(a.choice == b.choice for a, b in pairs)
    return Result(same, len(pairs), float(max(differences)), answerer.pixel_difference)


measured = cache(compare)
"""For the tests and the table."""


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_letters_are_those_of_this_engine(name):
    vllm_model(name).identity  # noqa: B018 - it is not refused
    found = measured(name)
    assert found.same == found.questions
    assert found.log_probabilities < TOLERANCE
    assert found.pixels == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_would_not_load_or_be_computed_otherwise(name):
    with pytest.raises(UnsupportedCheckpointError, match="leave `engine` out"):
        vllm_model(name).identity  # noqa: B018 - refuses
    with REFUSED[name]:
        assert measured(name).log_probabilities < TOLERANCE


def test_one_model_over_two_ranks_has_the_same_letters(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or else each rank needs a NUMA node
    found = compare("llava-hf", tensor_parallel_size=2, distributed_executor_backend="mp")
    assert found.same == found.questions
    assert found.log_probabilities < TOLERANCE


Files = tuple[Path, Path]


def files() -> Files:
    """The swapped LLaVA and the bench."""
    return model("llava-hf"), bench().path


def run_(engine: str, folder: Path, on: Files, **changes) -> Path:
    """A bench with two rotations."""
    where = {"vllm_python": python(), "vllm_options": [f"{k}={json.dumps(v)}" for k, v in OPTIONS.items()]}
    settings = {"rotations": 2, "batch_size": 8, "precision": "float32", "engine": engine}
    run(*on, folder, **settings, **(where if engine == "vllm" else {}), **changes)
    return folder


@contextmanager
def killing(folder: Path, victim: Callable[[int], int]) -> Iterator[None]:
    """Kill a process as soon as there are answers, before the next ones; the victim is told the pid of vLLM's."""
    score = VLLMProcess.score

    def scored(self, images, rows):
        if answered(folder):
            (folder.parent / "pid").write_text(str(self._process.pid))
            os.kill(victim(self._process.pid), signal.SIGKILL)
        return score(self, images, rows)

    with mock.patch.object(VLLMProcess, "score", scored):
        yield


def run_until_killed(folder: Path, on: Files) -> None:
    """In a process of its own."""
    with killing(folder, lambda _: os.getpid()):
        run_("vllm", folder, on)


def wait_for_the_end(pid: int) -> None:
    for _ in range(600):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("vLLM's process is still there a minute after the run was killed")


def test_a_run_that_is_killed_goes_on_and_parts_are_merged_and_nothing_is_mixed(tmp_path):
    on = files()
    ours = load_run(run_("auto", tmp_path / "ours", on))
    begun = tmp_path / "vllm"
    killed = get_context("spawn").Process(target=run_until_killed, args=(begun, on))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    wait_for_the_end(int((tmp_path / "pid").read_text()))
    first = (begun / "answers.jsonl").read_text()
    assert 0 < len(first.splitlines()) < len(ours.rows)
    whole = load_run(run_("vllm", begun, on))
    assert (begun / "answers.jsonl").read_text().startswith(first)  # what was answered stays as it is
    assert whole.complete
    assert whole.record.backend.name == "vllm"
    assert whole.record.backend.version.startswith(VERSION)

    parts = [tmp_path / "part0", tmp_path / "part1"]
    with (
        killing(parts[0], lambda vllm: vllm),
        pytest.raises(TrainingError, match=r"vLLM stopped: its process ended.*goes on"),
    ):
        run_("vllm", parts[0], on, shard="0/2")
    assert 0 < answered(parts[0]) < len(ours.rows) / 2
    for number, part in enumerate(parts):
        run_("vllm", part, on, shard=f"{number}/2")
    merged = merge(parts, tmp_path / "merged")
    assert merged.complete
    for found in (whole, merged):
        assert [(row.key, row.chosen) for row in found.rows] == [(row.key, row.chosen) for row in ours.rows]
        for row, ours_ in zip(found.rows, ours.rows, strict=True):
            assert row.probabilities == pytest.approx(ours_.probabilities, abs=TOLERANCE)

    with pytest.raises(MismatchError, match="different"):
        run_("auto", begun, on)
    with pytest.raises(BadDataError, match="different"):
        merge([parts[0], run_("auto", tmp_path / "own", on, shard="1/2")], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def table() -> str:
    """The table of docs/clients.md."""
    return HEAD + "".join(f"| vLLM {VERSION} | {name} | {_cells(name)} |\n" for name in MODELS)


HEAD = (
    "| client | swapped folder | `--engine vllm` | same letters | log-probabilities of the letters, largest "
    "difference | pixels, largest difference |\n|---|---|---|---|---|---|\n"
)


def _cells(name: str) -> str:
    taken = "refused" if name in REFUSED else "yes"
    try:
        found = measured(name)
    except UnsupportedCheckpointError:
        return f"{taken}: vLLM does not load it | | | "
    letters = f"{found.same}/{found.questions}"
    return f"{taken} | {letters} | {found.log_probabilities:.2g} | {found.pixels:.1g}"
