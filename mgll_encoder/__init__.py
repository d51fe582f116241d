"""The MGLL vision tower: read it, convert it, train it. Knows nothing of multimodal LLMs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgll_encoder.geometry import fold_normalisation, resample_positions
    from mgll_encoder.preprocess import image_processor, image_transform
    from mgll_encoder.save import save_tower
    from mgll_encoder.spec import Activation, PixelRule, Resize, TowerSpec
    from mgll_encoder.tower import (
        Tower,
        TowerHeader,
        TowerReader,
        build_model,
        inspect_tower,
        load_tower,
        tower_state_dict,
        vision_config,
    )

__all__ = [
    "Activation",
    "PixelRule",
    "Resize",
    "Tower",
    "TowerHeader",
    "TowerReader",
    "TowerSpec",
    "build_model",
    "fold_normalisation",
    "image_processor",
    "image_transform",
    "inspect_tower",
    "load_tower",
    "resample_positions",
    "save_tower",
    "tower_state_dict",
    "vision_config",
]

_HOMES = ("spec", "geometry", "preprocess", "tower", "save")


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``--help`` need not wait for torch and transformers."""
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"mgll_encoder.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'mgll_encoder' has no attribute '{name}'")
