"""What is special about InternVL's tower and projector: pixel shuffle, sizes, widths, layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

import mllm_adapters.auto  # noqa: F401
from mgll_encoder.common.errors import InvalidArgumentError
from mgll_encoder.tower.preprocess import image_processor
from mllm_adapters import load_mllm
from mllm_adapters.core.fates import Reinitialized
from mllm_adapters.core.registry import open_checkpoint
from tests.mllm_adapters.families.internvl_folders import edited, swap, talking
from tests.mllm_adapters.llava_checkpoints import a_tower


@torch.no_grad()
def test_the_first_releases_see_their_tokens_column_by_column(golden: Path, tmp_path: Path) -> None:
    """``ps_version`` v1: the same tokens in transposed order, before and after a swap."""
    source = golden / "internvl" / "checkpoint"
    expected = load_file(golden / "internvl" / "expected.safetensors")
    grid = int(expected["visual_tokens"].shape[1] ** 0.5)
    about = json.loads((source / "config.json").read_text())
    turn = {"v1": "v2", "v2": "v1"}[about["ps_version"]]
    other = edited(source, tmp_path / "other", lambda c: c.update(ps_version=turn, pad2square=False))
    model, _ = load_mllm(other, dtype=torch.float32)
    assert model.config.model_type == {"v1": "mgll_internvl", "v2": "internvl"}[turn]
    found = model.get_image_features(expected["pixel_values"]).pooler_output
    turned = expected["visual_tokens"].unflatten(1, (grid, grid)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(found, turned, atol=1e-4, rtol=0)
    assert (found - expected["visual_tokens"]).abs().max() > 1e-3, "negative control: the order matters"

    plan = swap(
        edited(source, tmp_path / "v1", lambda c: c.update(ps_version="v1")),
        tmp_path / "swapped",
        a_tower(tmp_path / "tower"),
    )
    assert plan.config["ps_version"] == "v1"
    assert any("column by column" in note for note in plan.notes)
    silent = edited(source, tmp_path / "silent", lambda c: c.pop("ps_version"))
    assert load_mllm(silent)[0].config.ps_version == "v1", "the original code's default"


@torch.no_grad()
def test_another_input_size_resamples_the_position_table(golden: Path, tmp_path: Path) -> None:
    """As the original does at run time; here, the stock model's own interpolation is the reference."""
    source = golden / "internvl_qwen2" / "checkpoint"
    vision = json.loads((source / "config.json").read_text())["vision_config"]
    size = 2 * vision["image_size"]
    model, _ = load_mllm(
        edited(source, tmp_path / "big", lambda c: c.update(force_image_size=size)), dtype=torch.float32
    )
    native, _ = load_mllm(
        edited(source, tmp_path / "same", lambda c: c.update(force_image_size=None)), dtype=torch.float32
    )
    assert model.config.image_seq_length == 4 * native.config.image_seq_length
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    found, expected = (m.model.vision_tower(pixels).last_hidden_state for m in (model, native))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_tower_of_another_width_gets_a_new_norm_and_first_layer(golden: Path, tmp_path: Path) -> None:
    """As with InternViT-6B: 4 x 3200 -> 4 x 1024; the second layer stays."""
    source = golden / "internvl" / "checkpoint"
    tower = a_tower(tmp_path / "tower", width=24)
    plan = swap(source, tmp_path / "swapped", tower)
    fates = {name.rpartition(".")[2]: fate for name, fate in plan.connectors.items()}
    assert fates.keys() == {"layer_norm", "linear_1"}
    assert set(fates.values()) == {Reinitialized(before=plan.before.width, after=plan.after.width)}
    model, _ = load_mllm(tmp_path / "swapped", dtype=torch.float32)
    projector, (checkpoint, _, _) = model.model.multi_modal_projector, open_checkpoint(source)
    assert torch.equal(projector.layer_norm.weight, torch.ones(4 * 24))
    assert not projector.linear_1.bias.any()
    assert projector.linear_1.weight.std() > 0
    assert torch.equal(projector.linear_2.weight, checkpoint.read("mlp1.3.weight").float())


@torch.no_grad()
def test_the_swapped_model_is_tower_then_shuffle_then_projector(golden: Path, tmp_path: Path) -> None:
    source = edited(
        golden / "internvl_qwen2" / "checkpoint", tmp_path / "v2", lambda c: c.update(ps_version="v2")
    )
    swap(source, tmp_path / "swapped", a_tower(tmp_path / "tower"))
    model, _ = load_mllm(tmp_path / "swapped", dtype=torch.float32)
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    grid = side // model.config.vision_config.patch_size
    rows = seen.unflatten(1, (grid // 2, 2, grid // 2, 2))  # [1, row, down, column, right, C]
    joined = rows.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
    checkpoint, _, _ = open_checkpoint(source)
    projector = {k: checkpoint.read(k) for k in checkpoint.tensors if k.startswith("mlp1.")}
    inner = torch.nn.functional.layer_norm(
        joined, joined.shape[-1:], projector["mlp1.0.weight"], projector["mlp1.0.bias"]
    )
    inner = torch.nn.functional.gelu(inner @ projector["mlp1.1.weight"].T + projector["mlp1.1.bias"])
    expected = inner @ projector["mlp1.3.weight"].T + projector["mlp1.3.bias"]
    found = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_converted_checkpoint_takes_the_tower_as_the_original_does(golden: Path, tmp_path: Path) -> None:
    """What the hub calls ``-hf``: read as it is, swapped to the very same model."""
    original, tower = golden / "internvl_internlm2" / "checkpoint", a_tower(tmp_path / "tower")
    source = edited(original, tmp_path / "v2", lambda c: c.update(ps_version="v2", pad2square=False))
    swap(source, tmp_path / "converted", None)
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["model_type"] == "internvl"
    assert config["tie_word_embeddings"] is False, "the stock class would tie them by default"
    plans = [swap(source, tmp_path / "direct", tower), swap(tmp_path / "converted", tmp_path / "via", tower)]
    states = [load_mllm(tmp_path / name, dtype=torch.float32)[0].state_dict() for name in ("direct", "via")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert plans[0].after == plans[1].after


@torch.no_grad()
@pytest.mark.parametrize(("kind", "tied"), [(Qwen3Config, False), (Qwen2Config, True), (LlamaConfig, False)])
def test_other_language_models_keep_their_logits(
    kind: type[Any], tied: bool, golden: Path, tmp_path: Path
) -> None:
    """Qwen3 (InternVL 3.5), a tied Qwen2, and a LLaMA with biases; no golden vectors exist for these."""
    checkpoint, _, _ = open_checkpoint(golden / "internvl_qwen2" / "checkpoint")
    width = checkpoint.tensors["mlp1.3.weight"].shape[0]
    text = kind(
        vocab_size=90, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=width // 4, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        **({"attention_bias": True} if kind is LlamaConfig else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(text).eval()
    state = {n: checkpoint.read(n) for n in checkpoint.tensors if not n.startswith("language_model.")}
    state |= {f"language_model.{n}": value.clone() for n, value in language_model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    llm = {**text.to_dict(), "rope_theta": 5e5, "architectures": [type(language_model).__name__]}
    llm = {name: value for name, value in llm.items() if name != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps({**checkpoint.config, "llm_config": llm}))
    model, _ = load_mllm(tmp_path, dtype=torch.float32)
    ids = torch.arange(5, 30)[None]
    found = model(input_ids=ids).logits[..., :90]
    torch.testing.assert_close(found, language_model(input_ids=ids).logits, atol=1e-5, rtol=0)
    tower = a_tower(tmp_path / "tower")
    swap(tmp_path, tmp_path / "swapped", tower)
    after, _ = load_mllm(tmp_path / "swapped", dtype=torch.float32)
    assert (after.lm_head.weight is after.get_input_embeddings().weight) == tied
    torch.testing.assert_close(after(input_ids=ids).logits[..., :90], found, atol=1e-5, rtol=0)


def test_a_llava_has_as_many_tokens_and_says_that_its_projector_is_new(golden: Path, tmp_path: Path) -> None:
    source = golden / "internvl_qwen2" / "checkpoint"
    plan = swap(source, tmp_path / "llava", a_tower(tmp_path / "tower"), "llava")
    assert plan.after.tokens == plan.before.tokens
    assert plan.after.image_size == int(plan.before.tokens**0.5) * plan.after.patch_size
    fate = plan.connectors["multi_modal_projector.linear_1"]
    assert fate == Reinitialized(before=plan.before.width, after=plan.after.width, because="patches")
    checkpoint, family, _ = open_checkpoint(source)
    with pytest.raises(InvalidArgumentError, match="a LLaVA has a CLIP tower"):
        family.plan(checkpoint, target="llava")


@pytest.mark.parametrize("rule", ["crop", "pad"])
def test_a_tower_that_crops_or_pads_brings_its_image_processor(
    rule: str, golden: Path, tmp_path: Path
) -> None:
    source = talking(golden, "qwen2", tmp_path / "original")
    plan = swap(source, tmp_path / "swapped", a_tower(tmp_path / "tower", resize=rule))
    processor = AutoProcessor.from_pretrained(tmp_path / "swapped")
    photo = Image.effect_noise((80, 50), 60).convert("RGB")
    batch = processor(text=["<IMG_CONTEXT>"], images=[photo], return_tensors="pt")
    expected = image_processor(plan.after)(photo, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert (batch["input_ids"] == plan.image_token_id).sum() == plan.after.tokens
