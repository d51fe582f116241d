"""The original layout of Qwen-VL: its configuration, its key names, and the steps to ours.

After modeling_qwen.py, configuration_qwen.py and visual.py of Qwen/Qwen-VL-Chat.
"""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from mgll_encoder.common.errors import UserError
from mgll_encoder.spec import CLIP_MEAN, CLIP_STD
from mllm_adapters.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.configs import text_config
from mllm_adapters.contract import Dropped, Step, VisionContract
from mllm_adapters.planning import dtype_name, kept

TOWER_PREFIX = "vision_tower."
QUERY = "attn_pool.query"
EMBEDDINGS = "language_model.model.embed_tokens.weight"

_LAYER, _BLOCK = r"transformer\.h\.(\d+)\.", r"transformer\.visual\.transformer\.resblocks\.(\d+)\."
_TO_LAYER, _TO_BLOCK = r"language_model.model.layers.\1.", r"vision_tower.layers.\1."

NAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(source), target)
    for source, target in (
        (r"transformer\.wte\.weight", EMBEDDINGS),
        (r"transformer\.ln_f\.weight", "language_model.model.norm.weight"),
        (r"lm_head\.weight", "language_model.lm_head.weight"),
        (_LAYER + r"ln_1\.weight", _TO_LAYER + "input_layernorm.weight"),
        (_LAYER + r"ln_2\.weight", _TO_LAYER + "post_attention_layernorm.weight"),
        (_LAYER + r"attn\.c_attn\.(weight|bias)", _TO_LAYER + r"self_attn.{part}_proj.\2"),
        (_LAYER + r"attn\.c_proj\.weight", _TO_LAYER + "self_attn.o_proj.weight"),
        # The original computes w1(x) * silu(w2(x)): w2 is the gate.
        (_LAYER + r"mlp\.w1\.weight", _TO_LAYER + "mlp.up_proj.weight"),
        (_LAYER + r"mlp\.w2\.weight", _TO_LAYER + "mlp.gate_proj.weight"),
        (_LAYER + r"mlp\.c_proj\.weight", _TO_LAYER + "mlp.down_proj.weight"),
        (r"transformer\.visual\.conv1\.weight", "vision_tower.patch_embedding.weight"),
        (r"transformer\.visual\.positional_embedding", "vision_tower.position_embedding"),
        (r"transformer\.visual\.ln_pre\.(weight|bias)", r"vision_tower.ln_pre.\1"),
        (_BLOCK + r"(ln_[12])\.(weight|bias)", _TO_BLOCK + r"\2.\3"),
        (_BLOCK + r"attn\.in_proj\.(weight|bias)", _TO_BLOCK + r"attn.{part}_proj.\2"),
        (_BLOCK + r"attn\.out_proj\.(weight|bias)", _TO_BLOCK + r"attn.out_proj.\2"),
        (_BLOCK + r"mlp\.c_fc\.(weight|bias)", _TO_BLOCK + r"fc1.\2"),
        (_BLOCK + r"mlp\.c_proj\.(weight|bias)", _TO_BLOCK + r"fc2.\2"),
        (r"transformer\.visual\.attn_pool\.attn\.in_proj_(weight|bias)", r"attn_pool.attn.{part}_proj.\1"),
        (r"transformer\.visual\.(attn_pool\.(?:query|pos_embed|kv_proj\.weight))", r"\1"),
        (r"transformer\.visual\.(attn_pool\.(?:ln_q|ln_kv|attn\.out_proj)\.(?:weight|bias))", r"\1"),
        (r"transformer\.visual\.(ln_post\.(?:weight|bias)|proj)", r"attn_pool.\1"),
    )
)
"""Original name -> our name; ``{part}`` stands for q, k and v in turn, which the original keeps in one tensor."""

RECOMPUTED = re.compile(r".*(rotary_emb\.inv_freq|attn\.masked_bias|logn_tensor)")
"""Tables that some saved checkpoints hold, and that follow from the configuration."""


class VisualFields(BaseModel):
    """What counts in the ``visual`` section of an original config.json."""

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
        """Id of the placeholder: it follows those of ``<img>`` and ``</img>``."""
        return self.image_start_id + 2


class OriginalFields(BaseModel):
    """What counts in an original config.json, with the original code's defaults and the values that are known here."""

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
        """Longest sequence for which the original is a plain Qwen2."""
        stretches = self.use_dynamic_ntk or self.use_logn_attn
        return self.seq_length if stretches else self.max_position_embeddings


def original_steps(checkpoint: Checkpoint, visual: VisualFields) -> tuple[list[Step], list[Dropped]]:
    """Steps that bring the original's tensors under our names, and what is left out."""
    steps: list[Step] = []
    dropped: list[Dropped] = []
    for header in checkpoint.tensors.values():
        if RECOMPUTED.fullmatch(header.name):
            dropped.append(Dropped(name=header.name, reason="follows from config.json"))
            continue
        target = next((match.expand(to) for of, to in NAMES if (match := of.fullmatch(header.name))), None)
        if target is None:
            raise UserError(
                f"{checkpoint.folder}: tensor {header.name} is not part of a Qwen-VL checkpoint: if it is an adapter, "
                "merge it into the model first"
            )
        # The tower keeps query, key and value of each head together; elsewhere all queries come first.
        groups = visual.heads if target.startswith(TOWER_PREFIX) else 1
        steps += _parts(header, target, groups) if "{part}" in target else [kept(header, target)]
    found = {step.name for step in steps}
    for name, lacks in ((EMBEDDINGS, "language model"), (QUERY, "resampler")):
        if name not in found:
            raise UserError(
                f"{checkpoint.folder} has no {lacks} ({name} is not in its weights): is it complete?"
            )
    return steps, dropped


def _parts(header: TensorHeader, target: str, groups: int) -> list[Step]:
    """Query, key and value of a fused projection."""
    shape = (header.shape[0] // 3, *header.shape[1:])
    return [
        Step(
            name=target.format(part=part),
            dtype=dtype_name(header.dtype),
            shape=shape,
            operation="slice",
            sources=(header.name,),
            arguments={"groups": groups, "units": 3, "start": start, "stop": start + 1},
        )
        for start, part in enumerate("qkv")
    ]


def original_contract(visual: VisualFields) -> VisionContract:
    """The vision contract of the original: pictures squashed to a square, CLIP's mean and standard deviation."""
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
    """Refuse configurations for which the original code has no model either."""
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
            raise UserError(
                f"{where}: {name} is {found}, expected {expected}: this is no Qwen-VL that can be read"
            )


def original_vision(visual: VisualFields) -> dict[str, Any]:
    """``vision_config`` of the original tower."""
    from mllm_adapters.modeling.qwen_vl import QwenVisionConfig

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
    """``text_config``: the Qwen2 that equals the original's language model within its context."""
    settings = {
        **config,
        "intermediate_size": fields.intermediate_size // 2,  # the original splits it between its two branches
        "num_key_value_heads": fields.num_attention_heads,
        "rms_norm_eps": fields.layer_norm_epsilon,
        "rope_theta": fields.rotary_emb_base,
        "max_position_embeddings": fields.context,
    }
    return text_config("qwen2", settings, rows, where)
