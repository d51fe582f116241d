"""What a family says of a checkpoint before a swap, whatever its layout."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from mgll_encoder import TowerHeader
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Dropped, Step, Target, VisionContract
from mllm_adapters.core.planning import HostTower


@dataclass(frozen=True)
class PlanRequest:
    """What is asked of a plan.

    Attributes:
        tower: The new tower; None for a conversion.
        image_size: Its input side in pixels; None for the host's patch grid.
        target: Layout that is written.
    """

    tower: TowerHeader | None
    image_size: int | None
    target: Target


@dataclass(frozen=True)
class Host:
    """A checkpoint as it is before a swap, read by its headers: what a conversion writes, and what a swap changes.

    Attributes:
        layout: Name of its layout.
        before: Its vision contract.
        steps: Its tensors under the names of the target, in the order in which a conversion writes them; those of
            its vision tower are told by `FamilySpec.tower`.
        prefix: What precedes the keys of a new tower in the target.
        dtype: What a new tower is written in.
        last: Beginnings of the names that come after those of a new tower.
        config: The target's config.json, as it is without a new tower.
        image_token_id: Id of the image placeholder in the target.
        connector: Modules of the target that read vision features.
        read_at: Hidden layer of a new tower that is read; None for that of the host's own.
        merge: Patches along one side that become one visual token.
        queries: Visual tokens, where their number does not depend on the patches.
        tiles: Most tiles that an image may be cut into after a swap.
        outside: Its own tower, where it lies outside the checkpoint.
        dropped: What the target lacks, swapped or not.
        parts: Further files and folders that are read, by the name that ``--part`` gives them.
        generation: Fields of generation_config.json that are not those of the source.
        processor: How the processor comes about; None where none is written.
        notes: What the user should know about where the host was found.
        remarks: What the user should know about the target.
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
    processor: str | None = None
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def tokens(self, grid: int) -> int:
        """Visual tokens of an image, or of each of its tiles, of ``grid`` patches along one side."""
        return (grid // self.merge) ** 2 + self.before.class_token if self.queries is None else self.queries

    @property
    def clip_contract(self) -> VisionContract:
        """Its vision contract with the hidden layer at which a new tower is read."""
        layer = self.before.feature_layer if self.read_at is None else self.read_at
        return self.before.model_copy(update={"feature_layer": layer})

    def step(self, name: str) -> Step:
        """The step of this name, which must be there."""
        return next(step for step in self.steps if step.name == name)

    def updated(self, **changes: Any) -> Self:
        """The same with other values."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Swap:
    """A plan in the making.

    Attributes:
        checkpoint: Where the host comes from.
        request: What is asked for.
        host: The host.
        after: Vision contract of the target.
        steps: The host's tensors but for its tower.
    """

    checkpoint: Checkpoint
    request: PlanRequest
    host: Host
    after: VisionContract
    steps: list[Step]


@dataclass(frozen=True)
class Connected:
    """A host's tensors but for its tower, ready for the features of the tower that the target has.

    Attributes:
        steps: They.
        readers: Modules that read vision features, and what becomes of them.
        config: Fields of config.json that follow.
        notes: What the user should know.
    """

    steps: list[Step]
    readers: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
