"""The MGLL vision tower: read it, convert it, train it. Knows nothing of multimodal LLMs."""

from typing import TYPE_CHECKING

from mgll_encoder.common.lazy import lazy

if TYPE_CHECKING:
    from mgll_encoder.api import explain, finetune_probe, linear_probe, pretrain, retrieval, zero_shot
    from mgll_encoder.common.errors import (
        BadDataError,
        EndpointError,
        IncompatibleTowerError,
        InvalidArgumentError,
        MismatchError,
        MissingPackageError,
        NotFoundError,
        OutputTakenError,
        StorageError,
        TrainingError,
        UnknownNameError,
        UnsupportedCheckpointError,
        UserError,
    )
    from mgll_encoder.common.tables import TableOptions
    from mgll_encoder.data.fundus import FundusTable, build_fundus
    from mgll_encoder.data.phantom.dataset import write_phantom
    from mgll_encoder.data.xray import build_xray
    from mgll_encoder.paired.convert import Conversion, convert_tower
    from mgll_encoder.tower.adapt import fold_normalization, resample_positions
    from mgll_encoder.tower.header import TowerHeader
    from mgll_encoder.tower.load import inspect_tower, load_tower, tower_state_dict
    from mgll_encoder.tower.model import Tower, build_model, vision_config
    from mgll_encoder.tower.preprocess import image_processor, image_transform
    from mgll_encoder.tower.save import save_tower
    from mgll_encoder.tower.spec import Activation, PixelRule, Resize, TowerSpec

    __version__: str

__all__ = [
    "Activation",
    "BadDataError",
    "Conversion",
    "EndpointError",
    "FundusTable",
    "IncompatibleTowerError",
    "InvalidArgumentError",
    "MismatchError",
    "MissingPackageError",
    "NotFoundError",
    "OutputTakenError",
    "PixelRule",
    "Resize",
    "StorageError",
    "TableOptions",
    "Tower",
    "TowerHeader",
    "TowerSpec",
    "TrainingError",
    "UnknownNameError",
    "UnsupportedCheckpointError",
    "UserError",
    "build_fundus",
    "build_model",
    "build_xray",
    "convert_tower",
    "explain",
    "finetune_probe",
    "fold_normalization",
    "image_processor",
    "image_transform",
    "inspect_tower",
    "linear_probe",
    "load_tower",
    "pretrain",
    "resample_positions",
    "retrieval",
    "save_tower",
    "tower_state_dict",
    "vision_config",
    "write_phantom",
    "zero_shot",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Activation": "tower.spec",
        "BadDataError": "common.errors",
        "Conversion": "paired.convert",
        "EndpointError": "common.errors",
        "FundusTable": "data.fundus",
        "IncompatibleTowerError": "common.errors",
        "InvalidArgumentError": "common.errors",
        "MismatchError": "common.errors",
        "MissingPackageError": "common.errors",
        "NotFoundError": "common.errors",
        "OutputTakenError": "common.errors",
        "PixelRule": "tower.spec",
        "Resize": "tower.spec",
        "StorageError": "common.errors",
        "TableOptions": "common.tables",
        "Tower": "tower.model",
        "TowerHeader": "tower.header",
        "TowerSpec": "tower.spec",
        "TrainingError": "common.errors",
        "UnknownNameError": "common.errors",
        "UnsupportedCheckpointError": "common.errors",
        "UserError": "common.errors",
        "build_fundus": "data.fundus",
        "build_model": "tower.model",
        "build_xray": "data.xray",
        "convert_tower": "paired.convert",
        "explain": "api",
        "finetune_probe": "api",
        "fold_normalization": "tower.adapt",
        "image_processor": "tower.preprocess",
        "image_transform": "tower.preprocess",
        "inspect_tower": "tower.load",
        "linear_probe": "api",
        "load_tower": "tower.load",
        "pretrain": "api",
        "resample_positions": "tower.adapt",
        "retrieval": "api",
        "save_tower": "tower.save",
        "tower_state_dict": "tower.load",
        "vision_config": "tower.model",
        "write_phantom": "data.phantom.dataset",
        "zero_shot": "api",
    },
)
