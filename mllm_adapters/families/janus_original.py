"""The original layout of Janus-Pro (deepseek-ai/Janus), read as transformers' own Janus.

SigLIP and the image generator's VQ model have no dimensions in an original config.json: they are read off the weights.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from mgll_encoder.common.errors import UserError
from mgll_encoder.spec import TowerSpec, checked
from mllm_adapters.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.configs import read_fields, text_config
from mllm_adapters.contract import Dropped, Step
from mllm_adapters.families.janus_source import (
    EMBEDDINGS,
    LM_HEAD,
    TOWER,
    JanusSource,
    Quantisable,
    begin_id,
    check_positions,
    janus_pixels,
    janus_tokenizer,
    placeholder,
    shape_of,
    text_ids,
)
from mllm_adapters.planning import contract_of, dtype_name, kept

_TIMM = r"vision_model\.vision_tower\."
_LAYER = rf"{_TIMM}blocks\.(\d+)\."

NOT_TAKEN: tuple[tuple[str, str], ...] = (
    (rf"{_TIMM}attn_pool\..+", "SigLIP's pooling head, which the original code does not use"),
    (r"gen_vision_model\.quantize\.codebook_used", "a counter of the generator's training"),
    (r".*rotary_emb\.inv_freq", "recomputed from the configuration"),
)
"""Original name -> why it is left out."""

NAMES: tuple[tuple[str, str], ...] = (
    (rf"{_TIMM}pos_embed", f"{TOWER}embeddings.position_embedding.weight"),
    (rf"{_TIMM}patch_embed\.proj\.(.+)", rf"{TOWER}embeddings.patch_embedding.\1"),
    (rf"{_LAYER}norm([12])\.(.+)", rf"{TOWER}encoder.layers.\1.layer_norm\2.\3"),
    (rf"{_LAYER}attn\.qkv\.(.+)", rf"{TOWER}encoder.layers.\1.self_attn.*_proj.\2"),
    (rf"{_LAYER}attn\.proj\.(.+)", rf"{TOWER}encoder.layers.\1.self_attn.projection_layer.\2"),
    (rf"{_LAYER}(mlp\.fc[12]\..+)", rf"{TOWER}encoder.layers.\1.\2"),
    (rf"{_TIMM}norm\.(.+)", rf"{TOWER}post_layernorm.\1"),
    (r"aligner\.(layers\..+)", r"model.aligner.\1"),
    (r"gen_aligner\.(layers\..+)", r"model.generation_aligner.\1"),
    (r"gen_head\.output_mlp_projector\.(.+)", r"model.generation_head.proj_out.\1"),
    (r"gen_head\.(vision_head\..+)", r"model.generation_head.\1"),
    (r"gen_embed\.(.+)", r"model.generation_embeddings.\1"),
    (r"gen_vision_model\.((?:en|de)coder)\.mid\.0\.(.+)", r"model.vqmodel.\1.mid.block_1.\2"),
    (r"gen_vision_model\.((?:en|de)coder)\.mid\.1\.(.+)", r"model.vqmodel.\1.mid.attn_1.\2"),
    (r"gen_vision_model\.((?:en|de)coder)\.mid\.2\.(.+)", r"model.vqmodel.\1.mid.block_2.\2"),
    (r"gen_vision_model\.encoder\.conv_blocks\.(\d+)\.res\.(.+)", r"model.vqmodel.encoder.down.\1.block.\2"),
    (r"gen_vision_model\.encoder\.conv_blocks\.(.+)", r"model.vqmodel.encoder.down.\1"),
    (r"gen_vision_model\.decoder\.conv_blocks\.(\d+)\.res\.(.+)", r"model.vqmodel.decoder.up.\1.block.\2"),
    (r"gen_vision_model\.decoder\.conv_blocks\.(.+)", r"model.vqmodel.decoder.up.\1"),
    (r"gen_vision_model\.(.+)", r"model.vqmodel.\1"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"language_model\.(lm_head\.weight)", r"\1"),
)
"""Original name -> transformers name (``*`` stands for q, k and v in turn); the first that matches counts."""

_ALIGNER_LAYER = re.compile(r"(model\.(?:generation_)?aligner)\.layers\.(\d+)\.(.+)")


HEAD_WIDTH = 64
"""Width of SigLIP-L's attention heads; the weights cannot tell."""


class OriginalFields(Quantisable):
    """What counts in an original config.json: each part is ``{"cls": ..., "params": {...}}``."""

    vision_config: dict[str, Any]
    aligner_config: dict[str, Any]
    gen_vision_config: dict[str, Any]
    gen_aligner_config: dict[str, Any]
    gen_head_config: dict[str, Any]
    language_config: dict[str, Any]


class VisionParams(BaseModel):
    """``vision_config.params``. Of the towers that the original code knows, SigLIP-L has heads of width 64."""

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


def read_original(checkpoint: Checkpoint) -> JanusSource:
    """Read a checkpoint of deepseek-ai/Janus (``model_type`` multi_modality).

    Raises:
        UserError: another variant, or something is missing or does not fit together.
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
    steps, dropped = _original_steps(checkpoint, rows)
    spec, more = _siglip(checkpoint, vision)
    generator = _generator(checkpoint, spec.grid)
    text = {
        **text_config("llama", fields.language_config, rows, f"{where}: language_config"),
        **text_ids(tokenizer, vocabulary),
    }
    depth = sum(name.startswith("aligner.") and name.endswith("weight") for name in checkpoint.tensors)
    stock = {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "vision_config": _stock_vision(spec, depth, text["hidden_size"]),
        "vq_config": generator,
        "text_config": text,
        "image_token_id": image_token_id,
    }
    return JanusSource(
        layout="original",
        steps=steps,
        dropped=dropped,
        before=contract_of(spec, -1, class_token=False),
        clip=False,
        vq_config=generator,
        text_config=text,
        tied=text["tie_word_embeddings"],
        aligner_depth=depth,
        aligner_act="gelu",
        image_token_id=image_token_id,
        boi_token_id=begin_id(tokenizer, vocabulary),
        tokenizer=tokenizer,
        stock_config=stock,
        notes=(*more, *notes),
    )


def _params(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    params = config.get("params")
    if not isinstance(params, Mapping):
        raise UserError(f"{where}: field 'params' is missing: this is not the original layout of Janus-Pro")
    return params


def _count(checkpoint: Checkpoint, pattern: str) -> int:
    """Numbers that the tensors' names have where the pattern has its group."""
    return len({m[1] for name in checkpoint.tensors if (m := re.match(pattern, name))})


def _original_steps(checkpoint: Checkpoint, rows: int) -> tuple[list[Step], list[Dropped]]:
    """Every tensor under its new name, or why it is left out."""
    steps: list[Step] = []
    dropped: list[Dropped] = []
    for header in checkpoint.tensors.values():
        reason = next((why for pattern, why in NOT_TAKEN if re.fullmatch(pattern, header.name)), None)
        if reason is not None:
            dropped.append(Dropped(name=header.name, reason=reason))
            continue
        name = _new_name(checkpoint, header.name)
        if "*" in name:
            steps += _thirds(header, name)
        elif header.name.endswith(".pos_embed"):
            shape = header.shape[-2:]
            dtype = dtype_name(header.dtype)
            steps.append(
                Step(name=name, dtype=dtype, shape=shape, operation="reshape", sources=(header.name,))
            )
        else:
            steps.append(kept(header, name, rows if name in (EMBEDDINGS, LM_HEAD) else None))
    return steps, dropped


def _new_name(checkpoint: Checkpoint, name: str) -> str:
    for pattern, target in NAMES:
        if match := re.fullmatch(pattern, name):
            new = match.expand(target)
            layer = _ALIGNER_LAYER.fullmatch(new)
            if layer is None:
                return new
            # Linear layers have even numbers, the activations between them odd ones.
            number = int(layer[2]) // 2
            return f"{layer[1]}.{'fc1' if number == 0 else f'hidden_layers.{number - 1}'}.{layer[3]}"
    raise UserError(f"{checkpoint.folder}: tensor {name} is not part of a Janus-Pro checkpoint")


def _thirds(header: TensorHeader, name: str) -> list[Step]:
    """Queries, keys and values lie one below the other in a fused tensor."""
    return [
        Step(
            name=name.replace("*", part),
            dtype=dtype_name(header.dtype),
            shape=(header.shape[0] // 3, *header.shape[1:]),
            operation="slice",
            sources=(header.name,),
            arguments={"groups": 1, "units": 3, "start": start, "stop": start + 1},
        )
        for start, part in enumerate("qkv")
    ]


def _siglip(checkpoint: Checkpoint, params: VisionParams) -> tuple[TowerSpec, tuple[str, ...]]:
    """Geometry of the original tower, from its weights, and what the user should know."""
    prefix = "vision_model.vision_tower."
    width, _, patch, _ = shape_of(checkpoint, f"{prefix}patch_embed.proj.weight")
    pixels, _, notes = janus_pixels(checkpoint.folder, params.image_size)
    geometry = {
        "width": width,
        "depth": _count(checkpoint, rf"{_LAYER}norm1\."),
        "heads": width // HEAD_WIDTH,
        "mlp_width": shape_of(checkpoint, f"{prefix}blocks.0.mlp.fc1.weight")[0],
        "patch_size": patch,
        "activation": "gelu",
        "layer_norm_eps": 1e-6,
    }
    where = checkpoint.folder / "config.json"
    if width % HEAD_WIDTH:
        raise UserError(
            f"{where}: its SigLIP tower is {width} wide: expected a multiple of {HEAD_WIDTH}, the width of a head"
        )
    spec = checked(TowerSpec, {**geometry, **pixels.model_dump()}, where)
    check_positions(checkpoint, f"{prefix}pos_embed", spec, class_token=False)
    return spec, notes


def _generator(checkpoint: Checkpoint, grid: int) -> dict[str, Any]:
    """Configuration of the image generator, from its weights (VQ-16 of janus/models/vq_model.py in other sizes).

    Raises:
        UserError: a tensor is missing, or its head has a width that transformers' Janus cannot have.
    """
    vq = "gen_vision_model."
    levels = _count(checkpoint, rf"{vq}decoder\.conv_blocks\.(\d+)\.")
    base, channels = shape_of(checkpoint, f"{vq}encoder.conv_in.weight")[:2]
    embed_dim, latent = shape_of(checkpoint, f"{vq}quant_conv.weight")[:2]
    # The decoder goes from the coarsest level to the finest; its first block of each level sets the width.
    widths = [
        shape_of(checkpoint, f"{vq}decoder.conv_blocks.{level}.res.0.conv1.weight")[0]
        for level in reversed(range(levels))
    ]
    if not widths or any(width % base for width in widths):
        raise UserError(
            f"{checkpoint.folder}: the generator's levels are {widths} wide: expected multiples of {base}"
        )
    middle, hidden = shape_of(checkpoint, "gen_head.output_mlp_projector.weight")
    if middle != hidden:
        raise UserError(
            f"{checkpoint.folder}: gen_head.output_mlp_projector goes from width {hidden} to {middle}: transformers' "
            "Janus has one width there, as the published checkpoints do"
        )
    return {
        "model_type": "janus_vqgan",
        "embed_dim": embed_dim,
        "num_embeddings": shape_of(checkpoint, f"{vq}quantize.embedding.weight")[0],
        "double_latent": shape_of(checkpoint, f"{vq}encoder.conv_out.weight")[0] == 2 * latent,
        "latent_channels": latent,
        "in_channels": channels,
        "out_channels": shape_of(checkpoint, f"{vq}decoder.conv_out.weight")[0],
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": _count(checkpoint, rf"{vq}decoder\.conv_blocks\.0\.res\.(\d+)\.") - 1,
        "num_patches": grid,
        "projection_dim": hidden,
        "image_token_embed_dim": hidden,
        "num_hidden_layers": _count(checkpoint, r"gen_aligner\.layers\.(\d+)\.weight"),
        "hidden_act": "gelu",
    }


def _stock_vision(spec: TowerSpec, depth: int, projection: int) -> dict[str, Any]:
    """``vision_config`` of transformers' Janus."""
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
