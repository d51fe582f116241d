"""How large does the tower see? By the host's tokens, by --tokens, by --image-size; what does not suit it is said."""

from pathlib import Path
from typing import NamedTuple

import pytest

from mgll_encoder import TowerHeader, inspect_tower
from mgll_encoder.common.errors import InvalidArgumentError
from mllm_adapters.cli.swap import main as swap_encoder
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.family_table import FAMILIES
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.core.sizes import plan_at_size
from tests.builders import invoke, refused
from tests.mllm_adapters.families.full_size import published_tower
from tests.mllm_adapters.llava_checkpoints import a_tower
from tests.mllm_adapters.test_support import PUBLISHED

VIT_B_32 = {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072, "patch_size": 32}


class Asked(NamedTuple):
    """Tokens that are asked for with MGLL's ViT-L/14, the size that gives them; what is refused, in which words."""

    tokens: int
    image_size: int
    wrong: int
    words: str


ASKED = {
    "llava": Asked(256, 224, 250, "try 225 or 256"),
    "llava-med": Asked(100, 140, 2, "try 1 or 4"),
    "qwen-vl": Asked(256, 448, 64, "into 256 tokens whatever its size"),
    "qwen2-vl": Asked(64, 224, 63, "try 49 or 64"),
    "internvl": Asked(144, 336, 140, "try 121 or 144"),
    "mini-gemini": Asked(256, 224, 100, "takes images of 140 px, which cannot be"),
    "instructblip": Asked(32, 224, 64, "into 32 tokens whatever its size"),
    "med-flamingo": Asked(64, 224, 256, "into 64 tokens whatever its size"),
    "janus-pro": Asked(256, 224, 255, "try 225 or 256"),
    "aya-vision": Asked(144, 336, 64 * 64 * 64, "which cannot be"),
    "paligemma": Asked(577, 336, 576, "try 530 or 577"),
}
"""Family -> what is asked of its published checkpoint."""


@pytest.fixture(scope="module")
def mgll(tmp_path_factory: pytest.TempPathFactory) -> TowerHeader:
    return inspect_tower(published_tower(tmp_path_factory.mktemp("towers") / "mgll"), activation="gelu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TowerHeader:
    return inspect_tower(published_tower(tmp_path_factory.mktemp("towers") / "vit-b-32", **VIT_B_32))


def planned(name: str, folder: Path, tower: TowerHeader, **asked: int | None) -> tuple[Plan, str | None]:
    """The plan for a published checkpoint of a family, and its warning."""
    checkpoint, family, _ = open_checkpoint(PUBLISHED[name](folder / name))
    return plan_at_size(family, checkpoint, tower, **asked)


def test_every_family_is_asked() -> None:
    assert list(ASKED) == list(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_choose_the_image_size_or_are_refused_by_the_family(
    name: str, mgll: TowerHeader, tmp_path: Path
) -> None:
    asked = ASKED[name]
    checkpoint, family, _ = open_checkpoint(PUBLISHED[name](tmp_path / name))
    plan, warning = plan_at_size(family, checkpoint, mgll, tokens=asked.tokens)
    assert (plan.after.tokens, plan.after.image_size) == (asked.tokens, asked.image_size)
    assert warning is None
    with pytest.raises(InvalidArgumentError, match=f"^`tokens={asked.wrong}`") as refusal:
        plan_at_size(family, checkpoint, mgll, tokens=asked.wrong)
    assert asked.words in str(refusal.value)
    assert plan_at_size(family, checkpoint, mgll)[1] is None, "MGLL's tower suits every family as it is"


def test_a_vit_b_32_would_run_at_768_px_which_is_said_with_its_own_size(
    base: TowerHeader, tmp_path: Path
) -> None:
    plan, warning = planned("llava", tmp_path / "usual", base)
    assert plan.after.image_size == 768
    assert warning is not None
    assert "trained on 7x7 patches; to keep the host's 24x24 it runs at 768 px" in warning
    assert "stretched 3.4 times" in warning
    assert "`image_size=224` keeps the tower's own (49 tokens)" in warning
    for asked in ({"image_size": 224}, {"tokens": 49}):
        plan, warning = planned("llava", tmp_path / str(asked), base, **asked)
        assert (plan.after.image_size, plan.after.tokens, warning) == (224, 49, None)


def test_the_proposal_is_one_that_the_family_takes(base: TowerHeader, tmp_path: Path) -> None:
    """Qwen2-VL joins 2x2 patches: 7x7 of them cannot be joined, 8x8 can."""
    warning = planned("qwen2-vl", tmp_path, base)[1]
    assert warning is not None
    assert "`image_size=256` keeps the tower's own (16 tokens)" in warning


def test_at_the_terminal(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("--mllm", tiny_llava, "--encoder", a_tower(tmp_path / "wide", image_size=70), "--dry-run")
    outcome = invoke(swap_encoder, *given)
    assert outcome.code == 0
    assert "warning: wide was trained on 5x5 patches" in outcome.err
    assert "--image-size 70 keeps the tower's own (25 tokens)" in outcome.err
    outcome = invoke(swap_encoder, *given, "--tokens", 25)
    assert outcome.code == 0
    assert "warning" not in outcome.err
    assert "70 px" in outcome.out
    assert "--tokens 24: LLaVA makes a square of tokens" in refused(swap_encoder, *given, "--tokens", 24)
    assert "give one, it decides the other" in refused(
        swap_encoder, *given, "--tokens", 25, "--image-size", 70
    )
