"""Reads LLaVA in the transformers layout (llava-hf, and checkpoints written by this project)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgll_encoder.common.errors import InvalidArgumentError, MismatchError, UnsupportedCheckpointError
from mgll_encoder.tower.architectures import ARCHITECTURES, described_by
from mgll_encoder.tower.architectures.base import Architecture
from mgll_encoder.tower.architectures.clip import CLIP
from mgll_encoder.tower.spec import TowerSpec, checked
from mllm_adapters.checkpoints.checkpoint import Checkpoint, TensorHeader
from mllm_adapters.core.configs import read_fields
from mllm_adapters.core.contract import FAMILY_KEY
from mllm_adapters.core.host_tower import TOWER_PART, HostTower
from mllm_adapters.core.planning import check_positions, contract_of, copied
from mllm_adapters.core.processing import host_pixels, processor_fate
from mllm_adapters.families.host import Host
from mllm_adapters.families.llava.fields import NativeFields
from mllm_adapters.families.llava.weights import BASE_PART, CONNECTOR

CLASS_TOKEN = {"default": False, "full": True}
"""``vision_feature_select_strategy`` -> class token among the features."""


def native_host(family: str, checkpoint: Checkpoint) -> Host:
    """Read a checkpoint in the transformers layout; its tensors keep their names, which depend on the release.

    Args:
        family: Registry name of the family.
        checkpoint: The checkpoint.

    Raises:
        UserError: configuration and weights do not belong together.
    """
    config = checkpoint.config
    if given := [part for part in (TOWER_PART, BASE_PART) if checkpoint.find(part)]:
        raise InvalidArgumentError(f"{checkpoint.folder} is whole: no `parts['{given[0]}']` belongs to it")
    fields = read_fields(NativeFields, config, f"{checkpoint.folder}/config.json")
    architecture = _architecture(config, checkpoint.folder / "config.json")
    positions = _position_table(checkpoint, architecture)
    tower = _native_tower(checkpoint, architecture, positions)
    names = (n.removesuffix(".weight") for n in checkpoint.tensors if n.endswith(f"{CONNECTOR}.weight"))
    return Host(
        layout="transformers",
        before=contract_of(
            tower.spec, fields.vision_feature_layer, CLASS_TOKEN[fields.vision_feature_select_strategy]
        ),
        steps=[copied(header) for header in checkpoint.tensors.values()],
        prefix=_prefix(positions, architecture),
        dtype=positions.dtype,
        config={**{key: value for key, value in config.items() if key != "auto_map"}, FAMILY_KEY: family},
        image_token_id=fields.placeholder,
        connector=(next(names, CONNECTOR),),
        processor=processor_fate(checkpoint.folder),
        notes=tower.notes,
    )


def _architecture(config: Mapping[str, Any], where: Path) -> Architecture:
    vision = config.get("vision_config")
    kind = vision.get("model_type", CLIP.model_type) if isinstance(vision, Mapping) else CLIP.model_type
    found = described_by(kind)
    if found is None or found.not_in_hosts:
        known = [row.model_type for row in ARCHITECTURES.values() if not row.not_in_hosts]
        raise UnsupportedCheckpointError(
            f"{where}: vision_config: field 'model_type' is {kind!r}: expected {' or '.join(known)}, the towers "
            "that can be replaced in this layout"
        )
    return found


def _position_table(checkpoint: Checkpoint, architecture: Architecture) -> TensorHeader:
    """Find the tower's position table, which identifies its names."""
    ending = f".{architecture.written_name(architecture.positions)}"
    found = [header for name, header in checkpoint.tensors.items() if name.endswith(ending)]
    if len(found) != 1 or "vision_tower." not in found[0].name:
        raise MismatchError(
            f"{checkpoint.folder}: expected one {architecture.title} vision tower under vision_tower, found "
            f"{len(found)}: config.json and weights do not belong together"
        )
    return found[0]


def _prefix(positions: TensorHeader, architecture: Architecture) -> str:
    """Return what precedes the names of a CLIP's tensors.

    transformers 5 saves them without `CLIP.inner` and reads both; transformers 4 reads them only with it.
    """
    root = positions.name.removesuffix(architecture.written_name(architecture.positions))
    return root.removesuffix(CLIP.inner) + CLIP.inner


def _native_tower(checkpoint: Checkpoint, architecture: Architecture, positions: TensorHeader) -> HostTower:
    """Return the geometry of the tower in a transformers checkpoint, from its configuration and image processor."""
    where: Path = checkpoint.folder / "config.json"
    try:
        vision = architecture.spec_fields(checkpoint.config["vision_config"])
    except ValueError as error:
        raise UnsupportedCheckpointError(f"{where}: vision_config: {error}") from None
    pixels, notes = host_pixels(checkpoint.folder, vision["image_size"])
    spec = checked(TowerSpec, {**vision, **pixels.model_dump()}, where)
    check_positions(positions, spec)
    return HostTower("vision_tower", spec, None, notes)
