"""The original layout of Janus-Pro (deepseek-ai/Janus), read as transformers' own Janus.

An original config.json has no dimensions of SigLIP and the image generator's VQ model: they are read from
the weights.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.tower.spec import TowerSpec, checked
from mgll_encoder.weights.keytable import Drop, Reshape, Rule, Split
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import read_fields, text_config
from mllm_adapters.core.planning import check_positions, extended
from mllm_adapters.families.host import Host, PlanRequest
from mllm_adapters.families.janus_pro.source import (
    EMBEDDINGS,
    LM_HEAD,
    POSITIONS,
    TOWER,
    Quantizable,
    begin_id,
    janus_host,
    janus_pixels,
    janus_tokenizer,
    placeholder,
    shape_of,
    text_ids,
)
from mllm_adapters.families.keytable import OriginalLayout

VIT, BLOCK = "vision_model.vision_tower.", "vision_model.vision_tower.blocks.{}."
VQ, NEW_VQ = "gen_vision_model.", "model.vqmodel."
LAYER = f"{TOWER}encoder.layers.{{}}."

RULES: Mapping[str, Rule] = {
    f"{VIT}attn_pool.*": Drop("SigLIP's pooling head, which the original code does not use"),
    f"{VQ}quantize.codebook_used": Drop("a counter of the generator's training"),
    "*rotary_emb.inv_freq": Drop("recomputed from the configuration"),
    f"{VIT}pos_embed": Reshape(POSITIONS, 2),
    f"{VIT}patch_embed.proj.*": f"{TOWER}embeddings.patch_embedding.{{}}",
    f"{BLOCK}norm{{1,2}}.*": LAYER + "layer_norm{}.{}",
    f"{BLOCK}attn.qkv.*": Split(LAYER + "self_attn.{q,k,v}_proj.{}"),
    f"{BLOCK}attn.proj.*": LAYER + "self_attn.projection_layer.{}",
    f"{BLOCK}mlp.fc{{1,2}}.*": LAYER + "mlp.fc{}.{}",
    f"{VIT}norm.*": f"{TOWER}post_layernorm.{{}}",
    "gen_head.output_mlp_projector.*": "model.generation_head.proj_out.{}",
    "gen_head.vision_head.*": "model.generation_head.vision_head.{}",
    "gen_embed.*": "model.generation_embeddings.{}",
    f"{VQ}{{encoder,decoder}}.mid.0.*": NEW_VQ + "{}.mid.block_1.{}",
    f"{VQ}{{encoder,decoder}}.mid.1.*": NEW_VQ + "{}.mid.attn_1.{}",
    f"{VQ}{{encoder,decoder}}.mid.2.*": NEW_VQ + "{}.mid.block_2.{}",
    f"{VQ}encoder.conv_blocks.{{}}.res.*": NEW_VQ + "encoder.down.{}.block.{}",
    f"{VQ}encoder.conv_blocks.*": NEW_VQ + "encoder.down.{}",
    f"{VQ}decoder.conv_blocks.{{}}.res.*": NEW_VQ + "decoder.up.{}.block.{}",
    f"{VQ}decoder.conv_blocks.*": NEW_VQ + "decoder.up.{}",
    f"{VQ}*": NEW_VQ + "{}",
    "language_model.model.*": "model.language_model.{}",
    "language_model.lm_head.weight": "lm_head.weight",
}
"""Original name -> transformers name, except for the two aligners."""


HEAD_WIDTH = 64
"""Width of SigLIP-L's attention heads, which is not in the weights."""


class OriginalFields(Quantizable):
    """The used fields of an original config.json: each part is ``{"cls": ..., "params": {...}}``."""

    vision_config: dict[str, Any]
    aligner_config: dict[str, Any]
    gen_vision_config: dict[str, Any]
    gen_aligner_config: dict[str, Any]
    gen_head_config: dict[str, Any]
    language_config: dict[str, Any]


class VisionParams(BaseModel):
    """``vision_config.params``. Of the original code's towers, SigLIP-L has heads of width 64."""

    model_name: Annotated[str, Field(pattern="^siglip_large_patch")]
    image_size: PositiveInt
    pixel_mean: None = None
    pixel_std: None = None


class AlignerParams(BaseModel):
    """``aligner_config.params`` and ``gen_aligner_config.params``."""

    projector_type: Literal["mlp_gelu"]


class LanguageFields(BaseModel):
    """``language_config``."""

    model_type: Literal["llama"] = "llama"


def read_original(checkpoint: Checkpoint, request: PlanRequest) -> Host:
    """Read a checkpoint of deepseek-ai/Janus (``model_type`` multi_modality).

    Raises:
        UserError: it is another variant, incomplete or inconsistent.
    """
    where = f"{checkpoint.folder}/config.json"
    fields = read_fields(OriginalFields, checkpoint.config, where)
    params = {
        name: _params(config, f"{where}: {name}") for name, config in fields if name.endswith("r_config")
    }
    vision = read_fields(VisionParams, _params(fields.vision_config, where), f"{where}: vision_config.params")
    for name, values in params.items():
        read_fields(AlignerParams, values, f"{where}: {name}.params")
    read_fields(LanguageFields, fields.language_config, f"{where}: language_config")

    shape_of(checkpoint, "aligner.layers.0.weight")
    vocabulary = shape_of(checkpoint, "language_model.model.embed_tokens.weight")[0]
    tokenizer = janus_tokenizer(checkpoint.folder)
    image_token_id, rows, notes = placeholder(tokenizer, vocabulary)
    steps, dropped = _table(checkpoint).steps(checkpoint.tensors.values(), checkpoint.folder)
    steps = extended(steps, (EMBEDDINGS, LM_HEAD), rows)
    spec, more = _siglip(checkpoint, vision)
    generator = _generator(checkpoint, spec.grid)
    text = {
        **text_config("llama", fields.language_config, rows, f"{where}: language_config"),
        **text_ids(tokenizer, vocabulary),
    }
    depth = sum(name.startswith("aligner.") and name.endswith("weight") for name in checkpoint.tensors)
    config = {
        "vision_config": _stock_vision(spec, depth, text["hidden_size"]),
        "vq_config": generator,
        "text_config": text,
        "image_token_id": image_token_id,
        "boi_token_id": begin_id(tokenizer, vocabulary),
        "aligner_depth": depth,
        "aligner_hidden_act": "gelu",
    }
    found = {"dropped": dropped, "notes": (*more, *notes)}
    return janus_host(
        "original", spec, steps, config, text["tie_word_embeddings"], tokenizer, request, **found
    )


def _params(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    params = config.get("params")
    if not isinstance(params, Mapping):
        raise UnsupportedCheckpointError(
            f"{where}: field 'params' is missing: this is not the original layout of Janus-Pro"
        )
    return params


def _count(checkpoint: Checkpoint, pattern: str) -> int:
    """Count the distinct numbers in the tensors' names at the pattern's group."""
    return len({m[1] for name in checkpoint.tensors if (m := re.match(pattern, name))})


def _table(checkpoint: Checkpoint) -> OriginalLayout:
    """Return the rules of a checkpoint; in its aligners, linear layers have even numbers, activations odd ones."""
    aligners: dict[str, Rule] = {}
    for name, target in (("aligner", "model.aligner"), ("gen_aligner", "model.generation_aligner")):
        depth = _count(checkpoint, rf"{name}\.layers\.(\d+)\.")
        layers = ("fc1", *(f"hidden_layers.{layer}" for layer in range(depth - 1)))
        aligners |= {f"{name}.layers.{2 * i}.*": f"{target}.{layer}.{{}}" for i, layer in enumerate(layers)}
    return OriginalLayout({**RULES, **aligners}, of="a Janus-Pro checkpoint")


def _siglip(checkpoint: Checkpoint, params: VisionParams) -> tuple[TowerSpec, tuple[str, ...]]:
    """Return the geometry of the original tower, from its weights, and notes for the user."""
    width, _, patch, _ = shape_of(checkpoint, f"{VIT}patch_embed.proj.weight")
    pixels, _, notes = janus_pixels(checkpoint.folder, params.image_size)
    geometry = {
        "width": width,
        "depth": _count(checkpoint, r"vision_model\.vision_tower\.blocks\.(\d+)\.norm1\."),
        "heads": width // HEAD_WIDTH,
        "mlp_width": shape_of(checkpoint, f"{VIT}blocks.0.mlp.fc1.weight")[0],
        "patch_size": patch,
        "activation": "gelu",
        "layer_norm_eps": 1e-6,
    }
    where = checkpoint.folder / "config.json"
    if width % HEAD_WIDTH:
        raise UnsupportedCheckpointError(
            f"{where}: its SigLIP tower is {width} wide: expected a multiple of {HEAD_WIDTH}, the width of a head"
        )
    spec = checked(TowerSpec, {**geometry, **pixels.model_dump()}, where)
    shape_of(checkpoint, f"{VIT}pos_embed")
    check_positions(checkpoint.tensors[f"{VIT}pos_embed"], spec, class_token=False)
    return spec, notes


def _generator(checkpoint: Checkpoint, grid: int) -> dict[str, Any]:
    """Return the image generator's configuration, from its weights (VQ-16 of janus/models/vq_model.py in any size).

    Raises:
        UserError: a tensor is missing, or its head has a width that transformers' Janus does not support.
    """
    levels = _count(checkpoint, rf"{VQ}decoder\.conv_blocks\.(\d+)\.")
    base, channels = shape_of(checkpoint, f"{VQ}encoder.conv_in.weight")[:2]
    embed_dim, latent = shape_of(checkpoint, f"{VQ}quant_conv.weight")[:2]
    # The decoder goes from the coarsest level to the finest; its first block of each level sets the width.
    widths = [
        shape_of(checkpoint, f"{VQ}decoder.conv_blocks.{level}.res.0.conv1.weight")[0]
        for level in reversed(range(levels))
    ]
    if not widths or any(width % base for width in widths):
        raise UnsupportedCheckpointError(
            f"{checkpoint.folder}: the generator's levels are {widths} wide: expected multiples of {base}"
        )
    middle, hidden = shape_of(checkpoint, "gen_head.output_mlp_projector.weight")
    if middle != hidden:
        raise UnsupportedCheckpointError(
            f"{checkpoint.folder}: gen_head.output_mlp_projector maps width {hidden} to {middle}: "
            "transformers' Janus supports only equal widths, as in the published checkpoints"
        )
    return {
        "model_type": "janus_vqgan",
        "embed_dim": embed_dim,
        "num_embeddings": shape_of(checkpoint, f"{VQ}quantize.embedding.weight")[0],
        "double_latent": shape_of(checkpoint, f"{VQ}encoder.conv_out.weight")[0] == 2 * latent,
        "latent_channels": latent,
        "in_channels": channels,
        "out_channels": shape_of(checkpoint, f"{VQ}decoder.conv_out.weight")[0],
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": _count(checkpoint, rf"{VQ}decoder\.conv_blocks\.0\.res\.(\d+)\.") - 1,
        "num_patches": grid,
        "projection_dim": hidden,
        "image_token_embed_dim": hidden,
        "num_hidden_layers": _count(checkpoint, r"gen_aligner\.layers\.(\d+)\.weight"),
        "hidden_act": "gelu",
    }


def _stock_vision(spec: TowerSpec, depth: int, projection: int) -> dict[str, Any]:
    """Return the ``vision_config`` of transformers' Janus."""
    whole = spec.mlp_width % spec.width == 0
    return {
        "model_type": "janus_vision_model",
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        # transformers rounds hidden_size * mlp_ratio down
        "mlp_ratio": (spec.mlp_width if whole else spec.mlp_width + 0.5) / spec.width,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "layer_norm_eps": spec.layer_norm_eps,
        "hidden_act": spec.activation,
        "attention_bias": True,
        "projection_dim": projection,
        "depth": depth,
        "num_image_tokens": spec.patches,
    }
