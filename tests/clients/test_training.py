"""Two steps of other trainers on a swapped model and exported questions, each in an environment of its own.

``make test-clients`` makes the environments (``.venv-clients/trainer-*``) and runs these tests;
``python -m tests.clients.matrix training`` writes their table of docs/clients.md.
"""

import json
import math
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from eval_mcq import export_benchmark
from mllm_adapters import load_mllm
from mllm_adapters.data.corpus import read_corpus
from mllm_adapters.data.dataset import AnswerCollator, encode, prepare_examples
from tests.clients.environments import python_of, workplace
from tests.clients.test_transformers import ROOT, swapped
from tests.eval_mcq.helpers import small_bench

TRAINERS = ("trl-1.16.0", "llamafactory-0.9.5", "ms-swift-4.6.0")
QUIET = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "USE_HF": "1"}
SHORT: Mapping[str, Any] = {"max_steps": 2, "logging_steps": 1, "report_to": "none"}
"""What a test changes in the configurations of the page, in the words of the last two."""
PAGE = ROOT / "docs" / "training_elsewhere.md"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Trained:
    """What a trainer did: the losses of its steps, and, where it tells them, token ids and labels."""

    losses: list[float]
    ids: list[list[int]]
    labels: list[list[int]]


@cache
def rows(form: str) -> Path:
    """Exported questions in a format, next to the folder of their images."""
    place = workplace("transformers") / "questions"
    place.mkdir(exist_ok=True)
    bench = small_bench(place, 4)
    export_benchmark(bench, place / f"{form}.json", form)
    return place / f"{form}.json"


def block(language: str) -> str:
    """The block of this language in docs/training_elsewhere.md; there is one of each."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    return str(found)


def ended(command: list[Any], place: Path) -> str:
    """What a program prints; it must end well."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=place, capture_output=True, text=True, env={**inherited, **QUIET}, timeout=600
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _trl(programs: Path, place: Path) -> Trained:
    worker = ROOT / "tests" / "clients" / "train_trl.py"
    questions = rows("trl")
    python = [programs / "python", "-W", "ignore"]
    said = ended([*python, worker, swapped("llava"), questions, questions.parent, place / "out"], place)
    found = json.loads(next(line for line in said.splitlines() if line.startswith("RESULT "))[7:])
    return Trained(found["losses"], found["ids"], found["labels"])


def _llamafactory(programs: Path, place: Path) -> Trained:
    questions = rows("messages")
    (place / "dataset_info.json").write_text(block("json").replace("train.json", str(questions)))
    config = (
        block("yaml").replace("llava-mgll", str(swapped("llava"))).replace("images/", str(questions.parent))
    )
    short = {**SHORT, "bf16": "false"}
    lines = [line for line in config.splitlines() if line.split(":")[0] not in short]
    (place / "train.yaml").write_text(
        "\n".join([*lines, *(f"{name}: {value}" for name, value in short.items())])
    )
    ended([programs / "llamafactory-cli", "train", place / "train.yaml"], place)
    state = json.loads(next(place.glob("*/trainer_state.json")).read_text())
    return Trained([entry["loss"] for entry in state["log_history"] if "loss" in entry], [], [])


def _swift(programs: Path, place: Path) -> Trained:
    questions = rows("messages")
    (place / "llava_vicuna.py").write_text(block("python"))
    words = block("bash").replace("\\\n", " ").split()
    named = {"llava-mgll": swapped("llava"), "train.json": questions, "bfloat16": "float32"}
    words = [str(named.get(word, word)) for word in words if not word.startswith("ROOT_IMAGE_DIR")]
    short = {**SHORT, "use_cpu": "true", "dataset_num_proc": 1, "dataloader_num_workers": 0}
    options = [part for name, value in short.items() for part in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOT_IMAGE_DIR", str(questions.parent))
        ended([programs / words[0], *words[1:], *options], place)
    lines = next(place.glob("**/logging.jsonl")).read_text().splitlines()
    return Trained([row["loss"] for row in map(json.loads, lines) if "loss" in row], [], [])


RUNS: Mapping[str, Callable[[Path, Path], Trained]] = {
    "trl": _trl,
    "llamafactory": _llamafactory,
    "ms-swift": _swift,
}


@cache
def trained(trainer: str) -> Trained:
    """Two steps of a trainer."""
    place = workplace("transformers") / f"trained-{trainer}"
    place.mkdir()
    return RUNS[trainer.rpartition("-")[0]](python_of(f"trainer-{trainer}").parent, place)


@cache
def ours() -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels of the same questions by this project's own collator."""
    _, processor = load_mllm(swapped("llava"), dtype=torch.float32)
    questions = rows("trl")
    examples, _ = prepare_examples(
        read_corpus(questions, questions.parent), processor, max_length=4096, text_only=False
    )
    batch = AnswerCollator(processor.tokenizer.pad_token_id)(
        [encode(example, questions.parent, processor) for example in examples]
    )
    return batch["input_ids"].tolist(), batch["labels"].tolist()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_takes_two_steps_on_a_swapped_model_and_exported_questions(trainer: str) -> None:
    losses = trained(trainer).losses
    assert len(losses) >= 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_trl_learns_from_the_same_tokens_as_this_project() -> None:
    found = trained(TRAINERS[0])
    assert (found.ids, found.labels) == ours()
    assert all(-1 < sum(label != -100 for label in row) < len(row) / 2 for row in found.labels)


def table() -> str:
    """The table of docs/clients.md."""
    lines = ["| client | two steps | losses | labels |", "|---|---|---|---|"]
    for trainer in TRAINERS:
        found = trained(trainer)
        same = "-"  # it does not tell
        if found.labels:
            same = "as this project's" if (found.ids, found.labels) == ours() else "**other**"
        losses = ", ".join(f"{loss:.3f}" for loss in found.losses[:2])
        lines.append(
            f"| {trainer.rpartition('-')[0]} {trainer.rpartition('-')[2]} | done | {losses} | {same} |"
        )
    return "\n".join(lines) + "\n"
