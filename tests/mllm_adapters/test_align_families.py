"""Readers of every family, fitted on images: what the new tower then gives is what the old one gave, as far as it knows."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from mgll_encoder import inspect_tower
from mllm_adapters import load_mllm
from mllm_adapters.align import align, fitted_plan
from mllm_adapters.apply import apply_plan
from mllm_adapters.registry import open_checkpoint
from tests.mllm_adapters.families.case import Case, Golden
from tests.mllm_adapters.test_contract import CASES

ROWS = [case for case in CASES if not case.converted]


def photographs(folder: Path, number: int = 40) -> Path:
    """Coloured shapes of any shape of picture, which two random towers can both tell apart."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for i in range(number):
        size = (draw.randint(40, 64), draw.randint(40, 64))
        picture = Image.effect_noise(size, 60).convert("RGB")
        for _ in range(6):
            colour = tuple(draw.randint(0, 255) for _ in range(3))
            box = (draw.randint(4, 24), draw.randint(4, 24))
            picture.paste(colour, (*(at := (draw.randint(0, 30), draw.randint(0, 30))), at[0] + box[0], at[1] + box[1]))
        picture.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("align") / "pictures")


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_readers_are_fitted_and_the_result_is_a_model(
    case: Case, golden: Path, pictures: Path, tmp_path: Path
) -> None:
    source = case.build(tmp_path / "golden") if case.build else Golden(golden / case.golden)
    parts = {name: source.folder / path for name, path in (case.parts or {}).items()}
    encoder = next((golden / "mgll_official").glob("*.pth"))
    folder = source.folder / "checkpoint" if (source.folder / "checkpoint" / "config.json").exists() else source.folder
    checkpoint, family, _ = open_checkpoint(folder, parts)
    plain = family.plan(checkpoint, inspect_tower(encoder), None, case.target)
    plan = fitted_plan(plain, family, checkpoint)
    alignment = align(plain, family, checkpoint, pictures)
    assert set(alignment.tensors) == {step.name for step in plan.steps if step.operation == "fit"}
    for fit in alignment.fits:
        print(case.name, fit)
    out = apply_plan(plan, family, checkpoint, tmp_path / "out", alignment=alignment)
    model, _ = load_mllm(out, dtype=torch.float32)
