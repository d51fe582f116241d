"""Somebody reads a Mini-Gemini, and puts an MGLL tower into its low-resolution branch."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoProcessor

import mllm_adapters.auto  # noqa: F401
from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import IncompatibleTowerError, InvalidArgumentError, NotFoundError, UserError
from mgll_encoder.common.images import open_image
from mgll_encoder.weights.weight_file import open_weights as open_checkpoint_file
from mllm_adapters import load_mllm
from mllm_adapters.api import plan_swap
from mllm_adapters.checkpoints.locate import find_part
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.fates import Kept, Reinitialized
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.data.corpus import Corpus
from mllm_adapters.data.dataset import AnswerCollator, encode, prepare_examples
from mllm_adapters.data.llava_format import Conversation
from mllm_adapters.families.mini_gemini.processor import low_resolution
from mllm_adapters.swap.apply import apply_plan
from tests import builders
from tests.mllm_adapters.families import full_size
from tests.mllm_adapters.families.case import Golden
from tests.mllm_adapters.families.llava import expand
from tests.mllm_adapters.families.mini_gemini import inputs
from tests.mllm_adapters.retraining import turns

TOWER = "model.vision_tower.vision_tower.vision_model."
AUX = "model.vision_tower_aux.vision_"
PROMPT = Path(__file__).parent / "prompts" / "mini_gemini.txt"
QUESTION = "Which disease does this image show?\nA. Glaucoma\nB. Myopia"


@pytest.fixture(scope="module")
def reference(golden: Path) -> Golden:
    if not (golden / "mini_gemini").is_dir():
        pytest.skip(f"{golden} has no mini_gemini")
    return Golden(golden / "mini_gemini")


@pytest.fixture(scope="module")
def encoder(golden: Path) -> Path:
    return next((golden / "mgll_official").glob("*.pth"))


@cache
def tensors(source: Path) -> dict[str, Tensor]:
    checkpoint, _, _ = open_checkpoint(source)
    return {name: checkpoint.read(name).contiguous() for name in checkpoint.tensors}


def part(reference: Golden, field: str) -> Path:
    """The folder of a tower outside the shards."""
    config = json.loads((reference.folder / "checkpoint" / "config.json").read_text())
    found = find_part(config[field], reference.folder / "checkpoint")
    assert found is not None, "the golden folder holds both towers"
    return found


def open_clip(reference: Golden) -> dict[str, Tensor]:
    """timm's key -> value of the high-resolution tower in its own file."""
    weights = open_checkpoint_file(part(reference, "mm_vision_tower_aux"))
    state = weights.read(weights.headers)
    prefix = "visual.trunk."
    return {
        k.removeprefix(prefix): v
        for k, v in state.items()
        if k.startswith((f"{prefix}stem", f"{prefix}stages"))
    }


def write(
    reference: Golden,
    folder: Path,
    *,
    inside: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    zoo: bool = True,
    tokenizer: bool = False,
    safetensors: bool = True,
) -> Path:
    """The golden checkpoint in another form: one file, towers outside the shards or as in ``inside``."""
    state = {k: v for k, v in tensors(reference.folder / "checkpoint").items() if "vision_tower" not in k}
    settings = json.loads((reference.folder / "checkpoint" / "config.json").read_text())
    folder.mkdir(parents=True)
    if tokenizer:
        words = builders.byte_tokenizer()
        words.save_pretrained(folder)
        settings["vocab_size"] = len(words)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][torch.arange(len(words)) % len(state[name])]
    state |= inside or {}
    (folder / "config.json").write_text(json.dumps({**settings, **(config or {})}))
    if safetensors:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    if zoo:
        top = Path(settings["mm_vision_tower"]).parts[0]
        places = (reference.folder / top, reference.folder / "checkpoint" / top)
        (folder / top).symlink_to(next(place for place in places if place.exists()).absolute())
    return folder


def swap(source: Path, encoder: Path, out: Path, image_size: int | None = None) -> Plan:
    plan = plan_swap(source, encoder, image_size=image_size)
    plan.write(out)
    return plan.plan


@torch.no_grad()
def check_logits(model: Any, reference: Golden, sequence: str = "seq1") -> None:
    expected = reference.expected[f"{sequence}.logits"]
    found = model(**inputs(model, reference, sequence)).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# --- reading -----------------------------------------------------------------------------------------------


def hd(reference: Golden, folder: Path) -> Path:
    settings = {
        "image_grid": 2, "image_global": True, "image_size_aux": reference.expected["hd.pixel_values_aux"].shape[-1]
    }  # fmt: skip
    return write(reference, folder, config=settings)


@torch.no_grad()
def test_in_hd_mode_five_views_give_the_tokens_and_logits_of_the_original(
    reference: Golden, tmp_path: Path
) -> None:
    model, _ = load_mllm(hd(reference, tmp_path / "hd"), dtype=torch.float32)
    expected = reference.expected
    low, high = expected["hd.pixel_values"], expected["hd.pixel_values_aux"]
    found = model.get_image_features(low, high).pooler_output
    torch.testing.assert_close(found, expected["hd.visual_tokens"], atol=1e-4, rtol=0)
    assert model.config.image_seq_length == found.shape[1]
    ids = expand(expected["seq0.input_ids"][0], model.config.image_token_id, found.shape[1])
    logits = model(input_ids=ids, pixel_values=low, pixel_values_aux=high).logits
    wanted = expected["hd.logits"]
    torch.testing.assert_close(logits[..., : wanted.shape[-1]], wanted, atol=1e-4, rtol=0)
    shuffled = model.get_image_features(low.flip(1), high).pooler_output
    assert (shuffled - found).abs().max() > 1e-3, "negative control: the order of the views counts"


@torch.no_grad()
def test_the_high_resolution_branch_and_its_mining_are_those_of_the_original(reference: Golden) -> None:
    model = load_mllm(reference.folder, dtype=torch.float32)[0].model
    expected = reference.expected
    cells = model.vision_tower_aux(expected["pixel_values_aux"])
    torch.testing.assert_close(cells, expected["vision_features_aux"], atol=1e-4, rtol=0)
    mined = model.mine(expected["vision_features"], cells)
    torch.testing.assert_close(mined, expected["resampler_output"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_high_resolution_picture_alone_is_enough(reference: Golden) -> None:
    """The original makes the low-resolution pixels of it; so does the model, whichever name it comes under."""
    model, _ = load_mllm(reference.folder, dtype=torch.float32)
    high = reference.expected["pixel_values_aux"]
    for given in ({"pixel_values": high}, {"pixel_values_aux": high}):
        found = model.get_image_features(**given).pooler_output
        torch.testing.assert_close(found, reference.expected["visual_tokens"], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="high-resolution pixels must be"):
        model.get_image_features(pixel_values=reference.expected["pixel_values"])


def test_low_resolution_tiles_are_cut_row_by_row_and_the_whole_picture_is_last(reference: Golden) -> None:
    expected = reference.expected["hd.pixel_values"]
    high, side = reference.expected["hd.pixel_values_aux"], expected.shape[-1]
    views = low_resolution(high, side, grid=2, whole=True, antialias=False)
    torch.testing.assert_close(views[:, :4], expected[:, :4], atol=1e-5, rtol=0)
    tiled = torch.cat([torch.cat([*views[0, r : r + 2]], dim=2) for r in (0, 2)], dim=1)[None]
    whole = functional.interpolate(tiled, size=(side, side), mode="bilinear", align_corners=False)
    torch.testing.assert_close(views[:, 4], whole)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [("mini_gemini", "MiniGeminiLlamaForCausalLM"), ("mgm", "MGMLlamaForCausalLM")],
)
def test_the_old_and_the_new_name_mean_the_same_model(
    model_type: str, architecture: str, reference: Golden, tmp_path: Path
) -> None:
    settings = {"model_type": model_type, "architectures": [architecture]}
    source = write(reference, tmp_path / "named", config=settings, safetensors=model_type == "mgm")
    check_logits(load_mllm(source, dtype=torch.float32)[0], reference)


def as_in_the_shards(reference: Golden, *, tower: float, aux: float) -> dict[str, Tensor]:
    """Both towers under the names that the shards give them, each moved a little."""
    named = load_tower_state(reference)
    low = {f"{TOWER}{name}": value + tower for name, value in named.items()}
    return low | {f"{AUX}{name}": value + aux for name, value in open_clip(reference).items()}


def load_tower_state(reference: Golden) -> dict[str, Tensor]:
    from mgll_encoder import load_tower

    return load_tower(part(reference, "mm_vision_tower")).model.state_dict()


@pytest.mark.parametrize("trained", [False, True])
def test_the_shards_count_for_the_low_resolution_tower_and_for_a_trained_high_resolution_one(
    trained: bool, reference: Golden, tmp_path: Path
) -> None:
    inside = as_in_the_shards(reference, tower=1, aux=2)
    source = write(
        reference, tmp_path / "inside", inside=inside, config={"optimize_vision_tower_aux": trained}
    )
    checkpoint, family, _ = open_checkpoint(source)
    plan = family.plan(checkpoint)
    assert ("vision-tower-aux" in plan.parts) != trained
    model = load_mllm(source, dtype=torch.float32)[0].model
    named = load_tower_state(reference)["embeddings.class_embedding"]
    torch.testing.assert_close(model.vision_tower.embeddings.class_embedding, named + 1)
    stem = open_clip(reference)["stem.0.bias"]
    found = model.vision_tower_aux.embeddings.patch_embeddings.bias
    torch.testing.assert_close(found, stem + 2 * trained)


def test_only_the_stages_that_were_trained_are_taken_from_the_shards(
    reference: Golden, tmp_path: Path
) -> None:
    inside = as_in_the_shards(reference, tower=0, aux=2)
    inside = {name: value for name, value in inside.items() if f"{AUX}stem" not in name}
    source = write(reference, tmp_path / "half", inside=inside, config={"optimize_vision_tower_aux": True})
    tower = load_mllm(source, dtype=torch.float32)[0].model.vision_tower_aux
    own = open_clip(reference)
    torch.testing.assert_close(tower.embeddings.patch_embeddings.bias, own["stem.0.bias"])
    gamma = tower.stages[0].layers[0].layer_scale_parameter
    torch.testing.assert_close(gamma, own["stages.0.blocks.0.gamma"] + 2)


def test_towers_that_lie_elsewhere_are_given_as_parts(reference: Golden, tmp_path: Path) -> None:
    source = write(reference, tmp_path / "lonely", zoo=False)
    low, high = part(reference, "mm_vision_tower"), part(reference, "mm_vision_tower_aux")
    with pytest.raises(NotFoundError, match=r"`parts\['vision-tower'\]=PATH`"):
        load_mllm(source)
    with pytest.raises(NotFoundError, match=r"`parts\['vision-tower-aux'\]=PATH`"):
        load_mllm(source, parts={"vision-tower": low})
    file = next(high.glob("open_clip_*model.*"))
    for given in (high, file):
        parts = {"vision-tower": low, "vision-tower-aux": given}
        check_logits(load_mllm(source, dtype=torch.float32, parts=parts)[0], reference, "seq0")
    with pytest.raises(
        NotFoundError, match="has no weights of a high-resolution tower: expected one of open_clip"
    ):
        load_mllm(source, parts={"vision-tower": low, "vision-tower-aux": tmp_path})


def test_towers_that_are_only_in_the_shards_are_taken_and_it_is_said(
    reference: Golden, tmp_path: Path
) -> None:
    inside = as_in_the_shards(reference, tower=0, aux=0)
    untrained = {"optimize_vision_tower_aux": False}
    source = write(reference, tmp_path / "alone", inside=inside, config=untrained, zoo=False)
    parts = {"vision-tower": part(reference, "mm_vision_tower")}
    checkpoint, family, _ = open_checkpoint(source, parts)
    notes = " ".join(family.plan(checkpoint).notes)
    assert "its copy in the shards is used" in notes
    assert "the host's own tower is the one in its shards" in notes
    check_logits(load_mllm(source, dtype=torch.float32, parts=parts)[0], reference)


@torch.no_grad()
def test_a_padded_batch_and_a_text_without_pictures_give_what_each_row_gives(reference: Golden) -> None:
    model, _ = load_mllm(reference.folder, dtype=torch.float32)
    one = inputs(model, reference, "seq0")
    ids = one["input_ids"]
    text = torch.full_like(ids, 7)
    padded = torch.cat([torch.cat([torch.zeros_like(ids[:, :3]), ids], 1), torch.cat([text, text[:, :3]], 1)])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    both = model(**{**one, "input_ids": padded, "attention_mask": mask}).logits
    torch.testing.assert_close(both[:1, 3:], model(**one).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(both[1:], model(input_ids=padded[1:]).logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="image placeholders, the images have"):
        model(**{**one, "input_ids": ids[:, :-8]})


# --- the swap ----------------------------------------------------------------------------------------------


def test_the_hosts_own_tower_put_in_changes_nothing(reference: Golden, tmp_path: Path) -> None:
    """The strictest control there is: the logits stay those of the original code."""
    source = write(reference, tmp_path / "source")
    plan = swap(source, part(reference, "mm_vision_tower"), tmp_path / "same")
    assert set(plan.connectors.values()) == {Kept(width=plan.after.width)}
    assert {step.operation for step in plan.steps} <= {"keep", "rename", "tower", "extend_rows"}
    check_logits(load_mllm(tmp_path / "same", dtype=torch.float32)[0], reference)


@torch.no_grad()
def test_with_a_tower_of_another_width_the_plan_says_what_must_be_learnt_again(
    reference: Golden, encoder: Path, tmp_path: Path
) -> None:
    plan = swap(write(reference, tmp_path / "source"), encoder, tmp_path / "out")
    old, new = plan.before.width, plan.after.width
    if old == new:
        pytest.skip("this draw's tower is as wide as the encoder")
    assert set(plan.connectors) == {
        "model.vlm_uni_query_projector.0", "model.vlm_uni_query_projector.1", "model.mm_projector.0"
    }  # fmt: skip
    assert set(plan.connectors.values()) == {Reinitialized(before=plan.before.width, after=plan.after.width)}
    assert any("vlm_uni_val_projector.1 is re-initialized, too" in note for note in plan.notes)
    fresh = {step.name for step in plan.steps if step.operation in ("reinit", "zeros", "ones")}
    changed = [*plan.connectors, "model.vlm_uni_val_projector.1"]
    assert fresh == {f"{name}.{kind}" for name in changed for kind in ("weight", "bias")}
    model = load_mllm(tmp_path / "out")[0].model
    own = tensors(reference.folder / "checkpoint")
    for name in ("vlm_uni_aux_projector.1.weight", "vlm_uni_val_projector.0.weight", "mm_projector.2.weight"):
        assert torch.equal(model.get_parameter(name), own[f"model.{name}"]), f"{name} is as trained"
    assert model.vlm_uni_val_projector[1].out_features == model.vision_tower.config.hidden_size == new
    assert model.config.mining_width == old
    aux = model.vision_tower_aux.stages[0].layers[0].layer_scale_parameter
    assert torch.equal(aux, open_clip(reference)["stages.0.blocks.0.gamma"]), "the other tower is kept"


def test_the_high_resolution_cells_must_divide_among_the_new_patches(
    reference: Golden, encoder: Path, tmp_path: Path
) -> None:
    checkpoint, family, _ = open_checkpoint(write(reference, tmp_path / "source"))
    tower = inspect_tower(encoder)
    patch = tower.spec.patch_size
    cells = checkpoint.config["image_size_aux"] // 4
    wrong = next(grid for grid in range(2, cells) if cells % grid)
    with pytest.raises(
        InvalidArgumentError, match=rf"{cells}x{cells} high-resolution cells do not divide: try (\d+)"
    ) as error:
        family.plan(checkpoint, tower, wrong * patch)
    advised = [int(word) for word in str(error.value).rpartition("try ")[2].split() if word.isdigit()]
    for size in advised:
        plan = family.plan(checkpoint, tower, size)
        assert plan.after.tokens == (size // patch) ** 2 == plan.config["image_seq_length"]
    with pytest.raises(IncompatibleTowerError, match="not a multiple of the tower's patch size"):
        family.plan(checkpoint, tower, advised[0] + 1)


@torch.no_grad()
def test_five_views_survive_the_swap(reference: Golden, encoder: Path, tmp_path: Path) -> None:
    plan = swap(hd(reference, tmp_path / "hd"), encoder, tmp_path / "out")
    assert plan.after.tiles == 5
    assert any(
        f"5 views of {plan.after.tokens} tokens, {5 * plan.after.tokens} in all" in n for n in plan.notes
    )
    model, _ = load_mllm(tmp_path / "out")
    side = plan.config["image_size_aux"]
    tokens = model.get_image_features(torch.zeros(2, 3, side, side)).pooler_output
    assert tokens.shape[:2] == (2, 5 * plan.after.tokens)


# --- pictures and text -------------------------------------------------------------------------------------


def original_pixels(picture: Image.Image, side: int, low: int, processor: Any) -> tuple[Tensor, Tensor]:
    """What model_vqa.py does with image_aspect_ratio ``pad``: by Pillow, once at high resolution."""
    mean, std = (np.array(v) for v in (processor.image_mean, processor.image_std))
    square = Image.new("RGB", (max(picture.size),) * 2, tuple(int(x * 255) for x in mean))
    square.paste(picture, tuple((max(picture.size) - length) // 2 for length in picture.size))
    resized = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)) / 255
    high = torch.from_numpy((resized - mean) / std).permute(2, 0, 1).float()[None]
    return functional.interpolate(high, size=(low, low), mode="bilinear", align_corners=False), high


def conversation(answer: str | None = None) -> list[dict[str, Any]]:
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    return [asked] + (
        [{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else []
    )


@pytest.fixture(scope="module")
def with_tokenizer(reference: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini-gemini") / "source"
    return write(reference, folder, tokenizer=True, config={"image_aspect_ratio": "pad"})


def test_a_conversion_prepares_pictures_and_prompts_as_the_original(
    with_tokenizer: Path, tmp_path: Path
) -> None:
    checkpoint, family, _ = open_checkpoint(with_tokenizer)
    plan = family.plan(checkpoint)
    apply_plan(plan, family, checkpoint, tmp_path / "converted")
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    prompt = processor.apply_chat_template(conversation(), add_generation_prompt=True)
    assert prompt == PROMPT.read_text(encoding="utf-8")
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((150, 90))
    batch = processor(text=[prompt], images=[picture], return_tensors="pt")
    side = checkpoint.config["image_size_aux"]
    low, high = original_pixels(picture, side, plan.after.image_size, processor.image_processor)
    torch.testing.assert_close(batch["pixel_values_aux"], high, atol=0.03, rtol=0)  # a grey level: 0.015
    torch.testing.assert_close(batch["pixel_values"], low, atol=0.03, rtol=0)
    model, own = load_mllm(with_tokenizer, dtype=torch.float32)
    assert (batch["input_ids"] == model.config.image_token_id).sum() == plan.after.tokens
    with torch.no_grad():
        logits = model(**batch).logits
        alone = {**batch, "pixel_values": batch["pixel_values_aux"], "pixel_values_aux": None}
        torch.testing.assert_close(model(**alone).logits, logits)
    assert own.chat_template == processor.chat_template


@pytest.fixture(scope="module")
def swapped(
    with_tokenizer: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Path]:
    out = tmp_path_factory.mktemp("mini-gemini") / "out"
    return swap(with_tokenizer, encoder, out), out


def test_after_the_swap_a_real_photograph_is_seen_by_the_new_towers_rule(
    swapped: tuple[Plan, Path], photographs: Path
) -> None:
    plan, folder = swapped
    model, processor = load_mllm(folder, dtype=torch.float32)
    picture = open_image(min(photographs.rglob("*.jpg")))
    prompt = processor.apply_chat_template(conversation(), add_generation_prompt=True)
    batch = processor(text=[prompt], images=[picture], return_tensors="pt")
    assert (plan.before.resize, plan.after.resize) == ("pad", "squash")
    side = plan.config["image_size_aux"]
    squashed = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)) / 255
    high = torch.from_numpy((squashed - np.array(plan.after.mean)) / np.array(plan.after.std))
    torch.testing.assert_close(batch["pixel_values_aux"][0], high.permute(2, 0, 1).float(), atol=0.03, rtol=0)
    assert batch["pixel_values"].shape[-1] == plan.after.image_size
    assert (batch["input_ids"] == plan.image_token_id).sum() == plan.after.tokens
    with torch.no_grad():
        logits = model(**batch).logits
        alone = processor.image_processor(picture, return_tensors="pt")
        written = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
        assert torch.equal(alone["pixel_values"], written["pixel_values"])
        again = model(input_ids=batch["input_ids"], pixel_values=written["pixel_values"]).logits
        torch.testing.assert_close(again, logits, msg="the model makes the low-resolution pixels likewise")
    generated = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape[1] == batch["input_ids"].shape[1] + 3


def test_it_can_be_trained(swapped: tuple[Plan, Path], tmp_path: Path) -> None:
    model, processor = load_mllm(swapped[1], dtype=torch.float32)
    builders.picture(tmp_path, "a.png")
    rows = [
        Conversation.model_validate(
            {"id": str(i), "image": "a.png", "conversations": turns("<image>\nWhich?", word)}
        )
        for i, word in enumerate(("Drusen, many of them.", "None."))
    ]
    examples, _ = prepare_examples(
        Corpus(tmp_path / "t.json", tmp_path, rows, {"a.png": (40, 40)}), processor, 2048, text_only=False
    )
    batch = AnswerCollator(0)([encode(example, tmp_path, processor) for example in examples])
    assert batch["pixel_values"].shape[0] == batch["pixel_values_aux"].shape[0] == 2
    loss = model(**batch).loss
    assert torch.isfinite(loss)
    loss.backward()
    assert model.model.vlm_uni_query_projector[1].weight.grad.abs().max() > 0


# --- full size ---------------------------------------------------------------------------------------------

CONVNEXT_LARGE = {"dims": (192, 384, 768, 1536), "depths": (3, 3, 27, 3)}

MGM_7B = {
    "architectures": ["MGMLlamaForCausalLM"], "model_type": "mgm", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "hidden_act": "silu", "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "mm_vision_tower": "model_zoo/OpenAI/clip-vit-large-patch14-336",
    "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
    "mm_hidden_size": 1024, "mm_hidden_size_aux": 2880, "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "image_size_aux": 768, "image_grid": 1,
    "image_global": False, "optimize_vision_tower": False, "optimize_vision_tower_aux": False,
}  # fmt: skip
"""YanweiLi/MGM-7B, as dvlab-research/MGM's scripts/llama/train/stage_1_2_full_v7b_336_hr_768.sh trains it."""


def linear(name: str, given: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, given), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vicuna_7b() -> dict[str, tuple[int, ...]]:
    width, inner = 4096, 11008
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, width)}
    for i in range(32):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{k}_proj.weight": (width, width) for k in "qkvo"}
        shapes |= {f"{layer}.mlp.{k}_proj.weight": (inner, width) for k in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{layer}.{k}_layernorm.weight": (width,) for k in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (32000, width)}


def clip_large() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1024,),
        "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "embeddings.position_embedding.weight": (577, 1024),
        **norm("pre_layrnorm", 1024),
        **norm("post_layernorm", 1024),
    }
    for i in range(24):
        layer = f"encoder.layers.{i}"
        for k in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{k}", 1024, 1024)
        shapes |= linear(f"{layer}.mlp.fc1", 1024, 4096) | linear(f"{layer}.mlp.fc2", 4096, 1024)
        shapes |= norm(f"{layer}.layer_norm1", 1024) | norm(f"{layer}.layer_norm2", 1024)
    return {TOWER + name: shape for name, shape in shapes.items()}


def convnext_large() -> dict[str, tuple[int, ...]]:
    dims, depths = CONVNEXT_LARGE["dims"], CONVNEXT_LARGE["depths"]
    shapes: dict[str, tuple[int, ...]] = {
        "stem.0.weight": (192, 3, 4, 4), "stem.0.bias": (192,), **norm("stem.1", 192)
    }  # fmt: skip
    for s, (width, depth) in enumerate(zip(dims, depths, strict=True)):
        if s:
            shapes |= norm(f"stages.{s}.downsample.0", dims[s - 1])
            shapes[f"stages.{s}.downsample.1.weight"] = (width, dims[s - 1], 2, 2)
            shapes[f"stages.{s}.downsample.1.bias"] = (width,)
        for b in range(depth):
            block = f"stages.{s}.blocks.{b}"
            shapes |= {f"{block}.gamma": (width,), f"{block}.conv_dw.weight": (width, 1, 7, 7)}
            shapes |= {f"{block}.conv_dw.bias": (width,), **norm(f"{block}.norm", width)}
            shapes |= linear(f"{block}.mlp.fc1", width, 4 * width)
            shapes |= linear(f"{block}.mlp.fc2", 4 * width, width)
    return {AUX + name: shape for name, shape in shapes.items()}


def mining() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for kind, width in (("query", 1024), ("aux", 2880), ("val", 2880)):
        name = f"model.vlm_uni_{kind}_projector"
        shapes |= norm(f"{name}.0", width) | linear(f"{name}.1", width, 1024)
    return shapes | linear("model.mm_projector.0", 1024, 4096) | linear("model.mm_projector.2", 4096, 4096)


LLAMA_7B = (
    6_738_415_616 + 2 * 64 * 4096
)  # the published count, and 64 rows for the placeholder in both tables
TOWERS = {224: 303_179_776, 336: 303_179_776 + 320 * 1024, 448: 303_179_776 + 768 * 1024}
CONVNEXT = (
    196_227_264  # timm's convnext_large (197,767,336) without its head's norm (3,072) and classes (1,537,000)
)
HEADS = 20_979_712 + 1_051_648 + 2 * 2_955_904  # mm_projector; query, aux and val


@pytest.mark.parametrize("views", [1, 5])
def test_a_published_mgm_is_planned_in_full(views: int, tmp_path: Path) -> None:
    """MGM-7B with its towers in the shards; MGM-7B-HD without the one that is replaced, which is nowhere at hand."""
    settings, shapes = dict(MGM_7B), vicuna_7b() | mining() | convnext_large()
    if views == 5:
        settings |= {"image_grid": 2, "image_global": True, "image_size_aux": 1536}
    else:
        shapes |= clip_large()
    source = builders.sparse_checkpoint(tmp_path / "MGM-7B", settings, shapes, "BF16")
    checkpoint, family, _ = open_checkpoint(source)
    tower = inspect_tower(full_size.published_tower(tmp_path / "mgll"))
    weights = LLAMA_7B + CONVNEXT + HEADS
    if views == 1:
        full_size.check_full_size(family.plan(checkpoint), checkpoint, weights=weights + TOWERS[336])
    else:
        with pytest.raises(NotFoundError, match=r"`parts\['vision-tower'\]=PATH`"):
            family.plan(checkpoint)
    for size, tokens in ((None, 576), (224, 256), (336, 576), (448, 1024)):
        plan = family.plan(checkpoint, tower, size)
        assert (plan.before.tokens, plan.after.tokens, plan.after.tiles) == (576, tokens, views)
        assert plan.config["image_seq_length"] == tokens * views
        assert set(plan.connectors.values()) == {Kept(width=1024)}
    plan = family.plan(checkpoint, tower, 224)
    full_size.check_full_size(plan, checkpoint, weights=weights + TOWERS[224])
    with pytest.raises(
        InvalidArgumentError, match="192x192 high-resolution cells do not divide: try 168 or 224"
    ):
        family.plan(checkpoint, tower, 196)


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "mgm_gemma", "architectures": ["MGMGemmaForCausalLM"]},
            r"config.json .*mgm_gemma.*not a LLaMA: expected LLaMA with the vicuna_v1 prompt; take MGM-7B",
        ),
        ({"model_type": "mini_gemini_mixtral", "architectures": ["MiniGeminiMixtralForCausalLM"]}, "not a LLaMA"),
        ({"vocab_size": 64000}, r"is Yi \(MGM-34B\)"),
        ({"vocab_size": 128256}, r"is LLaMA 3 \(MGM-8B\)"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config says bitsandbytes"),
        ({"image_global": True}, "image_global is true, but image_grid is 1"),
        ({"image_size_aux": 4}, r"image_size_aux is 4: expected a multiple of \d+"),
        ({"mm_vision_tower_aux": "openclip-convnext-xxlarge"}, "the xxlarge ConvNeXt normalizes differently"),
    ],
)  # fmt: skip
def test_what_is_close_but_not_supported_is_refused_in_one_line(
    settings: dict[str, Any], message: str, reference: Golden, tmp_path: Path
) -> None:
    source = write(reference, tmp_path / "close", config=settings)
    with pytest.raises(UserError, match=message) as error:
        load_mllm(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.vlm_uni_val_projector.1.bias": None}, "model.vlm_uni_val_projector.1.bias is missing"),
        ({"model.embed_tokens.weight": None}, "model.embed_tokens.weight is missing"),
        ({"model.vision_resampler.weight": (2, 2)}, "vision_resampler.weight is not part of a Mini-Gemini"),
        ({"model.vlm_uni_aux_projector.1.weight": (4, 7)}, "reads features of width 7, but .* gives"),
        ({"model.mm_projector.0.weight": (4, 7)}, "tower and projector do not belong together"),
        ({f"{TOWER}embeddings.class_embedding": (7,)}, "low-resolution tower in the shards is incomplete"),
        ({f"{TOWER}embeddings.position_embedding.weight": (7, 7)}, r"but .* has shape \[7, 7\]"),
        ({"model.norm.weight": None}, "missing tensors, first model.language_model.norm.weight"),
        ({"model.layers.0.mlp.up_proj.weight": (3, 3)}, "mismatched tensors"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_by_the_tensor_at_fault(
    change: dict[str, tuple[int, ...] | None], message: str, reference: Golden, tmp_path: Path
) -> None:
    source = write(
        reference, tmp_path / "damaged", inside={k: torch.zeros(v) for k, v in change.items() if v}
    )
    gone = {name for name, shape in change.items() if shape is None}
    if gone:
        state = {k: v for k, v in tensors(source).items() if k not in gone}
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_mllm(source)


def test_a_high_resolution_tower_of_another_kind_is_refused(reference: Golden, tmp_path: Path) -> None:
    source = write(reference, tmp_path / "source")
    good = {f"visual.trunk.{name}": value for name, value in open_clip(reference).items()}
    bad = {
        "its stem or blocks are missing": {k: v for k, v in good.items() if "stem" not in k},
        "is not part of a ConvNeXt": {
            **good,
            "visual.trunk.stages.0.blocks.0.mlp.grn.weight": torch.zeros(1),
        },
        r"expected \[width, 3, 4, 4\]": {**good, "visual.trunk.stem.0.weight": torch.zeros(8, 3, 2, 2)},
        "missing tensors, first model.vision_tower_aux.stages": {
            k: v for k, v in good.items() if not k.endswith("stages.0.blocks.0.gamma")
        },
    }
    for number, (message, state) in enumerate(bad.items()):
        folder = tmp_path / f"aux-{number}"
        folder.mkdir()
        torch.save(state, folder / "open_clip_pytorch_model.bin")
        with pytest.raises(UserError, match=message):
            load_mllm(source, parts={"vision-tower-aux": folder})
