"""What is known of published towers by their exact name."""

from collections.abc import Mapping

from mgll_encoder.spec import CLIP_MEAN, CLIP_STD, TowerSpec

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
"""Geometry of towers that hosts name by hub id: a tower that is to be replaced need not be downloaded."""
