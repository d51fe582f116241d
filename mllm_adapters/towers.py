"""What is known of published towers by their exact name."""

from collections.abc import Mapping

from mgll_encoder.spec import CLIP_MEAN, CLIP_STD, TowerSpec

_OPENAI_VIT_L = TowerSpec(
    width=1024, depth=24, heads=16, mlp_width=4096, patch_size=14, image_size=224, activation="quick_gelu",
    projection_dim=768, mean=CLIP_MEAN, std=CLIP_STD, resize="crop",
)  # fmt: skip

PUBLISHED_TOWERS: Mapping[str, TowerSpec] = {
    "openai/clip-vit-large-patch14": _OPENAI_VIT_L,
    "openai/clip-vit-large-patch14-336": _OPENAI_VIT_L.model_copy(update={"image_size": 336}),
}
"""Geometry of towers that hosts name by hub id: a tower that is to be replaced need not be downloaded."""
