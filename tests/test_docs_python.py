"""The examples of docs/python.md run unchanged, in order, in a folder with the files that they name."""

import json
import logging
import re
from pathlib import Path

import pytest

from mgll_encoder.common.progress import show_with
from mgll_encoder.data.phantom.dataset import write_phantom
from tests import builders
from tests.environments import ROOT
from tests.mllm_adapters.llava_checkpoints import a_tower

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user: a LLaVA, an MGLL tower, and conversations about the images that the page draws."""
    write_phantom(tmp_path / "before", 4)
    builders.tiny_llava(tmp_path / "llava", merged=["th"])  # GGUF has no tokenizer without merges
    a_tower(tmp_path / "mgll-fundus")
    images = sorted((tmp_path / "before" / "images").iterdir())[:4]
    rows = [
        {
            "id": image.stem,
            "image": f"images/{image.name}",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "an eye"},
            ],
        }
        for image in images
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_page_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # pytest has handlers of its own
    blocks = BLOCK.findall((ROOT / "docs" / "python.md").read_text())
    assert len(blocks) == 5
    names: dict[str, object] = {}
    try:
        for number, block in enumerate(blocks, 1):
            exec(compile(block, f"docs/python.md, example {number}", "exec"), names)
    finally:
        show_with(None)
    for made in (
        "mgll-tower",
        "llava-mgll",
        "llava-mgll-fitted",
        "llava-again",
        "llava-mgll-delta",
        "llava-mgll-whole",
        "llava-mgll-extracted",
        "llava-mgll-gguf",
        "llava-mgll-aligned",
        "report.html",
    ):
        assert (place / made).exists(), made
