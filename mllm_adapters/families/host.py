"""Describes a checkpoint before a swap, for all layouts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from mgll_encoder import TowerHeader
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Dropped, Target, VisionContract
from mllm_adapters.core.fates import ConnectorFate, ProcessorFate
from mllm_adapters.core.host_tower import HostTower
from mllm_adapters.core.operations import Step


@dataclass(frozen=True)
class PlanRequest:
    """The request for a plan.

    Attributes:
        tower: The new tower; None for a conversion.
        image_size: Its input side in pixels; None for the host's patch grid.
        target: Layout to write.
    """

    tower: TowerHeader | None
    image_size: int | None
    target: Target


@dataclass(frozen=True)
class Host:
    """A checkpoint before a swap, read from its headers: what a conversion writes, and what a swap changes.

    Attributes:
        layout: Name of its layout.
        before: Its vision contract.
        steps: Its tensors under the names of the target, in the order in which a conversion writes them;
            `FamilySpec.tower` matches those of its vision tower.
        prefix: Prefix of a new tower's keys in the target.
        dtype: Dtype of a new tower.
        last: Prefixes of the names that follow those of a new tower.
        config: The target's config.json without a new tower.
        image_token_id: Id of the image placeholder in the target.
        connector: Modules of the target that read vision features.
        read_at: Hidden layer of a new tower that is read; None for that of the host's own.
        merge: Patches along one side that become one visual token.
        queries: Visual tokens, if their number does not depend on the patches.
        tiles: Maximum number of tiles per image after a swap.
        outside: Its own tower, if it is stored outside the checkpoint.
        dropped: Tensors that are dropped, swapped or not.
        parts: Other files and folders that are read, by part name.
        generation: Fields of generation_config.json that differ from the source.
        processor: How the processor is made; None if none is written.
        notes: Notes for the user about the source of the host.
        remarks: Notes for the user about the target.
    """

    layout: str
    before: VisionContract
    steps: list[Step]
    prefix: str
    dtype: torch.dtype
    config: Mapping[str, Any]
    image_token_id: int
    connector: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    read_at: int | None = None
    merge: int = 1
    queries: int | None = None
    tiles: int = 1
    outside: HostTower | None = None
    dropped: list[Dropped] = field(default_factory=list)
    parts: Mapping[str, Path] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    processor: ProcessorFate | None = None
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def tokens(self, grid: int) -> int:
        """Return the visual tokens of an image or tile with ``grid`` patches along one side."""
        return (grid // self.merge) ** 2 + self.before.class_token if self.queries is None else self.queries

    @property
    def clip_contract(self) -> VisionContract:
        """Return its vision contract with the hidden layer at which a new tower is read."""
        layer = self.before.feature_layer if self.read_at is None else self.read_at
        return self.before.model_copy(update={"feature_layer": layer})

    def step(self, name: str) -> Step:
        """Return the step of this name, which must exist."""
        return next(step for step in self.steps if step.name == name)

    def updated(self, **changes: Any) -> Self:
        """Return a copy with other values."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Swap:
    """A plan in the making.

    Attributes:
        checkpoint: The host's checkpoint.
        request: The request.
        host: The host.
        after: Vision contract of the target.
        steps: The host's tensors without its tower.
    """

    checkpoint: Checkpoint
    request: PlanRequest
    host: Host
    after: VisionContract
    steps: list[Step]


@dataclass(frozen=True)
class Connected:
    """A host's tensors without its tower, adapted to the features of the target's tower.

    Attributes:
        steps: They.
        connectors: Modules that read vision features, with their fates.
        config: Fields of config.json that change accordingly.
        notes: Notes for the user.
    """

    steps: list[Step]
    connectors: Mapping[str, ConnectorFate] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
