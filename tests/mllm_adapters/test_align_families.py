"""Connectors of every family, fitted on images: the new tower tells them what the old one did, where it can."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mgll_encoder import inspect_tower
from mllm_adapters import load_mllm
from mllm_adapters.alignment.align import align, fitted_plan
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Family, Plan
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.families.qwen2_vl import Qwen2VL
from mllm_adapters.swap.apply import apply_plan
from mllm_adapters.training.prepare import names_on_disk
from tests.mllm_adapters.families import qwen2_vl
from tests.mllm_adapters.families.case import Case, Golden
from tests.mllm_adapters.test_contract import CASES

ROWS = [case for case in CASES if not case.converted]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Soft patches of color, of any shape: even random towers tell where which color is."""
    folder, draw = tmp_path_factory.mktemp("pictures"), random.Random(0)
    for i in range(20):
        patches = Image.frombytes("RGB", (4, 4), draw.randbytes(48))
        patches.resize((draw.randint(40, 64), draw.randint(40, 64)), Image.Resampling.BICUBIC).save(
            folder / f"{i}.png"
        )
    return folder


def opened(case: Case, golden: Path, scratch: Path) -> tuple[Checkpoint, Family]:
    found = case.build(scratch / "golden") if case.build else Golden(golden / case.golden)
    parts = {name: found.folder / path for name, path in (case.parts or {}).items()}
    checkpoint, family, _ = open_checkpoint(found.folder, parts)
    return checkpoint, family


def planned(case: Case, golden: Path, checkpoint: Checkpoint, family: Family) -> Plan:
    encoder = next((golden / "mgll_official").glob("*.pth"))
    return family.plan(checkpoint, inspect_tower(encoder), None, case.target)


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_its_connectors_are_fitted_and_nothing_else(
    case: Case, golden: Path, pictures: Path, tmp_path: Path
) -> None:
    checkpoint, family = opened(case, golden, tmp_path)
    plain = planned(case, golden, checkpoint, family)
    plan = fitted_plan(plain, family, checkpoint)
    alignment = align(plain, family, checkpoint, pictures)
    assert set(alignment.tensors) == {step.name for step in plan.steps if step.operation == "fit"}
    assert len(alignment.fits) >= len(family.connector_layers(plan)) > 0
    for fit in alignment.fits:
        assert fit.r2 > 0.05, fit
        assert fit.r2 > (fit.r2_unaligned or 0) - 1e-3, fit
    out = apply_plan(plan, family, checkpoint, tmp_path / "out", fitted=alignment.tensors)
    model, _ = load_mllm(out, dtype=torch.float32)
    stored = names_on_disk(
        [name for name, _ in model.named_parameters() if _fitted(name, plan)], alignment.tensors
    )
    assert set(stored.values()) == set(alignment.tensors)
    for name, source in stored.items():
        found, expected = model.get_parameter(name), alignment.tensors[source]
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)
    side = plan.after.image_size
    with torch.no_grad():
        assert model(**case.prompt(plan, torch.randn(1, 3, side, side))).logits.isfinite().all()


def _fitted(name: str, plan: Plan) -> bool:
    return any(name.endswith(step.name) for step in plan.steps if step.operation == "fit")


class Unordered(Qwen2VL):
    """Takes Qwen2.5's features as they come, window by window."""

    def token_order(self, model: Any, contract: Any) -> None:
        """None: as they come."""


def test_windows_are_put_back_in_rows(golden: Path, pictures: Path, tmp_path: Path) -> None:
    case = next(case for case in qwen2_vl.CASES if case.name == "qwen2_5_vl")
    checkpoint, family = opened(case, golden, tmp_path)
    plan = planned(case, golden, checkpoint, family)
    right, wrong = (align(plan, one, checkpoint, pictures).fits[0].r2 for one in (family, Unordered()))
    assert right > wrong + 0.02


def test_a_bridged_flamingo_takes_another_tower(golden: Path, pictures: Path, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "med_flamingo")
    checkpoint, family = opened(case, golden, tmp_path)
    plain = planned(case, golden, checkpoint, family)
    plan = fitted_plan(plain, family, checkpoint)
    assert not [step.name for step in plan.steps if step.operation in ("reinit", "zeros", "ones")]
    first = apply_plan(
        plan,
        family,
        checkpoint,
        tmp_path / "first",
        fitted=align(plain, family, checkpoint, pictures).tensors,
    )
    checkpoint, family, _ = open_checkpoint(first)
    again = planned(replace(case, parts=None), golden, checkpoint, family)
    (fit,) = align(again, family, checkpoint, pictures).fits
    assert fit.r2 > 0.999, "the same tower once more"
    second = apply_plan(again, family, checkpoint, tmp_path / "second")
    model, _ = load_mllm(second)
    assert model.config.perceiver_width == plain.before.width
