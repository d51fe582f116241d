"""A real server: llama.cpp answers an exported model's questions as this project's engine answers the model's.

``make test-clients`` makes the environment (``.venv-clients/llama-cpp``) and runs these tests;
``python -m tests.clients.matrix endpoint`` writes the table of docs/clients.md and the example of docs/evaluation.md.
"""

import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, SiglipVisionModel

from eval_mcq import Endpoint, compare, report, run
from eval_mcq.items.schema import load_bench
from eval_mcq.records.answer import Answer
from eval_mcq.records.run_record import Run
from mgll_encoder.common.errors import EndpointError
from mgll_encoder.common.images import open_image
from mllm_adapters import export_gguf, plan_swap
from tests.clients.environments import python_of, workplace
from tests.clients.test_llama_cpp import ROOT, VERSION
from tests.eval_mcq.helpers import question, scorer, write_bench
from tests.eval_mcq.stock_models import STOCK
from tests.small_llava import SIDE, small_llava, tower_config

PHOTOGRAPHS = ROOT / "tests" / "data" / "fundus" / "images"
NAME = "org/small"
KEY = "sk-of-the-tests-0123456789"
TOLERANCE = 0.02
ROTATIONS = 2
OPTIONS = ["diabetic retinopathy", "diabetic macular edema", "glaucoma", "cataract"]

pytestmark = pytest.mark.slow


@contextmanager
def llama_cpp(folder: Path) -> Iterator[Endpoint]:
    """llama.cpp's server for an exported folder, which asks for the key that is in the environment meanwhile."""
    worker = ROOT / "tests" / "clients" / "llama_cpp_server.py"
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(
            [python_of("llama-cpp"), str(worker), str(folder), NAME], env={**os.environ, "SERVER_KEY": KEY},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ) as process,
    ):  # fmt: skip
        patch.setenv("OPENAI_API_KEY", KEY)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            url = next(line.split()[1] for line in process.stdout if line.startswith("URL "))
            yield Endpoint(url, concurrency=2)
        finally:
            process.stdin.close()


@cache
def bench() -> Path:
    """Questions on the 24 photographs, resized to a square, as the model's processor does to oblong ones.

    llama.cpp would pad them instead.
    """
    folder = workplace("llama-cpp") / "bench"
    folder.mkdir()
    questions = []
    for number, file in enumerate(sorted(PHOTOGRAPHS.iterdir())):
        Image.open(file).convert("RGB").resize((SIDE, SIDE)).save(folder / f"{number}.png")
        words = "Which finding does this photograph show" + ", if any" * (number % 3) + "?"
        shown = OPTIONS[number % 4 :] + OPTIONS[: number % 4]
        questions.append(
            question(
                f"q{number}", f"{number}.png", question=words, options=shown, patient=f"p{number}",
                answer=shown.index(OPTIONS[number % 2]), category=("DR", "DME")[number % 2],
            )
        )  # fmt: skip
    return write_bench(folder / "bench.jsonl", questions, categories=["DR", "DME"])


def end_of_questions(folder: Path) -> torch.Tensor:
    """What the output head gets where a question ends, on average."""
    loaded, scored = load_bench(bench()), scorer(folder)
    seen: list[torch.Tensor] = []
    hook = scored.model.get_output_embeddings().register_forward_pre_hook(
        lambda _, given: seen.append(given[0][0, -1])
    )
    for item in loaded.items:
        scored.score([item], [[open_image(path) for path in loaded.image_paths(item)]])
    hook.remove()
    return torch.stack(seen).mean(dim=0)


def answering(folder: Path, *likewise: Path) -> None:
    """Let random models answer with letters, each as often, by the letters' rows of their output head."""
    ends = torch.stack([end_of_questions(one) for one in (folder, *likewise)])
    weights = load_file(folder / "model.safetensors")
    (head,) = (name for name in weights if name.endswith("lm_head.weight"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for letter in tokenizer.convert_tokens_to_ids(["A", "B", "C", "D"]):
        weights[head][letter] += torch.linalg.pinv(ends) @ (12 - ends @ weights[head][letter])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@cache
def models() -> tuple[Path, Path, Path]:
    """A LLaVA, the same with another SigLIP, and that exported for llama.cpp."""
    place = workplace("llama-cpp") / "models"
    base = small_llava(place / "base")
    torch.manual_seed(1)
    SiglipVisionModel(tower_config("siglip", "gelu")).save_pretrained(place / "tower")
    answering(base, plan_swap(base, place / "tower").write(place / "first"))
    swapped = plan_swap(base, place / "tower").write(place / "swapped")
    return base, swapped, export_gguf(swapped, place / "gguf", precision="float32")


@cache
def arms() -> dict[str, Run]:
    """The base, the swapped model, a stock model, and the swapped model behind llama.cpp's server."""
    place = workplace("llama-cpp")
    base, swapped, gguf = models()
    folders = {"base": base, "swapped": swapped, "Gemma 3": STOCK["gemma3"](place / "gemma3")}
    found = {
        name: run(folder, bench(), place / "runs" / name, rotations=ROTATIONS)
        for name, folder in folders.items()
    }
    with llama_cpp(gguf) as server:
        served = run(NAME, bench(), place / "runs" / "served", endpoint=server, rotations=ROTATIONS)
    return {**found, "llama.cpp": served}


def off(one: Sequence[Answer], other: Sequence[Answer]) -> float:
    """The largest difference of a letter's log-probability, within the whole vocabulary."""
    return max(
        abs(math.log(p * a.letter_mass) - math.log(q * b.letter_mass))
        for a, b in zip(one, other, strict=True)
        for p, q in zip(a.probabilities, b.probabilities, strict=True)
    )


def test_llama_cpp_gives_the_probabilities_that_this_project_gives() -> None:
    served, ours = arms()["llama.cpp"], arms()["swapped"].rows
    assert served.record.mode == "letters"
    assert served.record.backend.sent["server_says"]["owned_by"] == "llamacpp"
    assert off(served.rows, ours) < TOLERANCE
    other = [*ours[ROTATIONS:], *ours[:ROTATIONS]]
    assert off(served.rows, other) > 5 * TOLERANCE  # another picture's answers
    assert [row.chosen for row in served.rows] == [row.chosen for row in ours]


def test_a_stopped_run_is_continued_and_the_key_is_in_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with llama_cpp(models()[2]) as server:

        def ask(**settings: int) -> Run:
            return run(
                NAME,
                bench(),
                tmp_path / "served",
                endpoint=server,
                rotations=ROTATIONS,
                batch_size=4,
                **settings,
            )

        first = ask(limit=4).rows
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        with pytest.raises(EndpointError, match="401"):
            ask()
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        done = ask()
    assert done.complete
    assert len(first) == 4 * ROTATIONS
    assert [row for row in done.rows if row in first] == first
    assert off(done.rows, arms()["swapped"].rows) < TOLERANCE
    written = b"".join(path.read_bytes() for path in (tmp_path / "served").iterdir()).decode()
    assert KEY not in written
    assert "sk-wrong" not in written


def test_reference_rows_are_paired_with_the_swapped_model_and_its_base(tmp_path: Path) -> None:
    rows = arms()
    for one in rows.values():
        assert [answer.id for answer in one.answers] == [answer.id for answer in rows["base"].answers]
    text = compare(rows).to_markdown()
    assert "Gains: swapped, Gemma 3, llama.cpp against base, on the same questions" in text
    assert "llama.cpp against swapped: Average 0.0 " in text
    assert "llama.cpp by endpoint chat-completions-1" in text
    page = tmp_path / "report.html"
    report(rows, page, thumbnails=False)
    shown = page.read_text()
    assert all(name in shown for name in rows)


def table() -> str:
    """The table of docs/clients.md."""
    served, ours = arms()["llama.cpp"].rows, arms()["swapped"].rows
    same = sum(a.chosen == b.chosen for a, b in zip(served, ours, strict=True))
    return (
        "| client | model | same letters | log-probabilities of the letters, largest difference |\n|---|---|---|---|\n"
        f"| llama.cpp's server (xllamacpp {VERSION}) | SigLIP on LLaMA, float32 | {same}/{len(ours)} "
        f"| {off(served, ours):.1g} |\n"
    )


def example() -> str:
    """The example of docs/evaluation.md."""
    return compare(arms()).to_markdown()
