"""LLaVA-shaped folders whose ``mm_vision_tower`` names a place that is gone: a swap needs only the tower's geometry."""

import shutil
from pathlib import Path

import pytest

from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import MismatchError, NotFoundError, UnsupportedCheckpointError
from mllm_adapters import load_mllm
from mllm_adapters.cli.swap import main
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.known_towers import published_name, short_name
from mllm_adapters.core.registry import open_checkpoint
from tests.builders import invoke, refused, sparse_checkpoint
from tests.mllm_adapters import test_instructblip_lavis, test_med_flamingo, test_mini_gemini
from tests.mllm_adapters.families.case import Golden
from tests.mllm_adapters.families.full_size import published_tower
from tests.mllm_adapters.llava_checkpoints import a_tower, edit_config, original_llava, swap

LARGE, LARGE_336 = "openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336"

NAMES = {
    LARGE_336: LARGE_336,
    "/scratch/me/clip-vit-large-patch14-336": LARGE_336,
    "./vit/clip_vit_large_patch14_336": LARGE_336,
    "C:\\models\\clip-vit-large-patch14\\": LARGE,
    "/home/me/hub/models--openai--clip-vit-large-patch14-336/snapshots/ce19dc912ca5cd21c8a": LARGE_336,
    "ViT-L/14@336px": LARGE_336,
    "ViT-L/14": LARGE,
    "ViT-L-14-336": LARGE_336,
    "/home/me/.cache/clip/ViT-L-14-336px.pt": LARGE_336,
    "/data/openai--clip-vit-large-patch14": LARGE,
    "clip_vit_l_14": LARGE,
    "model_zoo/OpenAI/clip-vit-large-patch14-336": LARGE_336,
    "OpenGVLab/InternViT-6B-224px": "OpenGVLab/InternViT-6B-224px",
    "/scratch/me/my-tower": None,
    "google/siglip-so400m-patch14-384": None,
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": None,
    "vit_large_patch14_dinov2": None,
    "/scratch/clip-vit-large-patch14-336/finetuned": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_local_copy_is_known_by_the_name_that_it_was_published_under(name: str) -> None:
    assert published_name(name) == NAMES[name]


@pytest.fixture
def host(golden: Path, tmp_path: Path) -> Path:
    """An original LLaVA-Med with its tower in the shards; where the tower was when it was trained is gone."""
    folder = original_llava(golden, "llava_med", tmp_path / "host")
    shutil.rmtree(folder / "towers")
    return edit_config(folder, mm_vision_tower="/scratch/me/run7/vit")


@pytest.fixture
def without_tower(host: Path, golden: Path, tmp_path: Path) -> Path:
    """An original LLaVA without a tower in the shards; the one that it names is gone."""
    folder = original_llava(golden, "llava", tmp_path / "bare")
    shutil.rmtree(folder / "towers")
    return edit_config(folder, mm_vision_tower="/scratch/me/run7/vit", unfreeze_mm_vision_tower=False)


def test_the_geometry_is_taken_from_the_shards_and_that_is_said(
    host: Path, golden: Path, tmp_path: Path
) -> None:
    tower = a_tower(tmp_path / "mgll")
    whole = original_llava(golden, "llava_med", tmp_path / "whole")
    expected = plan_of(whole, tower)
    found = plan_of(host, tower)
    assert (found.before.width, found.before.tokens, found.before.image_size) == (
        expected.before.width, expected.before.tokens, expected.before.image_size,
    )  # fmt: skip
    assert [(step.name, step.shape) for step in found.steps] == [(s.name, s.shape) for s in expected.steps]
    outcome = invoke(main, "--mllm", host, "--encoder", tower, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    said = " ".join((outcome.out + outcome.err).split())
    assert (
        "the old tower 'vit' is not on this machine: its geometry is that of its tensors in the shards"
        in said
    )
    load_mllm(tmp_path / "out")
    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*.[jm][sd]*"))
    assert "/scratch/me" not in written, "somebody's folders are not published"


def plan_of(source: Path, tower: Path, image_size: int | None = None):
    checkpoint, family, _ = open_checkpoint(source)
    return family.plan(checkpoint, inspect_tower(tower), image_size)


def test_a_conversion_needs_the_tower_itself(host: Path, tmp_path: Path) -> None:
    message = refused(main, "convert", "--mllm", host, "--out", tmp_path / "out")
    assert "vision tower '/scratch/me/run7/vit' is not in the checkpoint folder" in message
    assert not (tmp_path / "out").exists()


def test_a_known_name_that_the_projector_contradicts_is_refused(without_tower: Path, tmp_path: Path) -> None:
    edit_config(without_tower, mm_vision_tower="/scratch/me/clip_vit_large_patch14_336")
    with pytest.raises(
        MismatchError, match="reads features of width 32, but the host's tower has width 1024"
    ):
        plan_of(without_tower, a_tower(tmp_path / "mgll", width=64))


def test_an_unknown_tower_asks_for_the_image_size_and_takes_it(without_tower: Path, tmp_path: Path) -> None:
    tower = a_tower(tmp_path / "mgll")
    width = 32
    edit_config(without_tower, mm_hidden_size=width)
    command = ("--mllm", without_tower, "--encoder", tower, "--out", tmp_path / "out")
    assert "pass --image-size" in refused(main, *command)
    plan = plan_of(without_tower, tower, 28)
    assert (plan.before.width, plan.after.image_size) == (width, 28)
    outcome = invoke(main, *command, "--image-size", 28)
    assert outcome.code == 0, outcome.err
    load_mllm(tmp_path / "out")


SHOWN = {
    "/home/me/hub/models--me--my-vit/snapshots/ce19dc912ca5cd21c8a": "me/my-vit",
    "C:\\models\\my-vit\\": "my-vit",
    "/scratch/me/clip-vit-large-patch14-336": LARGE_336,
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_said_of_a_path_names_nobodys_folders(name: str) -> None:
    assert short_name(name) == SHOWN[name]


def test_a_tower_in_somebodys_cache_that_is_no_clip_is_refused(without_tower: Path, tmp_path: Path) -> None:
    path = "/home/me/hub/models--google--siglip-so400m-patch14-384/snapshots/9fdffc58afc957d1a03a25b10dba0329ab15c2a3"
    edit_config(without_tower, mm_vision_tower=path)
    with pytest.raises(UnsupportedCheckpointError, match="checkpoints with a siglip tower are not supported"):
        plan_of(without_tower, a_tower(tmp_path / "mgll"), 28)


class TestOtherFamilies:
    """Mini-Gemini, Med-Flamingo and LAVIS' InstructBLIP: of an old tower that is replaced only the geometry counts."""

    def test_mini_gemini(self, golden: Path, tmp_path: Path) -> None:
        reference, tower = Golden(golden / "mini_gemini"), a_tower(tmp_path / "mgll")
        config = {"mm_vision_tower": "/scratch/me/run7/vit", "mm_hidden_size": 32}
        source = test_mini_gemini.write(reference, tmp_path / "host", config=config)
        with pytest.raises(NotFoundError, match="pass `image_size`"):
            plan_of(source, tower)
        plan = plan_of(source, tower, 28)
        assert note(
            plan
        ) == "the old tower 'vit' is not on this machine: its geometry is taken as 32 wide " + (
            "(config.json) at 28 px"
        )
        assert swap(source, tower, tmp_path / "out", 28).after.image_size == 28
        load_mllm(tmp_path / "out")

    def test_mini_gemini_as_published(self, tmp_path: Path) -> None:
        """MGM names model_zoo/OpenAI/clip-vit-large-patch14-336; people keep that elsewhere, or not at all."""
        shapes = test_mini_gemini.vicuna_7b() | test_mini_gemini.mining() | test_mini_gemini.convnext_large()
        source = sparse_checkpoint(tmp_path / "host", test_mini_gemini.MGM_7B, shapes, "BF16")
        tower = published_tower(tmp_path / "mgll")
        for path in ("/scratch/me/clip-vit-large-patch14-336", "model_zoo/OpenAI/clip-vit-large-patch14-336"):
            edit_config(source, mm_vision_tower=path)
            plan = plan_of(source, tower)
            assert note(plan).endswith(f"its geometry is that of {LARGE_336}, by its name")
            assert plan.before.tokens == 576

    def test_med_flamingo(self, tmp_path: Path) -> None:
        """Its files name no tower; one of the published width is the published one."""
        tower = a_tower(tmp_path / "mgll")
        source = test_med_flamingo.write_host(tmp_path / "host")
        shutil.rmtree(source / "clip-vit")
        with pytest.raises(NotFoundError, match="pass `image_size`"):
            plan_of(source, tower)
        plan = plan_of(source, tower, 28)
        assert "(perceiver) at 28 px" in note(plan)
        assert plan.after.image_size == 28
        whole = plan_of(
            test_med_flamingo.published(tmp_path / "whole", clip=False), published_tower(tmp_path / "vit")
        )
        assert f"its geometry is that of {LARGE}, which a perceiver of width 1024 was published with" in note(
            whole
        )

    def test_lavis_instructblip(self, golden: Path, tmp_path: Path) -> None:
        tower = a_tower(tmp_path / "mgll")
        source = test_instructblip_lavis.lavis_folder(golden, tmp_path / "host", ("eva_vit_g.pth",))
        checkpoint, family, _ = open_checkpoint(source, test_instructblip_lavis.heads(golden))
        with pytest.raises(NotFoundError, match="pass `image_size`"):
            family.plan(checkpoint, inspect_tower(tower))
        plan = family.plan(checkpoint, inspect_tower(tower), 28)
        assert "(ln_vision) at 28 px" in note(plan)
        assert plan.after.image_size == 28


def note(plan: Plan) -> str:
    """What the plan says of the old tower."""
    return next(note for note in plan.notes if "its geometry is" in note)
