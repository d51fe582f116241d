"""The tower that a checkpoint has before a swap: found by path or hub id, or known by its geometry."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mgll_encoder import TowerHeader, inspect_tower
from mgll_encoder.common.errors import (
    NotFoundError,
    UnsupportedCheckpointError,
)
from mgll_encoder.tower.architectures.clip import CLIP
from mgll_encoder.tower.spec import Activation, Resize, TowerSpec
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.known_towers import (
    PUBLISHED_TOWERS,
    assumed_geometry,
    geometry_of,
    gone,
    published_name,
    short_name,
)

TOWER_PART = "vision-tower"
"""Part name of the vision tower."""


@dataclass(frozen=True)
class HostTower:
    """The tower that a checkpoint has before a swap.

    Attributes:
        name: What the checkpoint calls it.
        spec: Its geometry and preprocessing.
        header: Its tensors, if it is stored outside the checkpoint and was found.
        notes: Notes for the user about its source.
    """

    name: str
    spec: TowerSpec
    header: TowerHeader | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedTower:
    """A tower as named in a checkpoint.

    Attributes:
        name: Path or hub id, as in the checkpoint's configuration.
        resize: The checkpoint's resize rule, which overrides the tower's own.
        inside: Names of its tensors, without prefix -> their shapes, if the shards contain them.
        width: Its width in the checkpoint's configuration, if given.
    """

    name: str
    resize: Resize
    inside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    width: int | None = None


def external_tower(
    named: NamedTower, checkpoint: Checkpoint, *, replaced: bool, image_size: int | None = None
) -> HostTower:
    """Find the tower that a checkpoint names by path or hub id.

    If the tower will be replaced, only its geometry is needed. It is taken from the tower's files, else from
    the tensors in the shards, else from a published tower of this name, else from ``image_size``.

    Args:
        named: The tower.
        checkpoint: The checkpoint that names it.
        replaced: Whether another tower replaces it.
        image_size: Requested input side in pixels.

    Raises:
        UserError: it is not on this machine, and is needed or unknown.
    """
    folder = checkpoint.find(TOWER_PART, named.name)
    if folder is not None:
        header = clip_tower(folder)
        spec = header.spec.model_copy(update={"resize": named.resize})
        return HostTower(
            named.name, spec, header, (f"the host's own tower is {named.name}", *header.warnings)
        )
    found = _known_geometry(named, checkpoint, replaced, image_size)
    if found is None:
        way_out = " For a swap its geometry is enough: pass `image_size`." if replaced and named.width else ""
        raise NotFoundError(
            f"{checkpoint.folder}: its vision tower '{named.name}' is not in the checkpoint folder, next to "
            "it or in the Hugging Face cache: put the tower's folder at "
            f"{checkpoint.folder.parent / named.name}, or pass `parts['{TOWER_PART}']=PATH`.{way_out}"
        )
    spec, source = found
    fitted = spec.model_copy(update={"resize": named.resize})
    return HostTower(short_name(named.name), fitted, None, (gone(named.name, source),))


def clip_tower(path: Path, activation: Activation | None = None) -> TowerHeader:
    """Read the header of a host's own tower, which must be a CLIP ViT; see `mgll_encoder.inspect_tower`.

    Raises:
        UserError: it is of another architecture, or cannot be read.
    """
    header = inspect_tower(path, activation=activation)
    if header.architecture is not CLIP:
        raise UnsupportedCheckpointError(
            f"{path} is a {header.architecture.title} tower: the host was trained with a {CLIP.title}; give that one"
        )
    return header


def _known_geometry(
    named: NamedTower, checkpoint: Checkpoint, replaced: bool, image_size: int | None
) -> tuple[TowerSpec, str] | None:
    """Return the geometry of a missing tower, and its source; None if it is unknown."""
    published = published_name(named.name)
    held = geometry_of(named.inside, str(checkpoint.folder)) if named.inside else None
    if held and replaced:
        return held, "that of its tensors in the shards"
    if published:
        spec = PUBLISHED_TOWERS[published]
        fits = held and (held.width, held.patch_size, held.image_size) == (
            spec.width,
            spec.patch_size,
            spec.image_size,
        )
        if replaced or fits:
            return spec, f"that of {published}, by its name"
    if replaced and named.width and image_size:
        source = f"taken as {named.width} wide (config.json) at {image_size} px"
        return assumed_geometry(named.width, image_size), source
    return None
