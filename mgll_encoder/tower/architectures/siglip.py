"""The ViT of SigLIP, and of SigLIP 2 with a fixed image size: ``SiglipVisionModel`` of transformers.

A pre-norm ViT without class token, pooled by a head that attends to all patch tokens. Includes MedSigLIP.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import PositiveInt

from mgll_encoder.tower.architectures.base import (
    CHANNELS,
    Architecture,
    ConfigFields,
    Naming,
    Shapes,
    affine,
    from_output,
    mlp,
)
from mgll_encoder.tower.spec import TowerSpec
from mgll_encoder.weights.keytable import KeyTable, Rule, renames

_NAMES = (
    "embeddings.patch_embedding.{weight,bias}",
    "embeddings.position_embedding.weight",
    "encoder.layers.{}.layer_norm{1,2}.{weight,bias}",
    "encoder.layers.{}.self_attn.{q_proj,k_proj,v_proj,out_proj}.{weight,bias}",
    "encoder.layers.{}.mlp.fc{1,2}.{weight,bias}",
    "post_layernorm.{weight,bias}",
    "head.probe",
    "head.attention.in_proj_{weight,bias}",
    "head.attention.out_proj.{weight,bias}",
    "head.layernorm.{weight,bias}",
    "head.mlp.fc{1,2}.{weight,bias}",
)
_TABLE: dict[str, Rule] = {**renames({name: name for name in _NAMES}), "embeddings.position_ids": None}


class SiglipFields(ConfigFields):
    """The fields of a ``SiglipVisionConfig`` that are read, with its defaults."""

    names: ClassVar[Mapping[str, str]] = {**ConfigFields.names, "mlp_width": "intermediate_size"}

    intermediate_size: PositiveInt = 3072
    hidden_act: str = "gelu_pytorch_tanh"


def _shapes(spec: TowerSpec) -> Shapes:
    width, patch = spec.width, spec.patch_size
    block = {
        "layer_norm1": (width,),
        "layer_norm2": (width,),
        **{f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")},
        **mlp(spec),
    }
    layers: Shapes = {"post_layernorm": (width,), "head.layernorm": (width,)}
    layers |= {f"head.{name}": shape for name, shape in mlp(spec).items()}
    layers["head.attention.out_proj"] = (width, width)
    for number in range(spec.depth):
        layers |= {f"encoder.layers.{number}.{name}": shape for name, shape in block.items()}
    return {
        "embeddings.patch_embedding.weight": (width, CHANNELS, patch, patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (spec.patches, width),
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        **affine(layers),
    }


SIGLIP = Architecture(
    name="siglip",
    title="SigLIP",
    examples="google/siglip-base-patch16-224, SigLIP 2 with a fixed image size, MedSigLIP",
    reads="folders of transformers",
    model_type="siglip_vision_model",
    around="siglip",
    model_class="SiglipVisionModel",
    fields=SiglipFields,
    settings=lambda _: {"vision_use_head": True},
    shapes=_shapes,
    inner="vision_model.",
    namings=(
        Naming(
            "transformers", "transformers state dict", "embeddings.patch_embedding.bias", ("encoder.layers.",),
            KeyTable(_TABLE),
        ),
    ),
    patches="embeddings.patch_embedding.weight",
    positions="embeddings.position_embedding.weight",
    leading=0,
    position_ids=True,
    shares_space=True,
    blocks="encoder.layers",
    activations=("gelu_pytorch_tanh",),
    poolings={
        "attention": from_output(lambda output, _: output.pooler_output),
        "mean": from_output(lambda output, _: output.last_hidden_state.mean(dim=1)),
    },
    pixels={"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize": "squash"},
)  # fmt: skip
