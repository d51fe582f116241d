"""The supported architectures of vision encoders, each described in its own file."""

from collections.abc import Mapping

from mgll_encoder.tower.architectures.base import Architecture
from mgll_encoder.tower.architectures.clip import CLIP
from mgll_encoder.tower.architectures.dinov2 import DINOV2, DINOV2_WITH_REGISTERS
from mgll_encoder.tower.architectures.siglip import SIGLIP
from mgll_encoder.tower.architectures.vit import VIT
from mgll_encoder.tower.spec import TowerSpec

ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row for row in (CLIP, DINOV2, DINOV2_WITH_REGISTERS, SIGLIP, VIT)
}
"""All architectures by name; CLIP, which MGLL trains, comes first."""

HOSTED = tuple(row.name for row in ARCHITECTURES.values() if not row.not_in_hosts)
"""Those that a host whose class builds any tower of transformers can have."""


def described_by(model_type: object) -> Architecture | None:
    """Return the architecture of a config.json by its ``model_type`` (or of its ``vision_config``); None for others."""
    names = {name: row for row in ARCHITECTURES.values() for name in (row.model_type, row.around) if name}
    return names.get(model_type) if isinstance(model_type, str) else None


def first_patch(spec: TowerSpec) -> int:
    """Return the number of tokens before the first patch token: class token and registers."""
    return ARCHITECTURES[spec.architecture].leading + spec.registers
