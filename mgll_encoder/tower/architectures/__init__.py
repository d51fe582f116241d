"""The architectures of vision encoders that are read: a row for each, described in a file of its own."""

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
"""All architectures by name; CLIP, what MGLL trains, comes first."""

HOSTED = tuple(row.name for row in ARCHITECTURES.values() if not row.not_in_hosts)
"""Those that a host whose class builds any tower of transformers can have."""


def described_by(model_type: object) -> Architecture | None:
    """The architecture of a config.json of this ``model_type``, or of the ``vision_config`` in it; None for others."""
    names = {name: row for row in ARCHITECTURES.values() for name in (row.model_type, row.around) if name}
    return names.get(model_type) if isinstance(model_type, str) else None


def first_patch(spec: TowerSpec) -> int:
    """Tokens of a tower before its first patch token: class token and registers."""
    return ARCHITECTURES[spec.architecture].leading + spec.registers
