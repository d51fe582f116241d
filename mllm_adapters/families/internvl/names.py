"""Maps InternVL-Chat's tensors from the original layout.

After OpenGVLab/InternVL 2410d1d (internvl_chat/internvl/model: internvl_chat/modeling_intern_vit.py,
internvl_chat/modeling_internvl_chat.py, internlm2/modeling_internlm2.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mgll_encoder.weights.keytable import Drop, Rule, Split
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Dropped
from mllm_adapters.core.operations import Step
from mllm_adapters.families.keytable import OriginalLayout

TOWER = "vision_tower."

PROJECTOR = "multi_modal_projector."

POSITIONS = TOWER + "embeddings.position_embeddings"

EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

_LAYER = TOWER + "encoder.layer.{}."

_BLOCK = "vision_model.encoder.layers.{}."

RULES: Mapping[str, Rule] = {
    "vision_model.embeddings.class_embedding": TOWER + "embeddings.cls_token",
    "vision_model.embeddings.position_embedding": POSITIONS,
    "vision_model.embeddings.patch_embedding.{weight,bias}": TOWER
    + "embeddings.patch_embeddings.projection.{}",
    _BLOCK + "attn.qkv.{weight,bias}": Split(_LAYER + "attention.{q,k,v}_proj.{}"),
    _BLOCK + "attn.{q,k}_norm.weight": _LAYER + "attention.{}_norm.weight",
    _BLOCK + "attn.proj.{weight,bias}": _LAYER + "attention.projection_layer.{}",
    _BLOCK + "norm1.{weight,bias}": _LAYER + "layernorm_before.{}",
    _BLOCK + "norm2.{weight,bias}": _LAYER + "layernorm_after.{}",
    _BLOCK + "mlp.fc{1,2}.{weight,bias}": _LAYER + "mlp.fc{}.{}",
    _BLOCK + "ls{1,2}": _LAYER + "lambda_{}",
    "mlp1.0.{weight,bias}": PROJECTOR + "layer_norm.{}",
    "mlp1.1.{weight,bias}": PROJECTOR + "linear_1.{}",
    "mlp1.3.{weight,bias}": PROJECTOR + "linear_2.{}",
    "*rotary_emb.inv_freq": None,
}
"""Tower and projector: original name -> transformers name; None for what is recomputed."""

_TEXT_LAYER = "language_model.model.layers.{}."


@dataclass(frozen=True)
class LanguageModel:
    """Conversion of a language model from the original layout to transformers.

    Attributes:
        model_type: Its transformers model_type.
        rules: ``llm_config`` -> the rules of its tensors.
        fields: Fields of ``llm_config`` with another name in transformers, original -> transformers.
        defaults: The original code's defaults for ``llm_config`` that differ from transformers'.
    """

    model_type: str
    rules: Callable[[Mapping[str, Any]], Mapping[str, Rule]]
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]

    def settings(self, llm_config: Mapping[str, Any]) -> dict[str, Any]:
        """Convert an ``llm_config`` to transformers' fields."""
        return {self.fields.get(k, k): v for k, v in {**self.defaults, **llm_config}.items()}


def _internlm2(llm_config: Mapping[str, Any]) -> Mapping[str, Rule]:
    """Return rules for fused tensors, with queries next to the key and value that they share."""
    heads = int(llm_config["num_attention_heads"])
    groups = int(llm_config.get("num_key_value_heads") or heads)
    fused = Split(_TEXT_LAYER + "self_attn.{q,k,v}_proj.{}", groups, (heads // groups, 1, 1))
    return {
        "language_model.model.tok_embeddings.weight": EMBEDDINGS,
        "language_model.output.weight": HEAD,
        "language_model.model.norm.weight": "language_model.model.norm.weight",
        _TEXT_LAYER + "attention.wqkv.{weight,bias}": fused,
        _TEXT_LAYER + "attention.wo.{weight,bias}": _TEXT_LAYER + "self_attn.o_proj.{}",
        _TEXT_LAYER + "feed_forward.w1.weight": _TEXT_LAYER + "mlp.gate_proj.weight",
        _TEXT_LAYER + "feed_forward.w2.weight": _TEXT_LAYER + "mlp.down_proj.weight",
        _TEXT_LAYER + "feed_forward.w3.weight": _TEXT_LAYER + "mlp.up_proj.weight",
        _TEXT_LAYER + "attention_norm.weight": _TEXT_LAYER + "input_layernorm.weight",
        _TEXT_LAYER + "ffn_norm.weight": _TEXT_LAYER + "post_attention_layernorm.weight",
    }


def _own_names(_: Mapping[str, Any]) -> Mapping[str, Rule]:
    """Return transformers' own names."""
    return {
        "language_model.model.{embed_tokens,layers,norm}.*": "language_model.model.{}.{}",
        HEAD: HEAD,
    }


LANGUAGE_MODELS: Mapping[str, LanguageModel] = {
    "LlamaForCausalLM": LanguageModel("llama", _own_names, {}, {}),
    "Qwen2ForCausalLM": LanguageModel("qwen2", _own_names, {}, {}),
    "Qwen3ForCausalLM": LanguageModel("qwen3", _own_names, {}, {}),
    "InternLM2ForCausalLM": LanguageModel("llama", _internlm2, {"bias": "attention_bias"}, {"bias": True}),
}
"""``llm_config.architectures[0]`` -> language model."""


def sort_tensors(
    checkpoint: Checkpoint, language_model: LanguageModel, llm_config: Mapping[str, Any]
) -> tuple[list[Step], list[Dropped]]:
    """Return the target tensors of a checkpoint in the original layout, in source order, and the dropped ones.

    Raises:
        UserError: a tensor is not part of InternVL-Chat, or its shape does not match the configuration.
    """
    rules = {**RULES, **language_model.rules(llm_config)}
    if llm_config.get("tie_word_embeddings"):
        tied = Drop("tied to the embeddings")
        rules = {name: tied if rule == HEAD else rule for name, rule in rules.items()}
    layout = OriginalLayout(rules, of="an InternVL-Chat checkpoint")
    return layout.steps(checkpoint.tensors.values(), checkpoint.folder)
