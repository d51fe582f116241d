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
    encoder_layers,
    from_output,
    mlp,
)
from mgll_encoder.tower.spec import TowerSpec
from mgll_encoder.weights.keytable import Join, KeyTable, Reshape, Rule, Split, renames

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

_TIMM: dict[str, Rule] = {
    "pos_embed": Reshape("embeddings.position_embedding.weight", 2),
    "patch_embed.proj.{weight,bias}": "embeddings.patch_embedding.{}",
    "blocks.{}.norm{1,2}.{weight,bias}": "encoder.layers.{}.layer_norm{}.{}",
    "blocks.{}.attn.qkv.{weight,bias}": Split("encoder.layers.{}.self_attn.{q,k,v}_proj.{}"),
    "blocks.{}.attn.proj.{weight,bias}": "encoder.layers.{}.self_attn.out_proj.{}",
    "blocks.{}.mlp.fc{1,2}.{weight,bias}": "encoder.layers.{}.mlp.fc{}.{}",
    "norm.{weight,bias}": "post_layernorm.{}",
    "attn_pool.latent": "head.probe",
    "attn_pool.q.{weight,bias}": Join("head.attention.in_proj_{}", 0),
    "attn_pool.kv.{weight,bias}": Join("head.attention.in_proj_{}", 1),
    "attn_pool.proj.{weight,bias}": "head.attention.out_proj.{}",
    "attn_pool.norm.{weight,bias}": "head.layernorm.{}",
    "attn_pool.mlp.fc{1,2}.{weight,bias}": "head.mlp.fc{}.{}",
}
"""timm's names, also of the SigLIPs of open_clip."""

_TANH = (
    "vit_base_patch32_siglip", "vit_large_patch16_siglip_512", "vit_large_patch16_siglip_gap_512",
    "vit_so400m_patch16_siglip", "vit_giantopt_patch16_siglip",
)  # fmt: skip
"""Beginnings of the names of the SigLIPs that timm 1.0 computes with tanh; it computes the others with exact GELU."""

_SIXTEEN = (1152, 1536)
"""Widths with 16 heads: SO400M and giant."""


def timm_activation(model: str) -> str:
    """Return the activation with which timm computes one of its ViTs, by its name."""
    return "gelu_pytorch_tanh" if model.startswith(_TANH) else "gelu"


class SiglipFields(ConfigFields):
    """The fields of a ``SiglipVisionConfig`` that are read, with its defaults."""

    names: ClassVar[Mapping[str, str]] = {**ConfigFields.names, "mlp_width": "intermediate_size"}

    intermediate_size: PositiveInt = 3072
    hidden_act: str = "gelu_pytorch_tanh"


def _shapes(spec: TowerSpec) -> Shapes:
    width, patch = spec.width, spec.patch_size
    layers: Shapes = {"post_layernorm": (width,), "head.layernorm": (width,)}
    layers |= {f"head.{name}": shape for name, shape in mlp(spec).items()}
    layers |= {"head.attention.out_proj": (width, width), **encoder_layers(spec)}
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
    reads="folders of transformers, timm state dicts (`vit_*_siglip_*`), open_clip folders with them",
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
            KeyTable(_TABLE), activation="gelu_pytorch_tanh",
        ),
        Naming(
            "timm", "timm state dict", "patch_embed.proj.weight", ("blocks.0.norm1.", "attn_pool.latent"),
            KeyTable(_TIMM), absent=("cls_token", "reg_token"),
        ),
    ),
    patches="embeddings.patch_embedding.weight",
    positions="embeddings.position_embedding.weight",
    leading=0,
    position_ids=True,
    shares_space=True,
    blocks="encoder.layers",
    activations=("gelu_pytorch_tanh", "gelu"),
    heads=lambda width: 16 if width in _SIXTEEN else max(1, width // 64),
    poolings={
        "attention": from_output(lambda output, _: output.pooler_output),
        "mean": from_output(lambda output, _: output.last_hidden_state.mean(dim=1)),
    },
    pixels={"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize": "squash"},
)  # fmt: skip
