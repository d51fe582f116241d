"""Plans for the published LLaVA-1.5 7B and 13B, LLaVA-Med v1.5 and llava-hf 7B, from headers alone.

Dimensions after the published config.json files of LLaMA-2 (7B, 13B), Mistral-7B and OpenAI's CLIP ViT-L/14, and what
their weight indexes have (`test_published_headers` reads those where they are at hand): LLaVA-1.5 is two .bin files,
with the rotary tables that transformers 4.31 saved; LLaVA-Med ends in a shard of ``lm_head`` alone and has no
``image_newline``; llava-hf's ``text_config`` leaves out what is LLaMA's default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest

from mgll_encoder import inspect_tower
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Plan
from mllm_adapters.core.registry import open_checkpoint
from mllm_adapters.swap.apply import bytes_linked
from mllm_adapters.swap.report import total_bytes
from tests.builders import sparse_checkpoint, sparse_shards
from tests.mllm_adapters.families.full_size import check_full_size, published_tower

Shapes = dict[str, tuple[int, ...]]

BLOCK = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
"""Weights of a block of CLIP ViT-L: four attention projections, two of the MLP, two normalizations."""


def clip_weights(positions: int) -> int:
    """Weights of CLIPVisionModel ViT-L/14 with so many positions, the class token among them."""
    return 1024 + 3 * 14 * 14 * 1024 + positions * 1024 + 24 * BLOCK + 4 * 1024


@dataclass(frozen=True)
class LanguageModel:
    """Dimensions of a LLaMA or Mistral, without bias."""

    width: int
    layers: int
    mlp: int
    keys: int
    vocabulary: int = 32000

    @property
    def weights(self) -> int:
        """Weights of the published model."""
        attention = 2 * self.width * self.width + 2 * self.width * self.keys
        block = attention + 3 * self.width * self.mlp + 2 * self.width
        return 2 * self.vocabulary * self.width + self.layers * block + self.width

    @property
    def projector(self) -> int:
        """Weights of the two layers that lead from CLIP ViT-L to it."""
        return 1024 * self.width + self.width + self.width * self.width + self.width

    def shapes(self, model: str, head: str) -> Shapes:
        """Tensor names and shapes, under the prefixes of the model and of its head."""
        shapes: Shapes = {f"{model}embed_tokens.weight": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            block: Shapes = {
                "self_attn.q_proj": (self.width, self.width), "self_attn.k_proj": (self.keys, self.width),
                "self_attn.v_proj": (self.keys, self.width), "self_attn.o_proj": (self.width, self.width),
                "mlp.gate_proj": (self.mlp, self.width), "mlp.up_proj": (self.mlp, self.width),
                "mlp.down_proj": (self.width, self.mlp), "input_layernorm": (self.width,),
                "post_attention_layernorm": (self.width,),
            }  # fmt: skip
            shapes |= {f"{model}layers.{layer}.{name}.weight": shape for name, shape in block.items()}
        return shapes | {
            f"{model}norm.weight": (self.width,),
            f"{head}.weight": (self.vocabulary, self.width),
        }

    def config(self) -> dict[str, Any]:
        """The flat part of a config.json."""
        return {
            "hidden_size": self.width, "num_hidden_layers": self.layers, "intermediate_size": self.mlp,
            "num_attention_heads": self.width // 128, "num_key_value_heads": self.keys // 128,
            "vocab_size": self.vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
            "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip


LLAMA_7B = LanguageModel(width=4096, layers=32, mlp=11008, keys=4096)
LLAMA_13B = LanguageModel(width=5120, layers=40, mlp=13824, keys=5120)
MISTRAL_7B = LanguageModel(width=4096, layers=32, mlp=14336, keys=1024)

LLAVA = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad",
}  # fmt: skip


def projector(width: int, prefix: str, first: str, second: str) -> Shapes:
    return {
        f"{prefix}{first}.weight": (width, 1024), f"{prefix}{first}.bias": (width,),
        f"{prefix}{second}.weight": (width, width), f"{prefix}{second}.bias": (width,),
    }  # fmt: skip


def clip(prefix: str) -> Shapes:
    """A 336 px tower under a prefix."""
    shapes: Shapes = {
        "embeddings.class_embedding": (1024,), "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "embeddings.position_embedding.weight": (577, 1024),
    }  # fmt: skip
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{name}.weight": (1024,), f"{name}.bias": (1024,)}
    for layer in range(24):
        linear = {f"self_attn.{n}": (1024, 1024) for n in ("q_proj", "k_proj", "v_proj", "out_proj")}
        linear |= {"mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}
        linear |= {"layer_norm1": (1024,), "layer_norm2": (1024,)}
        for name, shape in linear.items():
            stem = f"encoder.layers.{layer}.{name}"
            shapes |= {f"{stem}.weight": shape, f"{stem}.bias": shape[:1]}
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def sharded(folder: Path, config: Mapping[str, Any], shapes: Shapes, dtype: str, limit: float) -> Path:
    """A checkpoint of full size in shards of at most ``limit`` bytes, without its bytes."""
    shards, size = 1, 0
    numbers: dict[str, int] = {}
    for name, shape in shapes.items():
        weight = 2 * prod(shape)
        if size + weight > limit:
            shards, size = shards + 1, 0
        numbers[name] = shards
        size += weight
    weight_map = {name: f"model-{n:05d}-of-{shards:05d}.safetensors" for name, n in numbers.items()}
    tensors = {name: (dtype, shape) for name, shape in shapes.items()}
    return sparse_shards(folder, config, tensors, weight_map)


def original(folder: Path, lm: LanguageModel) -> Path:
    """As published: two .bin files, cut after three quarters of the layers, and rotary tables in float32."""
    config = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", **lm.config(), **LLAVA}
    shapes = lm.shapes("model.", "lm_head") | projector(lm.width, "model.mm_projector.", "0", "2")
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (64,) for layer in range(lm.layers)}
    tensors = {name: ("F16", shape) for name, shape in shapes.items()}
    tensors |= {name: ("F32", shape) for name, shape in tables.items()}
    first = ("model.embed_tokens.", *(f"model.layers.{layer}." for layer in range(lm.layers * 3 // 4)))
    weight_map = {
        name: f"pytorch_model-0000{1 if name.startswith(first) else 2}-of-00002.bin" for name in tensors
    }
    return sparse_shards(folder, config, tensors, weight_map)


def medical(folder: Path) -> Path:
    lm = MISTRAL_7B
    config = {
        "architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral", **lm.config(), **LLAVA,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None,
        "img_size": 640, "vision_backbone": "convnextlarge", "feature_outs": "encoder+decoder",
        "segtok_posembed": "sincos", "tokenizer_model_max_length": 2048, "mm_projector_lr": None,
    }  # fmt: skip
    shapes = lm.shapes("model.", "lm_head")
    head = {name: shapes.pop(name) for name in ("lm_head.weight",)}
    shapes |= clip("model.vision_tower.vision_tower.vision_model.")
    shapes |= projector(lm.width, "model.mm_projector.", "0", "2")
    return sharded(folder, config, shapes | head, "BF16", 5e9)


def converted(folder: Path) -> Path:
    """llava-hf/llava-1.5-7b-hf: 64 rows of vocabulary more, 336 px tower in the first shard."""
    lm = LanguageModel(**{**LLAMA_7B.__dict__, "vocabulary": 32064})
    text = {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    }  # fmt: skip
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text,
        "vision_config": vision, "image_token_index": 32000, "projector_hidden_act": "gelu",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "torch_dtype": "float16",
    }  # fmt: skip
    shapes = clip("vision_tower.vision_model.") | projector(
        lm.width, "multi_modal_projector.", "linear_1", "linear_2"
    )
    shapes |= lm.shapes("language_model.model.", "language_model.lm_head")
    return sharded(folder, config, shapes, "F16", 5e9)


def planned(source: Path, folder: Path, image_size: int | None = None) -> tuple[Plan, Checkpoint]:
    encoder = folder / "mgll"
    encoder = encoder if encoder.is_dir() else published_tower(encoder)
    checkpoint, family, _ = open_checkpoint(source)
    return family.plan(checkpoint, inspect_tower(encoder), image_size), checkpoint


@pytest.mark.parametrize(
    ("lm", "weights", "published"),
    [(LLAMA_7B, 7_063_427_072, 6_738_415_616), (LLAMA_13B, 13_351_494_656, 13_015_864_320)],
    ids=["7b", "13b"],
)
def test_llava_1_5(lm: LanguageModel, weights: int, published: int, tmp_path: Path) -> None:
    """The tower is no part of the shards; every key gets a new name, so nothing is linked; rotary tables go."""
    assert lm.weights == published
    rows = 2 * 64 * lm.width
    assert weights == lm.weights + rows + lm.projector + clip_weights(577), "the same, counted part by part"
    plan, checkpoint = planned(original(tmp_path / "source", lm), tmp_path)
    check_full_size(plan, checkpoint, weights=weights)
    assert {tensor.name.rpartition(".")[2] for tensor in plan.dropped} == {"inv_freq"}
    assert len(plan.dropped) == lm.layers
    assert total_bytes(plan) == 2 * weights
    assert bytes_linked(plan, checkpoint) == 0
    assert (plan.before.tokens, plan.after.tokens) == (576, 576)
    assert (plan.before.image_size, plan.after.image_size) == (336, 336)
    assert plan.image_token_id == 32000


def test_llava_1_5_at_mglls_own_size(tmp_path: Path) -> None:
    plan, checkpoint = planned(original(tmp_path / "source", LLAMA_7B), tmp_path, 224)
    assert (plan.before.tokens, plan.after.tokens) == (576, 256)
    check_full_size(plan, checkpoint, weights=7_063_427_072 - 320 * 1024)


def test_llava_1_5_converts_with_a_tower_given_as_a_part(tmp_path: Path) -> None:
    source, tower = original(tmp_path / "source", LLAMA_7B), published_tower(tmp_path / "clip", 336)
    checkpoint, family, _ = open_checkpoint(source, {"vision-tower": tower})
    plan = family.plan(checkpoint)
    check_full_size(plan, checkpoint, weights=7_063_427_072)
    assert (plan.tower, plan.after.tokens) == (tower, 576)


@pytest.mark.parametrize(("size", "tokens"), [(None, 576), (224, 256)])
def test_llava_med_1_5(size: int | None, tokens: int, tmp_path: Path) -> None:
    """Its shards hold a tower, which neither the original code nor the swap takes."""
    source = medical(tmp_path / "source")
    plan, checkpoint = planned(source, tmp_path, size)
    weights = MISTRAL_7B.weights + 2 * 64 * 4096 + MISTRAL_7B.projector + clip_weights(tokens + 1)
    assert MISTRAL_7B.weights == 7_241_732_096
    check_full_size(plan, checkpoint, weights=weights)
    assert total_bytes(plan) == 2 * weights
    assert {step.dtype for step in plan.steps} == {"bfloat16"}
    assert len(checkpoint.files) == 4
    assert [h.name for h in checkpoint.tensors.values() if h.file == checkpoint.files[-1]] == [
        "lm_head.weight"
    ]
    dropped = {tensor.name for tensor in plan.dropped}
    assert dropped == set(clip("model.vision_tower.vision_tower.vision_model."))
    assert (plan.before.tokens, plan.after.tokens) == (576, tokens)
    assert plan.config["text_config"]["rope_theta"] == 1e6


def test_the_separator_of_the_anyres_code_is_left_out(tmp_path: Path) -> None:
    """Fine-tunes saved by LLaVA's code of 2024 have one, which no image of one view reads."""
    shapes = {**LLAMA_7B.shapes("model.", "lm_head"), "model.image_newline": (4096,)}
    shapes |= projector(4096, "model.mm_projector.", "0", "2")
    config = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", **LLAMA_7B.config(), **LLAVA}
    plan, checkpoint = planned(sparse_checkpoint(tmp_path / "source", config, shapes), tmp_path)
    check_full_size(plan, checkpoint, weights=7_063_427_072)
    assert [tensor.name for tensor in plan.dropped] == ["model.image_newline"]


def test_llava_med_1_5_converts_by_itself(tmp_path: Path) -> None:
    checkpoint, family, _ = open_checkpoint(medical(tmp_path / "source"))
    plan = family.plan(checkpoint)
    weights = MISTRAL_7B.weights + 2 * 64 * 4096 + MISTRAL_7B.projector + clip_weights(577)
    check_full_size(plan, checkpoint, weights=weights)
    assert plan.tower is None
    assert any("the tower in the shards is used" in note for note in plan.notes)


@pytest.mark.parametrize(("size", "tokens"), [(None, 576), (224, 256)])
def test_llava_hf(size: int | None, tokens: int, tmp_path: Path) -> None:
    """Of three shards only the first holds the tower: the others are linked, and only that much is written."""
    plan, checkpoint = planned(converted(tmp_path / "source"), tmp_path, size)
    weights = 7_063_427_072 - (576 - tokens) * 1024
    check_full_size(plan, checkpoint, weights=weights)
    first = [h.name for h in checkpoint.tensors.values() if h.file.name.startswith("model-00001")]
    assert any(name.startswith("vision_tower") for name in first)
    assert len(checkpoint.files) == 3
    written = total_bytes(plan) - bytes_linked(plan, checkpoint)
    kept = sum(2 * prod(step.shape) for step in plan.steps if step.name in first and step.operation == "keep")
    assert written == kept + 2 * clip_weights(tokens + 1)
    assert written < 5.0e9 < 9.1e9 < bytes_linked(plan, checkpoint)
    assert (plan.before.tokens, plan.after.tokens) == (576, tokens)
