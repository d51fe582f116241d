"""Reads LLaVA in the transformers layout (llava-hf, and checkpoints written by this project)."""

from pathlib import Path

from mgll_encoder.common.errors import UserError
from mgll_encoder.tower.architectures.clip import CLIP
from mgll_encoder.tower.spec import TowerSpec, checked
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import read_fields
from mllm_adapters.core.contract import FAMILY_KEY
from mllm_adapters.core.planning import TOWER_PART, HostTower, check_positions, contract_of, copied
from mllm_adapters.core.processing import host_pixels, own_processor
from mllm_adapters.families.host import Host
from mllm_adapters.families.llava.fields import NativeFields
from mllm_adapters.families.llava.weights import BASE_PART, READER

CLASS_EMBEDDING = "embeddings.class_embedding"

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
        raise UserError(f"{checkpoint.folder} is whole: no `parts['{given[0]}']` belongs to it")
    fields = read_fields(NativeFields, config, f"{checkpoint.folder}/config.json")
    prefix = _tower_prefix(checkpoint)
    tower = _native_tower(checkpoint, prefix)
    names = (n.removesuffix(".weight") for n in checkpoint.tensors if n.endswith(f"{READER}.weight"))
    return Host(
        layout="transformers",
        before=contract_of(
            tower.spec, fields.vision_feature_layer, CLASS_TOKEN[fields.vision_feature_select_strategy]
        ),
        steps=[copied(header) for header in checkpoint.tensors.values()],
        prefix=prefix,
        dtype=checkpoint.tensors[prefix + CLASS_EMBEDDING].dtype,
        config={**{key: value for key, value in config.items() if key != "auto_map"}, FAMILY_KEY: family},
        image_token_id=fields.placeholder,
        connector=(next(names, READER),),
        processor=own_processor(checkpoint.folder),
        notes=tower.notes,
    )


def _tower_prefix(checkpoint: Checkpoint) -> str:
    found = [n.removesuffix(CLASS_EMBEDDING) for n in checkpoint.tensors if n.endswith(CLASS_EMBEDDING)]
    if len(found) != 1 or "vision_tower." not in found[0]:
        raise UserError(
            f"{checkpoint.folder}: expected one CLIP vision tower under vision_tower, found {len(found)}: "
            "only CLIP towers can be replaced in this layout"
        )
    return found[0]


def _native_tower(checkpoint: Checkpoint, prefix: str) -> HostTower:
    """Return the geometry of the tower in a transformers checkpoint, from its configuration and image processor."""
    where: Path = checkpoint.folder / "config.json"
    try:
        vision = CLIP.spec_fields(checkpoint.config["vision_config"])
    except ValueError as error:
        raise UserError(f"{where}: vision_config: {error}") from None
    pixels, notes = host_pixels(checkpoint.folder, vision["image_size"])
    spec = checked(TowerSpec, {**vision, **pixels.model_dump()}, where)
    check_positions(checkpoint.tensors[f"{prefix}embeddings.position_embedding.weight"], spec)
    return HostTower("vision_tower", spec, None, notes)
