"""The plain ViT: ``ViTModel`` of transformers, ``VisionTransformer`` of timm, and the encoder of an MAE.

A pre-norm ViT with a class token. RETFound's ``.pth`` files are MAEs, complete or fine-tuned. BiomedCLIP's image
tower is timm's ViT-B/16 in an open_clip model, with a linear layer into the image-text space.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

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
from mgll_encoder.tower.spec import IMAGENET_MEAN, IMAGENET_STD, TowerSpec
from mgll_encoder.weights.keytable import Drop, KeyTable, Rule, Split, renames

_NAMES = (
    "embeddings.cls_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.{weight,bias}",
    "layers.{}.layernorm_{before,after}.{weight,bias}",
    "layers.{}.attention.{q,k,v,o}_proj.{weight,bias}",
    "layers.{}.mlp.fc{1,2}.{weight,bias}",
    "layernorm.{weight,bias}",
)
"""Names in a loaded model."""

_PARTS = ".{weight,bias}"
_WRITTEN = {
    f"layers.{{}}.{ours}{_PARTS}": f"encoder.layer.{{}}.{theirs}{_PARTS}"
    for ours, theirs in {
        "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
        "layernorm_before": "layernorm_before", "layernorm_after": "layernorm_after",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }.items()
}  # fmt: skip
"""Names in a loaded model -> names in files of transformers; the others are the same."""

_POOLER: dict[str, Rule] = {"pooler.dense.{weight,bias}": Drop("pooler")}
_LOADED = renames({name: name for name in _NAMES})
_FILES = {
    **renames({written: ours for ours, written in _WRITTEN.items()}),
    **{name: rule for name, rule in _LOADED.items() if not name.startswith("layers.")},
}

_TIMM: dict[str, Rule] = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.{weight,bias}": "embeddings.patch_embeddings.projection.{}",
    "blocks.{}.norm1.{weight,bias}": "layers.{}.layernorm_before.{}",
    "blocks.{}.attn.qkv.{weight,bias}": Split("layers.{}.attention.{q,k,v}_proj.{}"),
    "blocks.{}.attn.proj.{weight,bias}": "layers.{}.attention.o_proj.{}",
    "blocks.{}.norm2.{weight,bias}": "layers.{}.layernorm_after.{}",
    "blocks.{}.mlp.fc{1,2}.{weight,bias}": "layers.{}.mlp.fc{}.{}",
    "head.{weight,bias}": Drop("classifier"),
    "mask_token": Drop("mask token"),
    "decoder_*": Drop("MAE decoder"),
}
_LAST = {"norm.{weight,bias}": "layernorm.{}"}
_LAST_OF_MEAN = {"fc_norm.{weight,bias}": "layernorm.{}"}

_STATE, _PATCHES = "timm or MAE state dict", "patch_embed.proj.weight"
_OTHERS = ("blocks.0.ls1.gamma", "blocks.0.gamma_1", "attn_pool.latent")
_TIMM_EPS = 1e-6


class VitFields(ConfigFields):
    """The fields of a ``ViTConfig`` that are read, with its defaults."""

    names: ClassVar[Mapping[str, str]] = {**ConfigFields.names, "mlp_width": "intermediate_size"}

    intermediate_size: PositiveInt = 3072
    layer_norm_eps: PositiveFloat = 1e-12
    qkv_bias: Literal[True] = True


def _shapes(spec: TowerSpec) -> Shapes:
    width, patch = spec.width, spec.patch_size
    block = {
        "layernorm_before": (width,),
        "layernorm_after": (width,),
        **{f"attention.{name}_proj": (width, width) for name in ("q", "k", "v", "o")},
        **mlp(spec),
    }
    layers: Shapes = {"layernorm": (width,)}
    for number in range(spec.depth):
        layers |= {f"layers.{number}.{name}": shape for name, shape in block.items()}
    return {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, spec.patches + 1, width),
        "embeddings.patch_embeddings.projection.weight": (width, CHANNELS, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        **affine(layers),
    }


def _normed_mean(model: Any, pixels: Any, first: int) -> Any:
    last = model(pixels, output_hidden_states=True).hidden_states[-1]  # before the last LayerNorm
    return model.layernorm(last[:, first:].mean(dim=1))


VIT = Architecture(
    name="vit",
    title="ViT",
    examples="RETFound, BiomedCLIP's image tower, MAE, google/vit-base-patch16-224",
    reads="RETFound's and MAE's `.pth` before and after fine-tuning, timm state dicts, open_clip folders with timm's "
    "ViT, folders of transformers",
    model_type="vit",
    model_class="ViTModel",
    options={"add_pooling_layer": False},
    fields=VitFields,
    settings=lambda _: {},
    shapes=_shapes,
    unread=lambda spec: {"pooler.dense.weight": (spec.width, spec.width), "pooler.dense.bias": (spec.width,)},
    written=KeyTable(renames(_WRITTEN)),
    namings=(
        Naming(
            "transformers", "transformers state dict", "embeddings.patch_embeddings.projection.weight",
            ("encoder.layer.0.intermediate.",), KeyTable({**_FILES, **_POOLER}),
        ),
        Naming(
            "transformers 5", "transformers state dict", "embeddings.patch_embeddings.projection.weight",
            ("layers.0.layernorm_before.",), KeyTable({**_LOADED, **_POOLER}),
        ),
        Naming(
            "timm", _STATE, _PATCHES, ("blocks.0.norm1.",), KeyTable({**_TIMM, **_LAST}),
            absent=(*_OTHERS, "fc_norm.weight"), projection="head.proj.weight", layer_norm_eps=_TIMM_EPS,
        ),
        Naming(
            "timm, global pooling", _STATE, _PATCHES, ("blocks.0.norm1.", "fc_norm."),
            KeyTable({**_TIMM, **_LAST_OF_MEAN}), absent=_OTHERS, layer_norm_eps=_TIMM_EPS, pooling="mean_norm",
        ),
    ),
    patches="embeddings.patch_embeddings.projection.weight",
    positions="embeddings.position_embeddings",
    positions_ndim=3,
    blocks="layers",
    activations=("gelu",),
    poolings={
        "class": from_output(lambda output, _: output.last_hidden_state[:, 0]),
        "mean": from_output(lambda output, first: output.last_hidden_state[:, first:].mean(dim=1)),
        "mean_norm": _normed_mean,
    },
    pixels={"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "resize": "crop"},
)  # fmt: skip
