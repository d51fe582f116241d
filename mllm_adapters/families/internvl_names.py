"""InternVL-Chat's tensors: where each one of the original layout goes.

After OpenGVLab/InternVL 2410d1d (internvl_chat/internvl/model: internvl_chat/modeling_intern_vit.py,
internvl_chat/modeling_internvl_chat.py, internlm2/modeling_internlm2.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgll_encoder.common.errors import UserError
from mllm_adapters.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.contract import Dropped, Step
from mllm_adapters.planning import dtype_name, kept

Rules = tuple[tuple[str, str | None], ...]
"""Regular expressions over whole original names -> target name; None for what is recomputed."""

TOWER = "vision_tower."

PROJECTOR = "multi_modal_projector."

POSITIONS = TOWER + "embeddings.position_embeddings"

EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

_BLOCK = r"vision_model\.encoder\.layers\.(\d+)\."
_LAYER = TOWER + r"encoder.layer.\1."

VISION: Rules = (
    (r"vision_model\.embeddings\.class_embedding", TOWER + "embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", POSITIONS),
    (
        r"vision_model\.embeddings\.patch_embedding\.(weight|bias)",
        TOWER + r"embeddings.patch_embeddings.projection.\1",
    ),
    (_BLOCK + r"attn\.([qk]_norm\.weight)", _LAYER + r"attention.\2"),
    (_BLOCK + r"attn\.proj\.(weight|bias)", _LAYER + r"attention.projection_layer.\2"),
    (_BLOCK + r"norm1\.(weight|bias)", _LAYER + r"layernorm_before.\2"),
    (_BLOCK + r"norm2\.(weight|bias)", _LAYER + r"layernorm_after.\2"),
    (_BLOCK + r"(mlp\.fc[12]\.(?:weight|bias))", _LAYER + r"\2"),
    (_BLOCK + r"ls([12])", _LAYER + r"lambda_\2"),
    (r"mlp1\.0\.(weight|bias)", PROJECTOR + r"layer_norm.\1"),
    (r"mlp1\.1\.(weight|bias)", PROJECTOR + r"linear_1.\1"),
    (r"mlp1\.3\.(weight|bias)", PROJECTOR + r"linear_2.\1"),
)

VISION_QKV = re.compile(_BLOCK + r"attn\.qkv\.(weight|bias)")

_INTERNLM2_LAYER = r"(language_model\.model\.layers\.\d+\.)"


@dataclass(frozen=True)
class LanguageModel:
    """How a language model of the original layout becomes one of transformers.

    Attributes:
        model_type: Its transformers model_type.
        rules: Its tensors.
        fields: Names of ``llm_config`` that transformers calls otherwise, original -> transformers.
        defaults: Values that the original code takes where ``llm_config`` says nothing, and transformers others.
    """

    model_type: str
    rules: Rules
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]


_INTERNLM2: Rules = (
    (r"language_model\.model\.tok_embeddings\.weight", EMBEDDINGS),
    (r"language_model\.output\.weight", HEAD),
    (r"(language_model\.model\.norm\.weight)", r"\1"),
    (_INTERNLM2_LAYER + r"attention\.wo\.(weight|bias)", r"\1self_attn.o_proj.\2"),
    (_INTERNLM2_LAYER + r"feed_forward\.w1\.weight", r"\1mlp.gate_proj.weight"),
    (_INTERNLM2_LAYER + r"feed_forward\.w2\.weight", r"\1mlp.down_proj.weight"),
    (_INTERNLM2_LAYER + r"feed_forward\.w3\.weight", r"\1mlp.up_proj.weight"),
    (_INTERNLM2_LAYER + r"attention_norm\.weight", r"\1input_layernorm.weight"),
    (_INTERNLM2_LAYER + r"ffn_norm\.weight", r"\1post_attention_layernorm.weight"),
)

INTERNLM2_QKV = re.compile(_INTERNLM2_LAYER + r"attention\.wqkv\.(weight|bias)")

_OWN_NAMES: Rules = (
    (r".*rotary_emb\.inv_freq", None),
    (r"(language_model\.(?:model\.(?:embed_tokens|layers|norm)\..+|lm_head\.weight))", r"\1"),
)

LANGUAGE_MODELS: Mapping[str, LanguageModel] = {
    "LlamaForCausalLM": LanguageModel("llama", _OWN_NAMES, {}, {}),
    "Qwen2ForCausalLM": LanguageModel("qwen2", _OWN_NAMES, {}, {}),
    "Qwen3ForCausalLM": LanguageModel("qwen3", _OWN_NAMES, {}, {}),
    "InternLM2ForCausalLM": LanguageModel("llama", _INTERNLM2, {"bias": "attention_bias"}, {"bias": True}),
}
"""``llm_config.architectures[0]`` -> language model."""


def sort_tensors(
    checkpoint: Checkpoint, language_model: LanguageModel, llm_config: Mapping[str, Any]
) -> tuple[list[Step], list[Dropped]]:
    """The target tensors of a checkpoint in the original layout, in source order, and what is left out.

    Raises:
        UserError: a tensor belongs to no InternVL-Chat, or has not the shape that the configuration gives it.
    """
    rules = [
        (re.compile(pattern), target) for pattern, target in (*VISION, *language_model.rules, *_OWN_NAMES[:1])
    ]
    tied = bool(llm_config.get("tie_word_embeddings"))
    steps: list[Step] = []
    dropped: list[Dropped] = []
    for header in checkpoint.tensors.values():
        if match := VISION_QKV.fullmatch(header.name):
            prefix = match.expand(_LAYER + "attention.")
            steps += _cut(header, checkpoint, 1, {f"{prefix}{n}_proj.{match[2]}": 1 for n in "qkv"})
        elif match := INTERNLM2_QKV.fullmatch(header.name):
            heads = int(llm_config["num_attention_heads"])
            groups = int(llm_config.get("num_key_value_heads") or heads)
            units = {"q": heads // groups, "k": 1, "v": 1}
            names = {f"{match[1]}self_attn.{n}_proj.{match[2]}": number for n, number in units.items()}
            steps += _cut(header, checkpoint, groups, names)
        else:
            target = _renamed(header.name, rules, checkpoint)
            if target is None or (tied and target == HEAD):
                reason = "tied to the embeddings" if target else "not part of the transformers layout"
                dropped.append(Dropped(name=header.name, reason=reason))
            else:
                steps.append(kept(header, target))
    return steps, dropped


def _renamed(
    name: str, rules: list[tuple[re.Pattern[str], str | None]], checkpoint: Checkpoint
) -> str | None:
    for pattern, target in rules:
        if match := pattern.fullmatch(name):
            return None if target is None else match.expand(target)
    hint = ": it holds LoRA weights, merge them into their model first" if "lora_" in name else ""
    raise UserError(f"{checkpoint.folder}: tensor {name} is not part of an InternVL-Chat checkpoint{hint}")


def _cut(header: TensorHeader, checkpoint: Checkpoint, groups: int, names: Mapping[str, int]) -> list[Step]:
    """Steps that cut a fused tensor: target name -> number of units in each group, one after another."""
    units = sum(names.values())
    rows = header.shape[0]
    if rows % (groups * units):
        raise UserError(
            f"{checkpoint.folder}: {header.name} has {rows} rows, expected a multiple of {groups * units}: config.json "
            "and weights do not belong together"
        )
    steps, start = [], 0
    for name, number in names.items():
        steps.append(
            Step(
                name=name,
                dtype=dtype_name(header.dtype),
                shape=(rows // units * number, *header.shape[1:]),
                operation="slice",
                sources=(header.name,),
                arguments={"groups": groups, "units": units, "start": start, "stop": start + number},
            )
        )
        start += number
    return steps
