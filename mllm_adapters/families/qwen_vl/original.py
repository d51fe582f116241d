"""The original layout of Qwen-VL: its configuration, its key names, and the steps to ours.

After modeling_qwen.py, configuration_qwen.py and visual.py of Qwen/Qwen-VL-Chat.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from mgll_encoder.common.errors import BadDataError, UnsupportedCheckpointError
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD
from mgll_encoder.weights.keytable import Drop, Rule, Split
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import text_config
from mllm_adapters.core.contract import Dropped, VisionContract
from mllm_adapters.core.operations import Step
from mllm_adapters.families.keytable import OriginalLayout

TOWER_PREFIX = "vision_tower."
QUERY = "attn_pool.query"
EMBEDDINGS = "language_model.model.embed_tokens.weight"

RECOMPUTED = Drop("follows from config.json")

_LAYER, _TO_LAYER = "transformer.h.{}.", "language_model.model.layers.{}."
_VISUAL, _BLOCK, _TO_BLOCK = (
    "transformer.visual.",
    "transformer.visual.transformer.resblocks.{}.",
    "vision_tower.layers.{}.",
)


def layout(heads: int) -> OriginalLayout:
    """Return original name -> our name, for a tower with this number of heads.

    The original stores query, key and value of each head together; other layouts store all queries first.
    """
    rules: Mapping[str, Rule] = {
        **dict.fromkeys(("*rotary_emb.inv_freq", "*attn.masked_bias", "*logn_tensor"), RECOMPUTED),
        "transformer.wte.weight": EMBEDDINGS,
        "transformer.ln_f.weight": "language_model.model.norm.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        _LAYER + "ln_1.weight": _TO_LAYER + "input_layernorm.weight",
        _LAYER + "ln_2.weight": _TO_LAYER + "post_attention_layernorm.weight",
        _LAYER + "attn.c_attn.{weight,bias}": Split(_TO_LAYER + "self_attn.{q,k,v}_proj.{}"),
        _LAYER + "attn.c_proj.weight": _TO_LAYER + "self_attn.o_proj.weight",
        # The original computes w1(x) * silu(w2(x)): w2 is the gate.
        _LAYER + "mlp.w1.weight": _TO_LAYER + "mlp.up_proj.weight",
        _LAYER + "mlp.w2.weight": _TO_LAYER + "mlp.gate_proj.weight",
        _LAYER + "mlp.c_proj.weight": _TO_LAYER + "mlp.down_proj.weight",
        _VISUAL + "conv1.weight": "vision_tower.patch_embedding.weight",
        _VISUAL + "positional_embedding": "vision_tower.position_embedding",
        _VISUAL + "ln_pre.{weight,bias}": "vision_tower.ln_pre.{}",
        _BLOCK + "ln_{1,2}.{weight,bias}": _TO_BLOCK + "ln_{}.{}",
        _BLOCK + "attn.in_proj.{weight,bias}": Split(_TO_BLOCK + "attn.{q,k,v}_proj.{}", groups=heads),
        _BLOCK + "attn.out_proj.{weight,bias}": _TO_BLOCK + "attn.out_proj.{}",
        _BLOCK + "mlp.c_fc.{weight,bias}": _TO_BLOCK + "fc1.{}",
        _BLOCK + "mlp.c_proj.{weight,bias}": _TO_BLOCK + "fc2.{}",
        _VISUAL + "attn_pool.attn.in_proj_{weight,bias}": Split("attn_pool.attn.{q,k,v}_proj.{}"),
        _VISUAL + "attn_pool.{query,pos_embed,kv_proj.weight}": "attn_pool.{}",
        _VISUAL + "attn_pool.{ln_q,ln_kv,attn.out_proj}.{weight,bias}": "attn_pool.{}.{}",
        _VISUAL + "ln_post.{weight,bias}": "attn_pool.ln_post.{}",
        _VISUAL + "proj": "attn_pool.proj",
    }
    return OriginalLayout(
        rules, of="a Qwen-VL checkpoint", hint="if it is an adapter, merge it into the model first"
    )


class VisualFields(BaseModel):
    """The used fields of the ``visual`` section of an original config.json."""

    heads: PositiveInt
    image_size: PositiveInt
    image_start_id: PositiveInt
    layers: PositiveInt
    mlp_ratio: float = Field(gt=0)
    n_queries: PositiveInt = 256
    output_dim: PositiveInt = Field(multiple_of=128)
    patch_size: PositiveInt
    width: PositiveInt

    @property
    def image_token_id(self) -> int:
        """Return the placeholder's id, which follows those of ``<img>`` and ``</img>``."""
        return self.image_start_id + 2


class OriginalFields(BaseModel):
    """The used fields of an original config.json, with the original code's defaults and the supported values."""

    visual: dict[str, Any]
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    kv_channels: PositiveInt = 128
    layer_norm_epsilon: float = 1e-6
    max_position_embeddings: PositiveInt = 8192
    no_bias: Literal[True] = True
    num_attention_heads: PositiveInt
    rotary_emb_base: float = 10000
    rotary_pct: float = Field(default=1, ge=1, le=1)
    scale_attn_weights: Literal[True] = True
    seq_length: PositiveInt
    tie_word_embeddings: bool = False
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True

    @property
    def context(self) -> int:
        """Return the longest sequence for which the original equals Qwen2."""
        stretches = self.use_dynamic_ntk or self.use_logn_attn
        return self.seq_length if stretches else self.max_position_embeddings


def original_steps(checkpoint: Checkpoint, visual: VisualFields) -> tuple[list[Step], list[Dropped]]:
    """Return the steps from the original's tensors to our names, and the dropped tensors."""
    steps, dropped = layout(visual.heads).steps(checkpoint.tensors.values(), checkpoint.folder)
    found = {step.name for step in steps}
    for name, lacks in ((EMBEDDINGS, "language model"), (QUERY, "resampler")):
        if name not in found:
            raise BadDataError(
                f"{checkpoint.folder} has no {lacks} ({name} is not in its weights): is it complete?"
            )
    return steps, dropped


def original_contract(visual: VisualFields) -> VisionContract:
    """Return the vision contract of the original: images resized to a square, CLIP's mean and standard deviation."""
    return VisionContract(
        width=visual.width,
        image_size=visual.image_size,
        patch_size=visual.patch_size,
        tokens=visual.n_queries,
        feature_layer=-1,
        class_token=False,
        activation="gelu",
        mean=CLIP_MEAN,
        std=CLIP_STD,
        resize="squash",
    )


def check_widths(fields: OriginalFields, visual: VisualFields, where: str) -> None:
    """Refuse configurations that the original code does not support either."""
    for name, found, expected in (
        ("visual.output_dim", visual.output_dim, fields.hidden_size),
        (
            "kv_channels x num_attention_heads",
            fields.kv_channels * fields.num_attention_heads,
            fields.hidden_size,
        ),
        ("visual.n_queries", visual.n_queries, isqrt(visual.n_queries) ** 2),
        ("intermediate_size", fields.intermediate_size, fields.intermediate_size // 2 * 2),
        ("visual.width", visual.width, visual.width // visual.heads * visual.heads),
    ):
        if found != expected:
            raise UnsupportedCheckpointError(
                f"{where}: {name} is {found}, expected {expected}: this Qwen-VL is not supported"
            )


def original_vision(visual: VisualFields) -> dict[str, Any]:
    """Return the ``vision_config`` of the original tower."""
    from mllm_adapters.families.qwen_vl.modeling import QwenVisionConfig

    return QwenVisionConfig(
        hidden_size=visual.width,
        intermediate_size=int(visual.width * visual.mlp_ratio),
        num_hidden_layers=visual.layers,
        num_attention_heads=visual.heads,
        image_size=visual.image_size,
        patch_size=visual.patch_size,
    ).to_dict()


def language_model(
    config: Mapping[str, Any], fields: OriginalFields, rows: int, where: str
) -> dict[str, Any]:
    """Return the ``text_config`` of the Qwen2 that equals the original's language model within its context."""
    settings = {
        **config,
        "intermediate_size": fields.intermediate_size // 2,  # the original counts both branches
        "num_key_value_heads": fields.num_attention_heads,
        "rms_norm_eps": fields.layer_norm_epsilon,
        "rope_theta": fields.rotary_emb_base,
        "max_position_embeddings": fields.context,
    }
    return text_config("qwen2", settings, rows, where)
