"""A LLaVA and a tower of toy size with random weights, for a first swap; made in a second."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mgll_encoder.common.files import new_folder
from mgll_encoder.common.library_bars import no_library_bars
from mgll_encoder.tower.model import Tower, build_model
from mgll_encoder.tower.save import save_tower
from mgll_encoder.tower.spec import TowerSpec
from mllm_adapters.core.processing import llava_processor
from mllm_adapters.examples.assembly import assemble, tower_contract
from mllm_adapters.examples.language_models import CHATML, tiny

PHOTOGRAPHS = 64
QUESTION = "Which finding does this fundus photograph show?"
ANSWERS = ("glaucoma", "cataract")
TEXTS = (QUESTION, "\nuser\n", "\nassistant\n")


def write_example(out: Path, *, force: bool = False) -> Path:
    """Write ``llava/`` (a checkpoint), ``tower/`` (of another width) and ``photographs/`` (colored noise).

    ``train.json`` asks a question about every picture, with invented answers.

    Args:
        out: Folder to write.
        force: Replace ``out`` if it exists.

    Returns:
        ``out``.

    Raises:
        UserError: ``out`` exists.
    """
    with new_folder(out, force) as folder:
        save_tower(_tower(width=96, seed=1), folder / "tower")
        tower, speech = _tower(width=64, seed=0), tiny(TEXTS, [*ANSWERS], seed=0)
        processor = llava_processor(tower_contract(tower.spec), speech.tokenizer, CHATML)
        with no_library_bars():
            assemble(tower, speech, seed=0).save_pretrained(folder / "llava")
        processor.save_pretrained(folder / "llava")
        (folder / "photographs").mkdir()
        draw = np.random.default_rng(0)
        for number in range(PHOTOGRAPHS):
            coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((64, 64), Image.Resampling.BICUBIC).save(
                folder / "photographs" / f"{number:02d}.png"
            )
        (folder / "train.json").write_text(
            json.dumps([_row(n) for n in range(PHOTOGRAPHS)], indent=1), "utf-8"
        )
    return out


def _row(number: int) -> dict[str, object]:
    human = {"from": "human", "value": f"<image>\n{QUESTION}"}
    answer = {"from": "gpt", "value": ANSWERS[number % len(ANSWERS)]}
    return {"id": f"{number:02d}", "image": f"{number:02d}.png", "conversations": [human, answer]}


def _tower(width: int, seed: int) -> Tower:
    spec = TowerSpec(
        width=width,
        depth=3,
        heads=width // 32,
        mlp_width=2 * width,
        patch_size=16,
        image_size=64,
        activation="gelu",
    )
    torch.manual_seed(seed)
    return Tower.from_model(build_model(spec), spec)
