"""InternVL."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tests.mllm_adapters.families.case import Case, Golden


def features(model: Any, golden: Golden) -> Tensor:
    output = model.model.vision_tower(golden.expected["pixel_values"], output_hidden_states=True)
    layer = model.config.vision_feature_layer
    return (output.last_hidden_state if layer == -1 else output.hidden_states[layer])[:, 1:]


def tokens(model: Any, golden: Golden) -> Tensor:
    return model.get_image_features(golden.expected["pixel_values"]).pooler_output


def inputs(model: Any, golden: Golden, sequence: str) -> dict[str, Tensor]:
    ids = golden.expected[f"{sequence}.input_ids"].clone()
    # The original is told the placeholder at run time; without a tokenizer, here it has a row of its own.
    ids[ids == golden.about["special_ids"]["<IMG_CONTEXT>"]] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": golden.pixels(sequence)}


def logits(found: Tensor, golden: Golden, sequence: str) -> tuple[Tensor, Tensor]:
    expected = golden.expected[f"{sequence}.logits"]
    return found[..., : expected.shape[-1]], expected  # the vocabulary has grown


def tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.vision_tower")


_OWN = tuple(
    Case(
        name=name, golden=name, features=features, tokens=tokens, inputs=inputs, logits=logits, tower=tower
    )
    for name in ("internvl", "internvl_qwen2", "internvl_internlm2")
)  # fmt: skip

CASES = (
    *_OWN,
    *(replace(case, name=f"{case.name} as llava", target="llava", stock=True) for case in _OWN[-1:]),
)


@dataclass(frozen=True)
class Published:
    """Sizes of a published checkpoint, from its config.json.

    Attributes:
        architecture: ``llm_config.architectures[0]``.
        width: Hidden size of the language model.
        blocks: Its layers.
        heads: Its attention heads, each 128 wide.
        kv_heads: Its key and value heads.
        inner: Width of its MLPs.
        rows: Rows of its embedding and of its head.
        giant: Whether the tower is InternViT-6B (45 layers at 448 px), not 300M.
        more: Further fields of ``llm_config``.
    """

    architecture: str
    width: int
    blocks: int
    heads: int
    kv_heads: int
    inner: int
    rows: int
    giant: bool = False
    more: tuple[tuple[str, Any], ...] = ()

    def config(self) -> dict[str, Any]:
        """Its config.json, as far as anybody reads it."""
        giant = {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800,
                 "norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}  # fmt: skip
        small = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
                 "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True}  # fmt: skip
        return {
            "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5,
            "dynamic_image_size": not self.giant, "use_thumbnail": not self.giant, "max_dynamic_patch": 12,
            "force_image_size": 448, "ps_version": "v1" if self.giant else "v2", "select_layer": -1,
            "template": "Hermes-2" if self.giant else "internvl2_5", "torch_dtype": "bfloat16",
            "vision_config": {"model_type": "intern_vit_6b", "image_size": 448, "patch_size": 14,
                              **(giant if self.giant else small)},
            "llm_config": {
                "architectures": [self.architecture], "hidden_size": self.width, "num_hidden_layers": self.blocks,
                "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.rows,
                "intermediate_size": self.inner, "tie_word_embeddings": False, "max_position_embeddings": 32768,
                **dict(self.more),
            },
        }  # fmt: skip

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Its tensors."""
        language = self._internlm2() if self.architecture.startswith("InternLM2") else self._llama()
        return {**self._vision(), **{f"language_model.{name}": shape for name, shape in language.items()}}

    def _vision(self) -> dict[str, tuple[int, ...]]:
        c, blocks, inner = (3200, 45, 12800) if self.giant else (1024, 24, 4096)
        at = "vision_model.embeddings."
        found: dict[str, tuple[int, ...]] = {
            f"{at}class_embedding": (1, 1, c), f"{at}patch_embedding.weight": (c, 3, 14, 14),
            f"{at}patch_embedding.bias": (c,), f"{at}position_embedding": (1, 1025, c),
        }  # fmt: skip
        for i in range(blocks):
            at = f"vision_model.encoder.layers.{i}."
            found |= {
                f"{at}attn.qkv.weight": (3 * c, c), f"{at}attn.proj.weight": (c, c), f"{at}attn.proj.bias": (c,),
                f"{at}mlp.fc1.weight": (inner, c), f"{at}mlp.fc1.bias": (inner,), f"{at}mlp.fc2.weight": (c, inner),
                f"{at}mlp.fc2.bias": (c,), f"{at}norm1.weight": (c,), f"{at}norm2.weight": (c,), f"{at}ls1": (c,),
                f"{at}ls2": (c,),
            }  # fmt: skip
            extra = (
                ("attn.q_norm.weight", "attn.k_norm.weight") if self.giant else ("norm1.bias", "norm2.bias")
            )
            found |= {at + name: (c,) for name in extra}
            if not self.giant:
                found[f"{at}attn.qkv.bias"] = (3 * c,)
        return {
            **found, "mlp1.0.weight": (4 * c,), "mlp1.0.bias": (4 * c,), "mlp1.1.weight": (self.width, 4 * c),
            "mlp1.1.bias": (self.width,), "mlp1.3.weight": (self.width, self.width), "mlp1.3.bias": (self.width,),
        }  # fmt: skip

    def _llama(self) -> dict[str, tuple[int, ...]]:
        w, kv = self.width, 128 * self.kv_heads
        found = {
            "model.embed_tokens.weight": (self.rows, w),
            "model.norm.weight": (w,),
            "lm_head.weight": (self.rows, w),
        }
        for i in range(self.blocks):
            at = f"model.layers.{i}."
            found |= {
                f"{at}self_attn.q_proj.weight": (w, w), f"{at}self_attn.k_proj.weight": (kv, w),
                f"{at}self_attn.v_proj.weight": (kv, w), f"{at}self_attn.o_proj.weight": (w, w),
                f"{at}mlp.gate_proj.weight": (self.inner, w), f"{at}mlp.up_proj.weight": (self.inner, w),
                f"{at}mlp.down_proj.weight": (w, self.inner), f"{at}input_layernorm.weight": (w,),
                f"{at}post_attention_layernorm.weight": (w,),
            }  # fmt: skip
            if self.architecture.startswith("Qwen2"):
                found |= {f"{at}self_attn.{n}_proj.bias": (w if n == "q" else kv,) for n in "qkv"}
        return found

    def _internlm2(self) -> dict[str, tuple[int, ...]]:
        w, kv = self.width, 128 * self.kv_heads
        found = {
            "model.tok_embeddings.weight": (self.rows, w),
            "model.norm.weight": (w,),
            "output.weight": (self.rows, w),
        }
        for i in range(self.blocks):
            at = f"model.layers.{i}."
            found |= {
                f"{at}attention.wqkv.weight": (w + 2 * kv, w), f"{at}attention.wo.weight": (w, w),
                f"{at}feed_forward.w1.weight": (self.inner, w), f"{at}feed_forward.w3.weight": (self.inner, w),
                f"{at}feed_forward.w2.weight": (w, self.inner), f"{at}attention_norm.weight": (w,),
                f"{at}ffn_norm.weight": (w,),
            }  # fmt: skip
        return found


INTERNVL2_5_8B = Published(
    "InternLM2ForCausalLM", 4096, 32, 32, 8, 14336, 92553,
    more=(("bias", False), ("rope_theta", 1e6), ("rope_scaling", {"type": "dynamic", "factor": 2.0})),
)  # fmt: skip
INTERNVL3_8B = Published("Qwen2ForCausalLM", 3584, 28, 28, 4, 18944, 151674, more=(("rope_theta", 1e6),))
CHAT_V1_2 = Published(
    "LlamaForCausalLM", 7168, 60, 56, 8, 20480, 64000, giant=True, more=(("rope_theta", 5e6),)
)
