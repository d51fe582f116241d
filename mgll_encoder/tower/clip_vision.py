"""What transformers' ``CLIPVisionModel`` is, in figures: its config.json and its tensors, without importing it.

Planning a swap and inspecting a tower need no more, and importing the class takes seconds. Tests hold all of it against
transformers itself.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from mgll_encoder.tower.spec import TowerSpec

MODEL_TYPE = "clip_vision_model"

CHANNELS = 3


class ClipVisionFields(BaseModel):
    """The fields of a ``CLIPVisionConfig`` that count here, with its defaults."""

    model_config = ConfigDict(strict=True)

    hidden_size: PositiveInt = 768
    intermediate_size: PositiveInt = 3072
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: PositiveFloat = 1e-5


SPEC_FIELDS: Mapping[str, str] = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "patch_size": "patch_size",
    "image_size": "image_size",
    "activation": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
}
"""Field of ``TowerSpec`` -> what ``CLIPVisionConfig`` calls it."""


def vision_settings(spec: TowerSpec) -> dict[str, Any]:
    """The config.json of a tower."""
    return {
        "model_type": MODEL_TYPE,
        **{theirs: getattr(spec, ours) for ours, theirs in SPEC_FIELDS.items()},
        "num_channels": CHANNELS,
        "projection_dim": spec.projection_dim or 512,  # the class default; CLIPVisionModel does not read it
    }


def spec_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``TowerSpec`` that the config.json of a tower states, defaults included.

    Raises:
        ValueError: one of them has no such value; the message is one line.
    """
    try:
        fields = ClipVisionFields.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise ValueError(f"vision_config is {first['input']!r:.60}: expected an object") from None
        raise ValueError(f"field '{first['loc'][0]}' is {first['input']!r}: {first['msg']}") from None
    return {ours: getattr(fields, theirs) for ours, theirs in SPEC_FIELDS.items()}


def vision_shapes(spec: TowerSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of a tower's tensors by ``CLIPVisionModel`` key (without ``vision_model.``)."""
    width, patch = spec.width, spec.patch_size
    block = {
        "layer_norm1": (width,),
        "layer_norm2": (width,),
        **{f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")},
        "mlp.fc1": (spec.mlp_width, width),
        "mlp.fc2": (width, spec.mlp_width),
    }
    layers: dict[str, tuple[int, ...]] = {"pre_layrnorm": (width,), "post_layernorm": (width,)}
    for number in range(spec.depth):
        layers |= {f"encoder.layers.{number}.{name}": shape for name, shape in block.items()}
    return {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, CHANNELS, patch, patch),
        "embeddings.position_embedding.weight": (spec.patches + 1, width),
        **{f"{name}.weight": shape for name, shape in layers.items()},
        **{f"{name}.bias": shape[:1] for name, shape in layers.items()},
    }
