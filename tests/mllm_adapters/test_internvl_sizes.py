"""InternVL at full size, by headers alone; and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import (
    BadDataError,
    IncompatibleTowerError,
    UnknownNameError,
    UnsupportedCheckpointError,
    UserError,
)
from mllm_adapters import load_mllm
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Plan, Target
from mllm_adapters.core.fates import Kept, Reinitialized
from mllm_adapters.core.registry import detect, family, open_checkpoint
from tests import builders
from tests.mllm_adapters.families.full_size import check_full_size, published_tower
from tests.mllm_adapters.families.internvl import CHAT_V1_2, INTERNVL2_5_8B, INTERNVL3_8B, Published
from tests.mllm_adapters.families.internvl_folders import edited, talking
from tests.mllm_adapters.llava_checkpoints import original_llava

CLIP_448 = 303_966_208
"""Weights of CLIP ViT-L/14 at 448 px without its projection: 24 x 12_596_224 in blocks, 1_656_832 outside."""

INTERNLM2_7B = 2 * 92553 * 4096 + 32 * 218_112_000 + 4096
QWEN2_5_7B = 2 * 151674 * 3584 + 28 * 233_057_792 + 3584
YI_34B = 2 * 64000 * 7168 + 60 * 557_856_768 + 7168


def projector(read: int, width: int) -> int:
    """Weights of normalization, first and second layer."""
    return 2 * read + (read + 1) * width + (width + 1) * width


def written(published: Published, folder: Path, shards: int = 1) -> Checkpoint:
    """Its headers, in one file or in several: no machine need map 80 GB at once."""
    names = list(published.tensors().items())
    weight_map = {}
    for shard in range(shards):
        part = dict(names[shard::shards])
        builders.sparse_checkpoint(folder, published.config(), part, "BF16")
        if shards > 1:
            (folder / "model.safetensors").rename(folder / f"model-{shard}.safetensors")
            weight_map |= dict.fromkeys(part, f"model-{shard}.safetensors")
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return open_checkpoint(folder)[0]


def test_internvl_2_5_8b_is_converted_whole(tmp_path: Path) -> None:
    checkpoint = written(INTERNVL2_5_8B, tmp_path)
    plan = family("internvl").plan(checkpoint)
    new_rows = 2 * (92608 - 92553) * 4096
    check_full_size(plan, checkpoint, weights=304_012_288 + projector(4096, 4096) + INTERNLM2_7B + new_rows)
    assert plan.config["text_config"]["rope_parameters"]["rope_theta"] == 1e6
    assert plan.before == plan.after
    assert (plan.before.tokens, plan.before.tiles) == (256, 13)


@pytest.mark.parametrize(
    ("target", "size", "tokens"),
    [
        ("own", None, 256), ("own", 224, 64), ("own", 336, 144), ("own", 448, 256),
        ("llava", None, 256), ("llava", 336, 576),
    ],
)  # fmt: skip
def test_tokens_per_image(target: Target, size: int | None, tokens: int, tmp_path: Path) -> None:
    checkpoint = written(INTERNVL2_5_8B, tmp_path / "host")
    tower = inspect_tower(published_tower(tmp_path / "tower"))
    plan = family("internvl").plan(checkpoint, tower, size, target)
    assert plan.after.tokens == plan.config["image_seq_length"] == tokens
    assert plan.after.image_size == (size or {"own": 448, "llava": 224}[target])
    assert plan.after.tiles == 1
    assert any("13 tiles" in note for note in plan.notes)


def swapped(published: Published, folder: Path, shards: int = 1) -> tuple[Plan, Checkpoint]:
    checkpoint = written(published, folder / "host", shards)
    return family("internvl").plan(checkpoint, inspect_tower(published_tower(folder / "tower"))), checkpoint


def test_internvl_2_5_8b_takes_the_tower_and_keeps_its_projector(tmp_path: Path) -> None:
    plan, checkpoint = swapped(INTERNVL2_5_8B, tmp_path)
    new_rows = 2 * (92608 - 92553) * 4096
    check_full_size(plan, checkpoint, weights=CLIP_448 + projector(4096, 4096) + INTERNLM2_7B + new_rows)
    assert set(plan.connectors.values()) == {Kept(width=1024)}


def test_internvl_3_8b_takes_the_tower_too(tmp_path: Path) -> None:
    plan, checkpoint = swapped(INTERNVL3_8B, tmp_path)
    rows = plan.config["text_config"]["vocab_size"]
    assert rows == 151680
    new_rows = 2 * (rows - 151674) * 3584
    check_full_size(plan, checkpoint, weights=CLIP_448 + projector(4096, 3584) + QWEN2_5_7B + new_rows)


def test_chat_v1_2_gives_up_6b_of_tower_and_gets_a_new_first_layer(tmp_path: Path) -> None:
    plan, checkpoint = swapped(CHAT_V1_2, tmp_path, shards=16)
    new_rows = 2 * 64 * 7168
    check_full_size(plan, checkpoint, weights=CLIP_448 + projector(4096, 7168) + YI_34B + new_rows)
    assert set(plan.connectors.values()) == {Reinitialized(before=3200, after=1024)}
    assert plan.config["ps_version"] == "v1"


def test_an_8b_llava_reads_single_patches(tmp_path: Path) -> None:
    checkpoint = written(INTERNVL2_5_8B, tmp_path / "host")
    tower = inspect_tower(published_tower(tmp_path / "tower"))
    plan = family("internvl").plan(checkpoint, tower, None, "llava")
    fewer_positions = (1024 - 256) * 1024
    mlp = (1024 + 1) * 4096 + (4096 + 1) * 4096
    new_rows = 2 * (92608 - 92553) * 4096
    check_full_size(plan, checkpoint, weights=CLIP_448 - fewer_positions + mlp + INTERNLM2_7B + new_rows)


def test_chat_v1_0_is_a_llava_and_swapped_as_one(golden: Path, tmp_path: Path) -> None:
    """Its code base is LLaVA's; the tower that it names need not be at hand to be replaced."""
    source = original_llava(golden, "llava", tmp_path / "host", safetensors=True)
    state = load_file(source / "model.safetensors")
    rows = len(state["model.mm_projector.0.bias"])
    rewritten(source, lambda s: s.update({"model.mm_projector.0.weight": torch.ones(rows, 3200)}))
    config = json.loads((source / "config.json").read_text())
    config |= {"mm_vision_tower": "OpenGVLab/InternViT-6B-224px", "mm_vision_select_layer": -4}
    (source / "config.json").write_text(json.dumps(config))
    checkpoint, llava, _ = open_checkpoint(source)
    plan = llava.plan(checkpoint, inspect_tower(published_tower(tmp_path / "tower")))
    assert (plan.family, plan.before.width, plan.after.tokens) == ("llava", 3200, 256)
    assert plan.connectors["multi_modal_projector.linear_1"] == Reinitialized(before=3200, after=1024)


# --- refused ----------------------------------------------------------------------------------------------


def test_an_image_size_with_an_odd_grid_is_refused(golden: Path, tmp_path: Path) -> None:
    checkpoint, internvl, _ = open_checkpoint(golden / "internvl_qwen2" / "checkpoint")
    with pytest.raises(
        IncompatibleTowerError,
        match=r"`image_size=42` is not a multiple of the tower's patch size 14 times 2: try",
    ):
        internvl.plan(checkpoint, inspect_tower(published_tower(tmp_path)), 42)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["llm_config"].update(architectures=["Phi3ForCausalLM"]),
            "the language model is Phi3ForCausalLM",
        ),
        (lambda c: c.update(use_llm_lora=16), "use_llm_lora is 16"),
        (lambda c: c.update(quantization_config={"quant_method": "awq"}), "use the unquantized checkpoint"),
        (
            lambda c: c["llm_config"].update(quantization_config={"bits": 4}),
            "use the unquantized checkpoint",
        ),
        (lambda c: c["vision_config"].update(hidden_act="quick_gelu"), "hidden_act is 'quick_gelu'"),
        (
            lambda c: c["vision_config"].update(num_attention_heads=1 + c["vision_config"]["hidden_size"]),
            "cannot be divided among",
        ),
        (lambda c: c["vision_config"].update(qk_normalization=True, layer_norm_eps=1e-5), "layer_norm_eps"),
        (lambda c: c.update(downsample_ratio=0.3), r"downsample_ratio 0\.3 does not divide"),
        (lambda c: c.update(ps_version="v3"), "ps_version is 'v3'"),
        (lambda c: c.pop("vision_config"), "vision_config is missing"),
        (lambda c: c.update(audio_config={}), r"InternOmni.*take a chat model, such as OpenGVLab"),
    ],
)
def test_what_is_close_but_another_variant_is_refused_by_name(
    change: Callable[[dict[str, Any]], Any], message: str, golden: Path, tmp_path: Path
) -> None:
    source = edited(golden / "internvl_qwen2" / "checkpoint", tmp_path / "odd", change)
    with pytest.raises(UserError, match=message) as refusal:
        load_mllm(source)
    assert "config.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "intern_vit_6b", "architectures": ["InternVisionModel"]}, "vision tower alone"),
        (
            {"model_type": "internvl", "architectures": ["InternVLModel"], "qllama_config": {}},
            "not a chat model",
        ),
    ],
)
def test_relatives_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=message):
        detect(config, "config.json")


def rewritten(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mlp1.1.weight"), "linear_1.weight is missing: is the checkpoint complete"),
        (lambda s: s.pop("language_model.model.embed_tokens.weight"), "embed_tokens.weight is missing"),
        (lambda s: s.pop("language_model.lm_head.weight"), "1 missing tensors, first lm_head.weight"),
        (lambda s: s.pop("vision_model.encoder.layers.0.attn.qkv.weight"), "3 missing tensors"),
        (lambda s: s.update(qllama=torch.ones(2)), "tensor qllama is not part of an InternVL-Chat"),
        (lambda s: s.update({"language_model.base_model.x.lora_A.weight": torch.ones(2)}), "merge them"),
        (
            lambda s: s.update({"vision_model.encoder.layers.0.attn.qkv.weight": torch.ones(7, 4)}),
            "has 7 rows",
        ),
    ],
)
def test_incomplete_weights_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, golden: Path, tmp_path: Path
) -> None:
    source = rewritten(talking(golden, "qwen2", tmp_path / "source"), change)
    with pytest.raises(UserError, match=message):
        load_mllm(source)


def test_a_tokenizer_without_the_placeholder_is_refused(golden: Path, tmp_path: Path) -> None:
    source = talking(golden, "qwen2", tmp_path / "source")
    for name in ("tokenizer_config.json", "added_tokens.json"):
        file = source / name
        file.write_text(file.read_text().replace("<IMG_CONTEXT>", "<OTHER>"))
    with pytest.raises(
        BadDataError, match=r"<IMG_CONTEXT> needs one of the .* but the tokenizer does not have it"
    ):
        load_mllm(source)


def test_a_tokenizer_longer_than_the_embedding_is_refused(golden: Path, tmp_path: Path) -> None:
    source = talking(golden, "qwen2", tmp_path / "source")

    def shorten(state: dict[str, torch.Tensor]) -> None:
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            state[name] = state[name][:200].clone()

    with pytest.raises(
        BadDataError, match="needs one of the 200 rows of the embedding, but the tokenizer gives it the id"
    ):
        load_mllm(rewritten(source, shorten))


def test_an_unknown_conversation_format_is_refused_with_the_nearest(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'internvl2_5'"):
        load_mllm(talking(golden, "qwen2", tmp_path / "source", template="internvl2.5"))


def test_internlm2_ids_that_cannot_be_kept_are_refused(golden: Path, tmp_path: Path) -> None:
    source = talking(golden, "internlm2", tmp_path / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    added = settings["added_tokens_decoder"]
    last = max(added, key=int)
    added[str(int(last) + 1)] = added.pop(last)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        BadDataError, match=r"token <IMG_CONTEXT> should have the id .*download the tokenizer files again"
    ):
        load_mllm(source)


def test_there_is_nothing_to_convert_in_the_transformers_layout(golden: Path, tmp_path: Path) -> None:
    model, _ = load_mllm(golden / "internvl_qwen2" / "checkpoint")
    model.save_pretrained(tmp_path / "saved")
    checkpoint, internvl, layout = open_checkpoint(tmp_path / "saved")
    assert layout == "transformers"
    with pytest.raises(UnsupportedCheckpointError, match="nothing to convert"):
        internvl.plan(checkpoint)
