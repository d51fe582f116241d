"""Swapped folders in releases of transformers that other people have: same ids, same logits, nothing missing.

``make test-clients`` makes the environments (``.venv-clients/transformers-*``) and runs these tests;
``python -m tests.clients.matrix transformers`` writes the table of docs/clients.md.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_adapters import load_mllm, plan_swap
from tests.clients.environments import python_of, workplace
from tests.mllm_adapters import complete

ROOT = Path(__file__).parents[2]
VERSIONS = ("4.49.0", "4.57.6", "5.24.0")
CASES = ("llava-hf", "llava", "llava-med", "llava-qwen2", "paligemma", "aya-vision")
SINCE = {"aya-vision": "4.50"}
"""Architectures that a release does not have yet."""
TOLERANCE = 1e-4

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which disease?\nA. glaucoma"}]}
]
TEXT = "USER: <image> Which disease is it?</s>"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Result:
    """What a release made of a folder, held against this one."""

    missing: int
    unexpected: int
    same_ids: bool
    logits: float
    generated: bool
    pixels: float


@cache
def swapped(case: str) -> Path:
    """A host of this family, as this release saves it, with another tower."""
    place = workplace("transformers") / case
    place.mkdir()
    host = complete.BUILDERS[case](place / "host", lambda: ROOT / "tests" / "golden")
    encoder = complete.encoder(place / "encoder")
    plan_swap(host, encoder).write(place / "swapped")
    return place / "swapped"


@cache
def here(case: str) -> dict[str, Any]:
    """What this release makes of it; writes what the others get."""
    folder = swapped(case)
    model, processor = load_mllm(folder, dtype=torch.float32)
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    batch = processor(images=[Image.fromarray(image)], text=[prompt], return_tensors="pt")
    np.savez(folder.parent / "request.npz", image=image, pixels=batch["pixel_values"].numpy())
    (folder.parent / "request.json").write_text(json.dumps({"messages": MESSAGES, "text": TEXT}))
    with torch.no_grad():
        logits = model.eval()(**batch).logits[0, -1]
        generated = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, -4:]
    return {
        "text_ids": processor.tokenizer(TEXT).input_ids,
        "prompt": prompt,
        "prompt_ids": batch["input_ids"][0].tolist(),
        "logits": logits.tolist(),
        "generated": generated.tolist(),
    }


def ask(version: str, case: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the worker in the client's environment."""
    here(case)
    place = swapped(case).parent
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [python_of(f"transformers-{version}"), "-W", "ignore", str(ROOT / "tests" / "clients" / "worker.py"),
         str(folder), str(place / "request.npz"), str(place / "request.json")],
        capture_output=True, text=True, env=environment, timeout=250,
    )  # fmt: skip


def compare(version: str, case: str, folder: Path | None = None) -> Result:
    """What a release makes of a folder, against this one."""
    done = ask(version, case, folder or swapped(case))
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-1500:]
    there, ours = json.loads(lines[0].removeprefix("RESULT ")), here(case)
    return Result(
        len(there["missing"]),
        len(there["unexpected"]),
        all(there[name] == ours[name] for name in ("text_ids", "prompt", "prompt_ids")),
        max(abs(a - b) for a, b in zip(there["logits"], ours["logits"], strict=True)),
        there["generated"] == ours["generated"],
        there["pixel_difference"],
    )


def known(version: str, case: str) -> bool:
    """Whether the release has the architecture at all."""
    return tuple(map(int, version.split("."))) >= tuple(map(int, SINCE.get(case, "0").split(".")))


PAIRS = [(version, case) for version in VERSIONS for case in CASES if known(version, case)]


@pytest.mark.parametrize(("version", "case"), PAIRS)
def test_a_swapped_folder_is_the_same_model_in_other_releases(version: str, case: str) -> None:
    found = compare(version, case)
    assert (found.missing, found.unexpected) == (0, 0)
    assert found.same_ids
    assert found.logits <= TOLERANCE
    assert found.generated


def test_a_tower_under_the_names_of_release_5_would_be_random_in_release_4(tmp_path: Path) -> None:
    folder = tmp_path / "as-5-writes-it"
    folder.mkdir()
    for file in swapped("llava-hf").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for shard in folder.glob("*.safetensors"):
        renamed = {name.replace(".vision_model.", "."): value for name, value in load_file(shard).items()}
        save_file(renamed, shard, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(".vision_model.", "."))
    assert compare("5.24.0", "llava-hf", folder).missing == 0
    assert compare("4.57.6", "llava-hf", folder).missing > 0


def test_the_tokenizer_as_release_5_writes_it_is_refused_by_release_4(tmp_path: Path) -> None:
    folder = tmp_path / "as-5-writes-it"
    folder.mkdir()
    for file in swapped("llava").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "TokenizersBackend"})
    )
    done = ask("4.57.6", "llava", folder)
    assert done.returncode
    assert "TokenizersBackend" in done.stderr


def table() -> str:
    """The table of docs/clients.md."""
    rows = []
    for version, case in PAIRS:
        found = compare(version, case)
        ids = "same" if found.same_ids else "**other**"
        same = "same" if found.generated else "**other**"
        rows.append(
            f"| transformers {version} | {case} | {found.missing} / {found.unexpected} | {ids} | {found.logits:.0e} "
            f"| {same} | {found.pixels:.1g} |"
        )
    head = (
        "| client | swapped folder | tensors missing / unexpected | token ids | logits, largest difference | "
        "4 tokens generated | pixels, largest difference |\n|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"
