"""Qwen-VL of 2023."""

import json
from base64 import b64encode
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mllm_adapters.core.contract import Plan
from tests.mllm_adapters.families.case import Case, Golden


def features(model: Any, golden: Golden) -> Tensor:
    return model.get_image_features(golden.expected["pixel_values"]).last_hidden_state


def tokens(model: Any, golden: Golden) -> Tensor:
    return model.get_image_features(golden.expected["pixel_values"]).pooler_output


def inputs(model: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    """The original writes the bytes of a file name between <img> and </img>, and then overwrites them."""
    ids = golden.expected[f"{sequence}.input_ids"].clone()
    ids[0, golden.expected[f"{sequence}.image_positions"]] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": golden.pixels(sequence)}


def logits(found: Tensor, golden: Golden, sequence: str) -> tuple[Tensor, Tensor]:
    """The golden file holds the logits of some positions only."""
    expected = golden.expected[f"{sequence}.logits"]
    return found[:, golden.expected[f"{sequence}.kept_positions"]], expected


def prompt(plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
    """<img>, the placeholders, </img>, and some text around them."""
    start = plan.image_token_id - 2
    ids = [[1, start, *[plan.image_token_id] * plan.after.tokens, start + 1, 7, 9]]
    given = torch.tensor(ids)
    return {"input_ids": given, "attention_mask": torch.ones_like(given), "pixel_values": pixels}


def tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("vision_tower")


CASES = (
    Case(
        name="qwen_vl", golden="qwen_vl", features=features, tokens=tokens, inputs=inputs, logits=logits,
        tower=tower, prompt=prompt,
    ),
)  # fmt: skip


CHAT_CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": True,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": False,
    "use_logn_attn": True,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
    "vocab_size": 151936,
}
"""config.json of Qwen/Qwen-VL-Chat."""


def published_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of Qwen-VL, as its index file and its code have them."""
    visual, wide, vocabulary = config["visual"], config["hidden_size"], config["vocab_size"]
    half, width, tokens = config["intermediate_size"] // 2, visual["width"], visual.get("n_queries", 256)
    inner, side = int(width * visual["mlp_ratio"]), visual["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocabulary, wide)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "ln_1.weight": (wide,), "attn.c_attn.weight": (3 * wide, wide), "attn.c_attn.bias": (3 * wide,),
            "attn.c_proj.weight": (wide, wide), "ln_2.weight": (wide,), "mlp.w1.weight": (half, wide),
            "mlp.w2.weight": (half, wide), "mlp.c_proj.weight": (wide, half),
        }  # fmt: skip
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= {"transformer.ln_f.weight": (wide,), "lm_head.weight": (vocabulary, wide)}
    seeing: dict[str, tuple[int, ...]] = {
        "positional_embedding": (256, width), "proj": (wide, wide), "conv1.weight": (width, 3, side, side),
        "ln_pre.weight": (width,), "ln_pre.bias": (width,),
    }  # fmt: skip
    for i in range(visual["layers"]):
        block = {
            "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
            "attn.in_proj.weight": (3 * width, width), "attn.in_proj.bias": (3 * width,),
            "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
            "mlp.c_fc.weight": (inner, width), "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (width, inner), "mlp.c_proj.bias": (width,),
        }  # fmt: skip
        seeing |= {f"transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    seeing |= {
        "attn_pool.pos_embed": (tokens, wide), "attn_pool.query": (tokens, wide),
        "attn_pool.attn.in_proj_weight": (3 * wide, wide), "attn_pool.attn.in_proj_bias": (3 * wide,),
        "attn_pool.attn.out_proj.weight": (wide, wide), "attn_pool.attn.out_proj.bias": (wide,),
        "attn_pool.ln_q.weight": (wide,), "attn_pool.ln_q.bias": (wide,),
        "attn_pool.ln_kv.weight": (wide,), "attn_pool.ln_kv.bias": (wide,),
        "ln_post.weight": (wide,), "ln_post.bias": (wide,),
    }  # fmt: skip
    if width != wide:
        seeing["attn_pool.kv_proj.weight"] = (wide, width)
    return shapes | {f"transformer.visual.{name}": shape for name, shape in seeing.items()}


def tiny_config(**visual: Any) -> dict[str, Any]:
    """A Qwen-VL of width 128, 28 px in 4 patches, 16 visual tokens; ``<img>`` is the third last id of 480."""
    small = {
        "heads": 2, "image_size": 28, "image_start_id": 477, "layers": 2, "mlp_ratio": 2.0, "n_queries": 16,
        "output_dim": 128, "patch_size": 14, "width": 32,
    }  # fmt: skip
    return {
        **CHAT_CONFIG, "hidden_size": 128, "intermediate_size": 128, "kv_channels": 32, "num_attention_heads": 4,
        "num_hidden_layers": 2, "torch_dtype": "float32", "vocab_size": 480, "visual": {**small, **visual},
    }  # fmt: skip


def write_tiny(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """Write an untrained Qwen-VL in the original layout, in one safetensors file."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: (torch.randn(shape, generator=generator) * 0.05 + ("ln_" in name and "weight" in name)).to(
            dtype
        )
        for name, shape in published_tensors(config).items()
    }
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_ranks(folder: Path, config: dict[str, Any], extras: int = 205) -> dict[bytes, int]:
    """Write a qwen.tiktoken trained on a few sentences, of as many tokens as the config leaves room for."""
    size = config["visual"]["image_start_id"] - 6 - 3 - extras
    parts = [[bytes([byte]) for byte in word.encode()] for word in CORPUS.split(" ")]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < size:
        pairs = Counter(pair for word in parts for pair in pairwise(word) if b"".join(pair) not in ranks)
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[b"".join(best)] = len(ranks)
        for word in parts:
            for i in range(len(word) - 1, 0, -1):
                if word[i - 1 : i + 1] == list(best):
                    word[i - 1 : i + 1] = [b"".join(best)]
    lines = (b"%s %d\n" % (b64encode(token), rank) for token, rank in ranks.items())
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    return ranks


CORPUS = "Which disease does this image show? The optic disc is pale and the macula is flat, diabetic glaucoma über"
