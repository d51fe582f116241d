"""Geometry of published towers by name, and of others from the shapes of their tensors."""

import re
from collections.abc import Mapping
from pathlib import PureWindowsPath

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.tower.spec import CLIP_MEAN, CLIP_STD, TowerSpec

_OPENAI_VIT_L = TowerSpec(
    width=1024, depth=24, heads=16, mlp_width=4096, patch_size=14, image_size=224, activation="quick_gelu",
    projection_dim=768, mean=CLIP_MEAN, std=CLIP_STD, resize="crop",
)  # fmt: skip

_INTERNVIT_6B = TowerSpec(
    width=3200, depth=48, heads=25, mlp_width=12800, patch_size=14, image_size=224, activation="gelu",
    layer_norm_eps=1e-6, resize="crop",
)  # fmt: skip
"""Defaults of OpenGVLab/InternVL 2410d1d (internvl_chat/internvl/model/internvl_chat/configuration_intern_vit.py)."""

PUBLISHED_TOWERS: Mapping[str, TowerSpec] = {
    "openai/clip-vit-large-patch14": _OPENAI_VIT_L,
    "openai/clip-vit-large-patch14-336": _OPENAI_VIT_L.model_copy(update={"image_size": 336}),
    "OpenGVLab/InternViT-6B-224px": _INTERNVIT_6B,  # InternVL-Chat-V1-0 is a LLaVA with this tower
}
"""Geometry of towers that hosts name by hub id: a tower that will be replaced need not be downloaded."""

COPIES: Mapping[str, re.Pattern[str]] = {
    "openai/clip-vit-large-patch14": re.compile(
        r"(openai-+)?(clip-vit-large-patch14|(clip-)?vit-l-14(\.pt)?)"
    ),
    "openai/clip-vit-large-patch14-336": re.compile(
        r"(openai-+)?(clip-vit-large-patch14-336(px)?|(clip-)?vit-l-14-336(px)?(\.pt)?)"
    ),
    "OpenGVLab/InternViT-6B-224px": re.compile(r"(opengvlab-+)?internvit-6b-224px"),
}
"""Published tower -> common names of local copies, in lower case with hyphens."""

HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
"""Path of a model in the Hugging Face cache."""

PATCHES, POSITIONS, LAYER = (
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
    re.compile(r"encoder\.layers\.(\d+)\."),
)
"""Tensors of a transformers CLIP that determine its geometry."""

HEAD_WIDTH = 64
"""Default for all CLIP ViTs; it has no effect, because a tower that will be replaced is not run."""


def published_name(name: str) -> str | None:
    """Return the hub id of the published tower that a name or path stands for, by its last component, or None.

    Recognized are hub ids, paths of local copies (``/data/clip_vit_large_patch14_336``), folders of the
    Hugging Face cache (``.../models--openai--clip-vit-large-patch14/snapshots/...``) and OpenAI's names
    (``ViT-L/14@336px``).
    """
    if name in PUBLISHED_TOWERS:
        return name
    if hub_id := _cached(name):
        return published_name(hub_id)
    parts = [part for part in re.split(r"[/\\]", name.lower().replace("_", "-").replace("@", "-")) if part]
    endings = ["-".join(parts[-count:]) for count in (1, 2)]  # "ViT-L/14" contains a slash
    return next(
        (tower for ending in endings for tower, copy in COPIES.items() if copy.fullmatch(ending)), None
    )


def short_name(name: str) -> str:
    """Return a tower's name without its private parent folders: its hub id if it is known."""
    last = PureWindowsPath(name).name  # handles both kinds of slashes
    return published_name(name) or _cached(name) or last


def gone(name: str, source: str) -> str:
    """Return the note of a plan about an old tower without files.

    Args:
        name: The tower, as named in the checkpoint.
        source: Source of its geometry.
    """
    return f"the old tower '{short_name(name)}' is not on this machine: its geometry is {source}"


def _cached(name: str) -> str | None:
    """Return the hub id of a model from its path in the Hugging Face cache."""
    found = HUB_CACHE.search(name.replace("\\", "/") + "/")
    return f"{found[1]}/{found[2]}" if found else None


def geometry_of(shapes: Mapping[str, tuple[int, ...]], where: str) -> TowerSpec:
    """Return the geometry of a CLIP tower from the shapes of its tensors, under their names in transformers.

    Activation and normalization, which shapes do not determine, are those of OpenAI's CLIP.

    Raises:
        UserError: its patch or position embedding is missing or has a wrong shape.
    """
    patches, positions = shapes.get(PATCHES, ()), shapes.get(POSITIONS, ())
    grid = round((positions[0] - 1) ** 0.5) if len(positions) == 2 else 0
    if len(patches) != 4 or grid < 1 or grid**2 + 1 != positions[0]:
        raise UnsupportedCheckpointError(
            f"{where}: the vision tower in the shards is not a CLIP ViT: {PATCHES} has shape "
            f"{list(patches)}, "
            f"{POSITIONS} {list(positions)}"
        )
    width, _, _, patch_size = patches
    layers = [int(found[1]) for key in shapes if (found := LAYER.match(key))]
    mlp = next((shape[0] for key, shape in shapes.items() if key.endswith("mlp.fc1.weight")), 4 * width)
    return _OPENAI_VIT_L.model_copy(
        update={
            "width": width, "depth": max(layers, default=0) + 1, "heads": _heads(width), "mlp_width": mlp,
            "patch_size": patch_size, "image_size": grid * patch_size, "projection_dim": None,
        }
    )  # fmt: skip


def assumed_geometry(width: int, image_size: int) -> TowerSpec:
    """Describe a tower of which only the width is known, at the requested image size."""
    return _OPENAI_VIT_L.model_copy(update={"width": width, "heads": _heads(width), "image_size": image_size})


def _heads(width: int) -> int:
    return 1 if width % HEAD_WIDTH else width // HEAD_WIDTH
