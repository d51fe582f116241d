"""The vision tower and projector of a LLaVA as a GGUF file, which llama.cpp calls mmproj.

Names and fields after llama.cpp's tools/mtmd (clip-impl.h, clip.cpp, models/llava.cpp; release b11549).
"""

from collections.abc import Mapping
from functools import partial

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.weights.keytable import KeyTable, renames
from mllm_adapters.export.gguf_file import Field, GGUFFile, GGUFTensor
from mllm_adapters.export.source import LlavaSource

_BLOCKS = {
    "encoder.layers.{}.layer_norm{1,2}.{weight,bias}": "v.blk.{}.ln{}.{}",
    "encoder.layers.{}.self_attn.{q,k,v}_proj.{weight,bias}": "v.blk.{}.attn_{}.{}",
    "encoder.layers.{}.self_attn.out_proj.{weight,bias}": "v.blk.{}.attn_out.{}",
    "encoder.layers.{}.mlp.fc1.{weight,bias}": "v.blk.{}.ffn_up.{}",
    "encoder.layers.{}.mlp.fc2.{weight,bias}": "v.blk.{}.ffn_down.{}",
    "embeddings.patch_embedding.{weight,bias}": "v.patch_embd.{}",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "embeddings.class_embedding": "v.class_embd",
    "pre_layrnorm.{weight,bias}": "v.pre_ln.{}",
}
_UNREAD = {"post_layernorm.*": None, "head.*": None, "embeddings.position_ids": None}
"""What comes after the layer that LLaVA reads."""

_VIT = KeyTable({**renames(_BLOCKS), **_UNREAD}, "vision_tower.")

TOWERS: Mapping[str, KeyTable] = {"clip": _VIT, "siglip": _VIT}
"""Architecture of the tower -> names of its tensors."""

_PROJECTOR = KeyTable(
    renames({"linear_1.{weight,bias}": "mm.0.{}", "linear_2.{weight,bias}": "mm.2.{}"}),
    "multi_modal_projector.",
)

_GELU = {"gelu": True, "gelu_pytorch_tanh": True, "quick_gelu": False}
"""Activation of the tower -> ``clip.use_gelu``: GELU in its tanh form, or QuickGELU."""


def vision_file(source: LlavaSource) -> GGUFFile:
    """Return vision tower and projector as a GGUF file.

    Raises:
        UnsupportedCheckpointError: llama.cpp cannot compute this tower or projector.
    """
    tower, config = source.tower, source.config
    if tower.architecture not in TOWERS:
        known = " and ".join(ARCHITECTURES[name].title for name in TOWERS)
        raise UnsupportedCheckpointError(
            f"{source.where}: the tower is a {ARCHITECTURES[tower.architecture].title}: llama.cpp computes {known} "
            "in a LLaVA, no others"
        )
    if config.projector_hidden_act != "gelu":
        raise UnsupportedCheckpointError(
            f"{source.where}: projector_hidden_act is {config.projector_hidden_act!r}: llama.cpp has gelu"
        )
    fields: dict[str, Field] = {
        "general.name": f"{source.name} (vision)",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": _GELU[tower.activation],
        "clip.vision.image_size": tower.image_size,
        "clip.vision.patch_size": tower.patch_size,
        "clip.vision.embedding_length": tower.width,
        "clip.vision.feed_forward_length": tower.mlp_width,
        "clip.vision.block_count": source.layers,
        "clip.vision.feature_layer": [source.layers],  # else llama.cpp leaves out the last one
        "clip.vision.attention.head_count": tower.heads,
        "clip.vision.attention.layer_norm_epsilon": tower.layer_norm_eps,
        "clip.vision.projection_dim": config.text_config.hidden_size,
        "clip.vision.image_mean": list(tower.mean),
        "clip.vision.image_std": list(tower.std),
    }
    return GGUFFile("clip", fields, (*_tower(source), *_projector(source)))


def _tower(source: LlavaSource) -> list[GGUFTensor]:
    beyond = tuple(f"v.blk.{number}." for number in range(source.layers, source.tower.depth))
    return [
        GGUFTensor(
            target, source.headers[name].shape, partial(source.read, name), precise="position_embd" in target
        )
        for name, target in source.part(("vision_tower.",), TOWERS[source.tower.architecture])
        if not target.startswith(beyond)
    ]


def _projector(source: LlavaSource) -> list[GGUFTensor]:
    names = source.part(("multi_modal_projector.",), _PROJECTOR)
    return [
        GGUFTensor(target, source.headers[name].shape, partial(source.read, name)) for name, target in names
    ]
