"""The published InstructBLIPs, from their headers alone."""

from pathlib import Path
from typing import Any

import pytest

from mgll_encoder import inspect_tower
from mgll_encoder.common.errors import NotFoundError
from mllm_adapters.core.registry import open_checkpoint
from tests import builders
from tests.mllm_adapters.families.full_size import check_full_size, published_tower

VICUNA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32001, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
FLAN_T5_XL = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 2048, "d_ff": 5120, "d_kv": 64,
    "num_heads": 32, "num_layers": 24, "num_decoder_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip


def qformer_weights(reads: int, width: int = 768, inner: int = 3072, words: int = 30523) -> int:
    """BERT-base with two feed-forward branches and cross-attention in every other layer, counted by hand."""
    norm, square = 2 * width, width * (width + 1)
    attention = 4 * square + norm
    crossing = 2 * square + 2 * width * (reads + 1) + norm
    branch = width * inner + inner + inner * width + width + norm
    return (words + 512) * width + norm + 12 * (attention + 2 * branch) + 6 * crossing


def eva_weights(width: int = 1408, inner: int = 6144, depth: int = 39) -> int:
    norm = 2 * width
    block = 2 * norm + 3 * width * (width + 1) + width * (width + 1) + 2 * width * inner + inner + width
    return width + 257 * width + width * (3 * 14 * 14 + 1) + depth * block + norm


def clip_weights(width: int = 1024, inner: int = 4096, depth: int = 24) -> int:
    norm = 2 * width
    block = 2 * norm + 4 * width * (width + 1) + 2 * width * inner + inner + width
    return width + 257 * width + width * 3 * 14 * 14 + depth * block + 2 * norm


def llama_weights(rows: int, width: int = 4096, inner: int = 11008, depth: int = 32) -> int:
    return 2 * rows * width + depth * (4 * width**2 + 3 * width * inner + 2 * width) + width


def t5_weights(rows: int, width: int = 2048, inner: int = 5120, depth: int = 24) -> int:
    attention, feed_forward = 4 * width**2, 3 * width * inner
    encoder = depth * (attention + feed_forward + 2 * width)
    decoder = depth * (2 * attention + feed_forward + 3 * width)
    return 2 * rows * width + encoder + decoder + 2 * width + 2 * 32 * 32


def published_instructblip(folder: Path, text: dict[str, Any], **more: Any) -> Path:
    """The headers of a published checkpoint, its own key list included."""
    config = {
        "architectures": ["InstructBlipForConditionalGeneration"], "model_type": "instructblip", "num_query_tokens": 32,
        "text_config": text, "vision_config": {"model_type": "instructblip_vision_model"},
        "qformer_config": {"model_type": "instructblip_qformer", "vocab_size": 30523}, "dtype": "float32",
        "tie_word_embeddings": False, **more,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "query_tokens": (1, 32, 768),
        "language_projection.weight": (text.get("hidden_size", text.get("d_model")), 768),
        "language_projection.bias": (text.get("hidden_size", text.get("d_model")),),
    }
    shapes |= {f"vision_model.{name}": shape for name, shape in eva_shapes().items()}
    shapes |= {f"qformer.{name}": shape for name, shape in qformer_shapes().items()}
    shapes |= {f"language_model.{name}": shape for name, shape in text_shapes(text).items()}
    return builders.sparse_checkpoint(folder, config, shapes)


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def eva_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, 1408), "embeddings.position_embedding": (1, 257, 1408),
        "embeddings.patch_embedding.weight": (1408, 3, 14, 14), "embeddings.patch_embedding.bias": (1408,),
    }  # fmt: skip
    for layer in range(39):
        at = f"encoder.layers.{layer}"
        shapes |= linear(f"{at}.self_attn.qkv", 4224, 1408) | linear(f"{at}.self_attn.projection", 1408, 1408)
        shapes |= norm(f"{at}.layer_norm1", 1408) | norm(f"{at}.layer_norm2", 1408)
        shapes |= linear(f"{at}.mlp.fc1", 6144, 1408) | linear(f"{at}.mlp.fc2", 1408, 6144)
    return shapes | norm("post_layernorm", 1408)


def qformer_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (30523, 768), "embeddings.position_embeddings.weight": (512, 768),
        **norm("embeddings.layernorm", 768),
    }  # fmt: skip
    for layer in range(12):
        at = f"encoder.layer.{layer}"
        for kind, reads in (("attention", 768), ("crossattention", 1408))[: 2 - layer % 2]:
            inner = f"{at}.{kind}.attention"
            shapes |= linear(f"{inner}.query", 768, 768)
            shapes |= linear(f"{inner}.key", 768, reads) | linear(f"{inner}.value", 768, reads)
            shapes |= linear(f"{at}.{kind}.output.dense", 768, 768) | norm(
                f"{at}.{kind}.output.LayerNorm", 768
            )
        for branch in ("", "_query"):
            shapes |= linear(f"{at}.intermediate{branch}.dense", 3072, 768)
            shapes |= linear(f"{at}.output{branch}.dense", 768, 3072) | norm(
                f"{at}.output{branch}.LayerNorm", 768
            )
    return shapes


def text_shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Key lists of LlamaForCausalLM and T5ForConditionalGeneration as saved by transformers 4.31."""
    if text["model_type"] == "llama":
        wide, inner, rows = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (rows, wide),
            "lm_head.weight": (rows, wide),
        }
        for layer in range(text["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            shapes |= {f"{at}.self_attn.{p}_proj.weight": (wide, wide) for p in "qkvo"}
            shapes |= {f"{at}.mlp.{p}_proj.weight": (inner, wide) for p in ("gate", "up")}
            shapes[f"{at}.mlp.down_proj.weight"] = (wide, inner)
            shapes |= {f"{at}.{p}_layernorm.weight": (wide,) for p in ("input", "post_attention")}
        return {**shapes, "model.norm.weight": (wide,)}
    wide, inner, rows, heads = text["d_model"], text["d_ff"], text["vocab_size"], text["num_heads"]
    shapes = {"shared.weight": (rows, wide), "lm_head.weight": (rows, wide)}
    for stack, attentions in (
        ("encoder", ("SelfAttention",)),
        ("decoder", ("SelfAttention", "EncDecAttention")),
    ):
        for block in range(text["num_layers"]):
            at = f"{stack}.block.{block}.layer"
            for number, kind in enumerate(attentions):
                shapes |= {f"{at}.{number}.{kind}.{p}.weight": (wide, wide) for p in "qkvo"}
                shapes[f"{at}.{number}.layer_norm.weight"] = (wide,)
            last = f"{at}.{len(attentions)}"
            shapes |= {f"{last}.DenseReluDense.wi_{n}.weight": (inner, wide) for n in (0, 1)}
            shapes |= {
                f"{last}.DenseReluDense.wo.weight": (wide, inner),
                f"{last}.layer_norm.weight": (wide,),
            }
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, heads)
        shapes[f"{stack}.final_layer_norm.weight"] = (wide,)
    return shapes


@pytest.mark.parametrize(
    ("text", "placeholder", "rows", "language"),
    [(VICUNA, None, 32064, llama_weights), (FLAN_T5_XL, 32100, 32128, t5_weights)],
    ids=["vicuna-7b", "flan-t5-xl"],
)
def test_the_published_checkpoint_is_covered_tensor_by_tensor(
    text: dict[str, Any], placeholder: int | None, rows: int, language: Any, tmp_path: Path
) -> None:
    more = {} if placeholder is None else {"image_token_index": placeholder}
    checkpoint, family, _ = open_checkpoint(published_instructblip(tmp_path / "host", text, **more))
    wide = text.get("hidden_size", text.get("d_model"))
    rest = language(rows) + 32 * 768 + wide * 769
    kept_whole = family.plan(checkpoint)
    check_full_size(kept_whole, checkpoint, weights=rest + eva_weights() + qformer_weights(1408))
    tower = inspect_tower(published_tower(tmp_path / "tower"))
    plan = family.plan(checkpoint, tower)
    check_full_size(plan, checkpoint, weights=rest + clip_weights() + qformer_weights(1024) + 2 * 1024)
    assert plan.after.image_size == 224
    made_anew = [step for step in plan.steps if step.operation == "reinit"]
    assert [step.shape for step in made_anew] == [(768, 1024)] * 12
    assert len(plan.connectors) == 13
    for size in (224, 336, 448):
        assert family.plan(checkpoint, tower, size).after.tokens == 32


def test_the_published_lavis_files_are_covered_tensor_by_tensor(tmp_path: Path) -> None:
    back = {
        "vision_model.post_layernorm.": "ln_vision.",
        "qformer.embeddings.layernorm": "Qformer.bert.embeddings.LayerNorm",
        "attention.attention.": "attention.self.", "language_projection": "llm_proj", "qformer.": "Qformer.bert.",
    }  # fmt: skip
    named = {
        "query_tokens": (1, 32, 768), **linear("language_projection", 4096, 768),
        **norm("vision_model.post_layernorm", 1408),
        **{f"qformer.{name}": shape for name, shape in qformer_shapes().items()},
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in named.items():
        for new, old in back.items():
            name = name.replace(new, old)
        shapes[name] = shape
    builders.sparse_checkpoint(tmp_path / "lavis", {}, shapes, "F32")
    (tmp_path / "lavis" / "config.json").unlink()
    (tmp_path / "lavis" / "model.safetensors").rename(
        tmp_path / "lavis" / "instruct_blip_vicuna7b_trimmed.safetensors"
    )
    builders.sparse_checkpoint(
        tmp_path / "lavis" / "vicuna-7b",
        {**VICUNA, "vocab_size": 32000},
        text_shapes({**VICUNA, "vocab_size": 32000}),
    )
    tower = inspect_tower(published_tower(tmp_path / "tower"))
    checkpoint, family, layout = open_checkpoint(tmp_path / "lavis")
    plan = family.plan(checkpoint, tower)
    assert layout == "lavis"
    rest = llama_weights(32064) + 32 * 768 + 4096 * 769
    check_full_size(plan, checkpoint, weights=rest + clip_weights() + qformer_weights(1024) + 2 * 1024)
    assert (plan.before.image_size, plan.before.width, plan.after.tokens) == (224, 1408, 32)
    with pytest.raises(
        NotFoundError, match=r"eva_vit_g.pth is neither in it nor next to it.*`parts\['vision-tower'\]=PATH`"
    ):
        family.plan(checkpoint)
    eva: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 1408), "pos_embed": (1, 257, 1408), "patch_embed.proj.weight": (1408, 3, 14, 14),
        "patch_embed.proj.bias": (1408,), **norm("norm", 1408), **linear("head", 1000, 1408),
    }  # fmt: skip
    for block in range(40):
        at = f"blocks.{block}"
        eva |= {
            f"{at}.attn.q_bias": (1408,),
            f"{at}.attn.v_bias": (1408,),
            f"{at}.attn.qkv.weight": (4224, 1408),
        }
        eva |= linear(f"{at}.attn.proj", 1408, 1408) | norm(f"{at}.norm1", 1408) | norm(f"{at}.norm2", 1408)
        eva |= linear(f"{at}.mlp.fc1", 6144, 1408) | linear(f"{at}.mlp.fc2", 1408, 6144)
    builders.sparse_checkpoint(tmp_path / "eva", {}, eva)
    (tmp_path / "eva" / "model.safetensors").rename(tmp_path / "lavis" / "eva_vit_g.safetensors")
    checkpoint, family, _ = open_checkpoint(tmp_path / "lavis")
    plan = family.plan(checkpoint)
    check_full_size(plan, checkpoint, weights=rest + eva_weights() + qformer_weights(1408))
    assert plan.config["vision_config"]["num_attention_heads"] == 16
    assert plan.config["qformer_config"]["num_attention_heads"] == 12
