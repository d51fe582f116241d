"""A tower's folders (``mgll-encoder convert --to vision|clip|open-clip``) in other releases of transformers.

``make test-clients`` makes the environments (``.venv-clients/transformers-*``; open_clip is that of ``.venv``) and runs
these tests; ``python -m tests.clients.matrix towers`` writes the table of docs/clients.md.
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
from torch import Tensor
from torch.nn.functional import normalize

from mgll_encoder import convert_tower, image_transform, load_tower
from mgll_encoder.paired.read import text_tower_of
from tests.clients.environments import python_of, workplace
from tests.clients.test_transformers import ROOT, VERSIONS
from tests.mgll_encoder.test_convert import LABELS, PIXELS, SPEC, a_photograph, our_scores, trained_tower

FORMS = ("vision", "clip", "open-clip")
TOLERANCE = 1e-5

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Result:
    """What a release made of the folders, as largest differences from this project's numbers.

    Attributes:
        missing: Number of tensors that are missing or unexpected.
        tokens: Of the features of the tower alone, patch by patch.
        images: Of the projected image features of ``clip`` and ``open-clip``, of length 1.
        texts: The same of texts.
        scores: Of the probabilities of the zero-shot pipeline.
        pixels: Of the pixels that its image processor makes.
    """

    missing: int
    tokens: float
    images: dict[str, float]
    texts: dict[str, float]
    scores: float
    pixels: float


@cache
def place() -> Path:
    """The folders, and what is asked of them."""
    folder = workplace("transformers") / "towers"
    trained = trained_tower(folder / "trained")
    for form in FORMS:
        convert_tower(trained, folder / form, to=form)
    a_photograph().save(folder / "image.png")
    np.save(folder / "pixels.npy", PIXELS.numpy())
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return folder


def ask(version: str) -> dict[str, Any]:
    """Run the worker in the client's environment."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    worker = ROOT / "tests" / "clients" / "tower_worker.py"
    done = subprocess.run(
        [python_of(f"transformers-{version}"), "-W", "ignore", str(worker), str(place())],
        capture_output=True, text=True, env=environment, timeout=250,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-1500:]
    answer: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return answer


def apart(found: object, expected: Tensor) -> float:
    return float((torch.tensor(found) - expected).abs().max())


@cache
def compare(version: str) -> Result:
    there = ask(version)
    tower = load_tower(place() / "trained")
    text = text_tower_of(place() / "trained", tower)
    with torch.no_grad():
        tokens = tower.model(pixel_values=PIXELS).last_hidden_state
        images = normalize(tower.pooled(PIXELS) @ tower.projection.T, dim=1)
        texts = normalize(text.features(LABELS), dim=1)
    return Result(
        len(there["missing"]),
        apart(there["vision"], tokens),
        {form: apart(there["images"][form], images) for form in FORMS[1:]},
        {form: apart(there["texts"][form], texts) for form in FORMS[1:]},
        apart([there["scores"][label] for label in LABELS], our_scores(place() / "trained", a_photograph())),
        apart(there["pixels"][0], image_transform(SPEC)(a_photograph())),
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_tower_is_the_same_in_other_releases(version: str) -> None:
    found = compare(version)
    assert found.missing == 0
    assert found.tokens < TOLERANCE
    assert max(*found.images.values(), *found.texts.values()) < TOLERANCE
    scores = our_scores(place() / "trained", a_photograph())
    assert found.scores < 0.01 < scores.max() - scores.min()  # on pixels of its own
    assert found.pixels < 2 / 255 / 0.224


def table() -> str:
    """The table of docs/clients.md."""
    lines = [
        "| client | tensors missing / unexpected | tokens (`vision`) | image features (`clip`, `open-clip`) "
        "| text features (`clip`, `open-clip`) | probabilities of the zero-shot pipeline (`clip`) | pixels |",
        "|---|---|---|---|---|---|---|",
    ]
    for version in VERSIONS:
        found = compare(version)
        pairs = [
            ", ".join(f"{one.get(form):.0e}" for form in FORMS[1:]) for one in (found.images, found.texts)
        ]
        lines.append(
            f"| transformers {version} | {found.missing} | {found.tokens:.0e} | {pairs[0]} | {pairs[1]} "
            f"| {found.scores:.0e} | {found.pixels:.1g} |"
        )
    return "\n".join(lines) + "\n"
