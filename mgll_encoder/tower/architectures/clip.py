"""CLIP's ViT: transformers' ``CLIPVisionModel``, open_clip's ``VisionTransformer``, OpenAI's own code."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import PositiveFloat, PositiveInt

from mgll_encoder.tower.architectures.base import (
    CHANNELS,
    Architecture,
    ConfigFields,
    Naming,
    Shapes,
    affine,
    encoder_layers,
    from_output,
)
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, TowerSpec
from mgll_encoder.weights.keytable import KeyTable, Rule, Split, Transpose, targets

PROJECTION = "visual_projection.weight"
"""Name given to the projection into the image-text space, [projection_dim, width]."""

HF_STATE, OPEN_CLIP = "transformers state dict", "open_clip state dict"


class ClipVisionFields(ConfigFields):
    """The fields of a ``CLIPVisionConfig`` that are read, with its defaults."""

    names: ClassVar[Mapping[str, str]] = {
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
        "patch_size": "patch_size",
        "image_size": "image_size",
        "activation": "hidden_act",
        "layer_norm_eps": "layer_norm_eps",
    }

    intermediate_size: PositiveInt = 3072
    patch_size: PositiveInt = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: PositiveFloat = 1e-5


def _settings(spec: TowerSpec) -> dict[str, Any]:
    default = 512  # of the class; CLIPVisionModel does not read it
    return {"projection_dim": spec.projection_dim or default}


def _shapes(spec: TowerSpec) -> Shapes:
    width, patch = spec.width, spec.patch_size
    layers: Shapes = {"pre_layrnorm": (width,), "post_layernorm": (width,), **encoder_layers(spec)}
    return {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, CHANNELS, patch, patch),
        "embeddings.position_embedding.weight": (spec.patches + 1, width),
        **affine(layers),
    }


OPEN_CLIP_RULES: dict[str, Rule] = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",  # spelled so by Hugging Face
    "ln_pre.bias": "pre_layrnorm.bias",
    "transformer.resblocks.{}.ln_1.weight": "encoder.layers.{}.layer_norm1.weight",
    "transformer.resblocks.{}.ln_1.bias": "encoder.layers.{}.layer_norm1.bias",
    "transformer.resblocks.{}.attn.in_proj_weight": Split("encoder.layers.{}.self_attn.{q,k,v}_proj.weight"),
    "transformer.resblocks.{}.attn.in_proj_bias": Split("encoder.layers.{}.self_attn.{q,k,v}_proj.bias"),
    "transformer.resblocks.{}.attn.out_proj.weight": "encoder.layers.{}.self_attn.out_proj.weight",
    "transformer.resblocks.{}.attn.out_proj.bias": "encoder.layers.{}.self_attn.out_proj.bias",
    "transformer.resblocks.{}.ln_2.weight": "encoder.layers.{}.layer_norm2.weight",
    "transformer.resblocks.{}.ln_2.bias": "encoder.layers.{}.layer_norm2.bias",
    "transformer.resblocks.{}.mlp.c_fc.weight": "encoder.layers.{}.mlp.fc1.weight",
    "transformer.resblocks.{}.mlp.c_fc.bias": "encoder.layers.{}.mlp.fc1.bias",
    "transformer.resblocks.{}.mlp.c_proj.weight": "encoder.layers.{}.mlp.fc2.weight",
    "transformer.resblocks.{}.mlp.c_proj.bias": "encoder.layers.{}.mlp.fc2.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
    "proj": Transpose(PROJECTION),
}

OPEN_CLIP_BLOCKS = KeyTable({name: rule for name, rule in OPEN_CLIP_RULES.items() if "resblocks" in name})
"""The transformer blocks, named the same in the image and in the text tower."""

_OUR_NAMES = [target for rule in OPEN_CLIP_RULES.values() for target in targets(rule, ("{}",))]

_TRANSFORMERS: dict[str, Rule] = {
    **{name: name for name in _OUR_NAMES if name != PROJECTION},
    "embeddings.position_ids": None,  # a counter that transformers wrote before 4.31
}

CLIP = Architecture(
    name="clip",
    title="CLIP ViT",
    examples="MGLL, OpenAI CLIP, PubMedCLIP, UniMed-CLIP ViT-L/14",
    reads="MGLL training checkpoints, OpenAI and open_clip state dicts, folders of open_clip and transformers",
    model_type="clip_vision_model",
    around="clip",
    model_class="CLIPVisionModel",
    fields=ClipVisionFields,
    settings=_settings,
    shapes=_shapes,
    inner="vision_model.",
    namings=(
        Naming(
            "open_clip", OPEN_CLIP, "conv1.weight", ("transformer.resblocks.",), KeyTable(OPEN_CLIP_RULES),
            optional=frozenset({"proj"}),
        ),
        Naming(
            "transformers", HF_STATE, "embeddings.patch_embedding.weight", ("encoder.layers.",),
            KeyTable(_TRANSFORMERS), absent=("embeddings.patch_embedding.bias",), projection=PROJECTION,
        ),
    ),
    patches="embeddings.patch_embedding.weight",
    positions="embeddings.position_embedding.weight",
    position_ids=True,
    blocks="encoder.layers",
    activations=("quick_gelu", "gelu"),
    poolings={"class": from_output(lambda output, _: output.pooler_output)},
    pixels={"mean": CLIP_MEAN, "std": CLIP_STD, "resize": "crop"},
)  # fmt: skip
