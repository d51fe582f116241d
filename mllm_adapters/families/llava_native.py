"""LLaVA in the transformers layout (llava-hf, and what this project writes): another tower in it."""

from pathlib import Path

from mgll_encoder import TowerHeader
from mgll_encoder.clip_vision import spec_fields
from mgll_encoder.common.errors import UserError
from mgll_encoder.spec import TowerSpec, checked
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.configs import read_fields, tower_config
from mllm_adapters.contract import FAMILY_KEY, Plan
from mllm_adapters.families.llava_fields import NativeFields
from mllm_adapters.families.llava_weights import BASE_PART, READER
from mllm_adapters.planning import (
    TOWER_PART,
    HostTower,
    after_swap,
    contract_of,
    kept,
    refit_reader,
    replaced,
    swap_notes,
    tower_steps,
)
from mllm_adapters.processing import host_pixels, own_processor

CLASS_EMBEDDING = "embeddings.class_embedding"

CLASS_TOKEN = {"default": False, "full": True}
"""``vision_feature_select_strategy`` -> class token among the features."""


def plan_native(
    family: str, checkpoint: Checkpoint, tower: TowerHeader | None, image_size: int | None
) -> Plan:
    """Plan a swap in a checkpoint that transformers reads as it is.

    Args:
        family: Registry name of the family.
        checkpoint: The checkpoint; its tensors keep their names, of whichever release they are.
        tower: The new tower.
        image_size: Its input side in pixels, or None for the host's patch grid.

    Raises:
        UserError: there is nothing to do, or configuration and weights do not belong together.
    """
    config = checkpoint.config
    if tower is None:
        raise UserError(f"{checkpoint.folder} is in the transformers layout already: nothing to convert")
    if given := [part for part in (TOWER_PART, BASE_PART) if checkpoint.find(part)]:
        raise UserError(f"{checkpoint.folder} is whole: no --part {given[0]} belongs to it")
    fields = read_fields(NativeFields, config, f"{checkpoint.folder}/config.json")
    prefix = _tower_prefix(checkpoint)
    old = [h for h in checkpoint.tensors.values() if h.name.startswith(prefix)]
    dtype = checkpoint.tensors[prefix + CLASS_EMBEDDING].dtype
    host = _native_tower(checkpoint, prefix)
    class_token = CLASS_TOKEN[fields.vision_feature_select_strategy]
    before = contract_of(host.spec, fields.vision_feature_layer, class_token)
    after = after_swap(before, tower, image_size)
    rest = [kept(h) for h in checkpoint.tensors.values() if not h.name.startswith(prefix)]
    weights = (s.name for s in rest if s.name.endswith(f"{READER}.weight"))
    reader = next(weights, READER).removesuffix(".weight")
    steps, readers = refit_reader(rest, reader, before, after, checkpoint.folder)
    return Plan(
        family=family,
        layout="transformers",
        source=checkpoint.folder,
        tower=tower.source,
        tower_weights=tower.weights,
        swapped=True,
        steps=(*steps, *tower_steps(tower, prefix, after, dtype)),
        dropped=replaced(h.name for h in old),
        config={
            **{key: value for key, value in config.items() if key != "auto_map"},
            FAMILY_KEY: family,
            "vision_config": tower_config(tower.spec, after),
            "image_seq_length": after.tokens,
        },
        before=before,
        after=after,
        image_token_id=fields.placeholder,
        processor=own_processor(checkpoint.folder),
        readers=readers,
        notes=(*host.notes, *swap_notes(tower, after)),
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
    """Geometry of the tower in a transformers checkpoint, from its configuration and image processor."""
    where: Path = checkpoint.folder / "config.json"
    try:
        vision = spec_fields(checkpoint.config["vision_config"])
    except ValueError as error:
        raise UserError(f"{where}: vision_config: {error}") from None
    pixels, notes = host_pixels(checkpoint.folder, vision["image_size"])
    spec = checked(TowerSpec, {**vision, **pixels.model_dump()}, where)
    positions = checkpoint.tensors[f"{prefix}embeddings.position_embedding.weight"]
    if positions.shape != (spec.patches + 1, spec.width):
        raise UserError(
            f"{checkpoint.folder}: config.json describes a tower of {spec.grid}x{spec.grid} patches and width "
            f"{spec.width}, but {positions.name} has shape {list(positions.shape)}"
        )
    return HostTower("vision_tower", spec, None, notes)
