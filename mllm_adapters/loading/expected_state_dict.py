"""Names and shapes of a LLaVA's tensors from its config.json, without importing modeling code.

Building the model takes seconds. Models other than those below are checked by transformers
(`mllm_adapters.loading.load.check_complete`); tests compare this module with transformers.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, PositiveInt

from mgll_encoder.tower.architectures.clip import CLIP
from mgll_encoder.tower.spec import TowerSpec

Shapes = Mapping[str, tuple[int, ...]]


class Names(NamedTuple):
    """Prefixes of the names of a LLaVA's tensors."""

    text: str
    head: str
    tower: str
    projector: str


NAMES = (
    Names("language_model.model.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector."),
    Names("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", "multi_modal_projector."),
    Names("model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector."),
    Names("model.language_model.", "lm_head.", "model.vision_tower.vision_model.", "model.multi_modal_projector."),
)  # fmt: skip
"""The names in transformers' releases, all of which it still reads."""

DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {"intermediate_size": 11008},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8},
}
"""Supported language models -> the differing defaults of their configurations."""


class _Rope(BaseModel):
    """Rotary positions without scaling."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rope_type: Literal["default"] = "default"
    rope_theta: float


class _Text(BaseModel):
    """The fields of a ``LlamaConfig`` or ``MistralConfig``, with the defaults of both.

    Fields without effect on shapes are included because transformers may refuse an unusual value.
    """

    model_config = ConfigDict(strict=True)

    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: float = 1e-6
    rope_scaling: None = None
    rope_parameters: _Rope | None = None

    intermediate_size: PositiveInt
    vocab_size: PositiveInt = 32000
    hidden_size: PositiveInt = 4096
    num_hidden_layers: PositiveInt = 32
    num_attention_heads: PositiveInt = 32
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    tie_word_embeddings: bool = False


class _Llava(BaseModel):
    """The fields of a ``LlavaConfig`` that determine shapes, with its defaults."""

    model_config = ConfigDict(strict=True)

    model_type: Literal["llava"]
    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    vision_feature_layer: int = -2
    projector_hidden_act: Literal["gelu"] = "gelu"
    multimodal_projector_bias: Literal[True] = True
    tie_word_embeddings: bool = False
    quantization_config: None = None


def is_complete(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether these are exactly the tensors of the model of a config.json.

    Args:
        config: Contents of config.json.
        shapes: Tensor name -> shape.

    Returns:
        False also if the model is not supported here.
    """
    return any(dict(shapes) == expected for expected in llava_shapes(config))


def llava_shapes(config: Mapping[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield tensor name -> shape of a LLaVA, under the names of each release; nothing if it is not supported here."""
    try:
        llava = _Llava.model_validate(dict(config))
        kind = str(llava.text_config.get("model_type", "llama"))
        text = _Text.model_validate({**DEFAULTS[kind], **llava.text_config})
        tower = TowerSpec(**CLIP.spec_fields(llava.vision_config))
    except (ValueError, KeyError):  # includes ValidationError
        return
    if llava.vision_config.get("model_type", CLIP.model_type) != CLIP.model_type:
        return
    width = text.hidden_size
    projector = {
        "linear_1.weight": (width, tower.width),
        "linear_1.bias": (width,),
        "linear_2.weight": (width, width),
        "linear_2.bias": (width,),
    }
    tied = llava.tie_word_embeddings or text.tie_word_embeddings
    head = {} if tied else {"weight": (text.vocab_size, width)}
    parts: tuple[Shapes, ...] = (_text_shapes(text), head, CLIP.shapes(tower), projector)
    for names in NAMES:
        named = zip(names, parts, strict=True)
        yield {prefix + name: shape for prefix, part in named for name, shape in part.items()}


def _text_shapes(text: _Text) -> dict[str, tuple[int, ...]]:
    width, heads, mlp = text.hidden_size, text.num_attention_heads, text.intermediate_size
    each = text.head_dim or width // heads
    keys = each * (text.num_key_value_heads or heads)
    block = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (each * heads, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, each * heads),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    layers = {
        f"layers.{number}.{name}.weight": shape
        for number in range(text.num_hidden_layers)
        for name, shape in block.items()
    }
    return {"embed_tokens.weight": (text.vocab_size, width), "norm.weight": (width,), **layers}
