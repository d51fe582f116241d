"""Makes plans for all families: check, read the host, adapt its connector to the tower, assemble the plan.

A family implements what is specific: `host` reads a checkpoint; `connect`, `adapted` and `remarks` describe
what a swap changes beyond the tower. Most need only `host`.
"""

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import (
    IncompatibleTowerError,
    InvalidArgumentError,
    UnsupportedCheckpointError,
)
from mgll_encoder.tower.architectures import ARCHITECTURES, HOSTED
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.configs import tower_config
from mllm_adapters.core.contract import Dropped, Family, Plan, Target, VisionContract
from mllm_adapters.core.fates import ConnectorFate
from mllm_adapters.core.operations import Step
from mllm_adapters.core.planning import REPLACED, after_swap, refit_connector, swap_notes, tower_steps
from mllm_adapters.families.host import Connected, Host, PlanRequest, Swap

LLAVA: Target = "llava"
STRATEGY = "vision_feature_select_strategy"


class PlannedFamily(Family):
    """A family whose plans are made from a `Host`."""

    def plan(
        self,
        checkpoint: Checkpoint,
        tower: TowerHeader | None = None,
        image_size: int | None = None,
        target: Target = "own",
    ) -> Plan:
        """Plan a swap (``tower`` given) or a conversion to the transformers layout; see `Family.plan`."""
        if self.as_llava is not None and checkpoint.config.get("model_type") == "llava":
            return self.as_llava.plan(checkpoint, tower, image_size, target)
        request = PlanRequest(tower, image_size, target)
        self._check(checkpoint, request)
        host = self.host(checkpoint, request)
        after = self.after(host, request)
        rest = [step for step in host.steps if not self._of_tower(step)]
        swap = Swap(checkpoint, request, host, after, rest)
        connected = self.connect(swap)
        new = tower or (host.outside.header if host.outside else None)
        steps, dropped = self._tensors(swap, connected, new)
        config = {**host.config, **connected.config}
        if new is not None:
            config["vision_config"] = self.vision_config(swap, new)
        if tower is not None:
            config |= self.adapted(swap)
            if config["model_type"] == LLAVA and config.get(STRATEGY, "default") != after.select_strategy:
                config[STRATEGY] = after.select_strategy
        return Plan(
            family=self.spec.name,
            layout=host.layout,
            source=checkpoint.folder,
            tower=new.source if new else None,
            opened=new,
            tower_weights=new.weights if new else None,
            swapped=tower is not None,
            parts={**checkpoint.parts, **host.parts},
            steps=tuple(steps),
            dropped=(*host.dropped, *dropped),
            config=config,
            generation=dict(host.generation),
            before=host.before,
            after=after,
            image_token_id=host.image_token_id,
            processor=host.processor,
            connectors=dict(connected.connectors),
            notes=(
                *host.notes,
                *connected.notes,
                *swap_notes(tower, after),
                *self.remarks(swap),
                *host.remarks,
            ),
        )

    @property
    def as_llava(self) -> Family | None:
        """Return the LLaVA family under this family's name, if it plans checkpoints in the LLaVA layout."""
        return None

    @abstractmethod
    def host(self, checkpoint: Checkpoint, request: PlanRequest) -> Host:
        """Read the headers of a checkpoint.

        Raises:
            UserError: it is an unsupported variant, or incomplete.
        """

    def after(self, host: Host, request: PlanRequest) -> VisionContract:
        """Return the vision contract of the target.

        Raises:
            UserError: the requested tower or image size does not fit the host.
        """
        if request.tower is None:
            return host.before
        if not request.tower.architecture.leading:  # there is no class token to be read
            host = host.updated(before=host.before.model_copy(update={"class_token": False}))
        after = after_swap(
            host.clip_contract, request.tower, request.image_size, tokens=host.tokens, multiple=host.merge
        )
        return after.model_copy(update={"tiles": host.tiles})

    def connect(self, swap: Swap) -> Connected:
        """Fit what reads the tower's features to the width that they will have.

        Raises:
            UserError: a connector is missing, or does not belong to the host's tower.
        """
        steps, connectors = swap.steps, dict[str, ConnectorFate]()
        for name in swap.host.connector:
            where = swap.checkpoint.folder
            steps, fate = refit_connector(steps, name, swap.host.before, swap.after, where)
            connectors |= fate
        return Connected(steps, connectors)

    def vision_config(self, swap: Swap, tower: TowerHeader) -> dict[str, Any]:
        """Return the ``vision_config`` of a target with this tower."""
        return tower_config(tower.spec, swap.after)

    def adapted(self, swap: Swap) -> Mapping[str, Any]:  # noqa: ARG002 (what overrides it reads it)
        """Return the fields of config.json that a new tower changes, except ``vision_config``."""
        return {}

    def remarks(self, swap: Swap) -> tuple[str, ...]:  # noqa: ARG002 (likewise)
        """Return further notes for the user about the target."""
        return ()

    def _of_tower(self, step: Step) -> bool:
        return re.search(self.spec.tower, step.name) is not None

    def _tensors(
        self, swap: Swap, connected: Connected, new: TowerHeader | None
    ) -> tuple[Iterable[Step], list[Dropped]]:
        """Return the tensors of the target, and the dropped tensors of the source."""
        host, steps = swap.host, connected.steps
        if new is None:
            return host.steps, []
        tower = tower_steps(new, host.prefix, swap.after, host.dtype)
        used = {name for step in steps for name in (*step.sources, step.replaces)}
        named = host.outside.name if host.outside else ""
        why = REPLACED if swap.request.tower else f"the original code reads {named} instead"
        old = {source: why for step in host.steps if self._of_tower(step) for source in step.sources}
        read = {source: "read features of another shape" for step in swap.steps for source in step.sources}
        dropped = [Dropped(name=n, reason=reason) for n, reason in {**old, **read}.items() if n not in used]
        first = (step for step in steps if not step.name.startswith(host.last))
        last = (step for step in steps if step.name.startswith(host.last))
        return (*first, *tower, *last), dropped

    def _check(self, checkpoint: Checkpoint, request: PlanRequest) -> None:
        """Refuse requests that no family supports.

        Raises:
            UserError: there is nothing to do, or the family does not support the target.
        """
        if request.target not in self.spec.targets and self.spec.not_llava:
            raise InvalidArgumentError(f"{checkpoint.folder}: {self.spec.not_llava}; use `layout=own`")
        if request.tower is not None:
            self._check_tower(request.tower, HOSTED if request.target == LLAVA else self.spec.encoders)
            return
        if self.layout(checkpoint.config) == "transformers":
            raise UnsupportedCheckpointError(
                f"{checkpoint.folder} is already in the transformers layout: nothing to convert"
            )
        if request.target != "own" and request.target in self.spec.targets:
            raise InvalidArgumentError(
                f"{checkpoint.folder}: the layout llava is for a checkpoint with a new tower, give one with `encoder` "
                "(a LLaVA has a CLIP tower)"
            )

    def _check_tower(self, tower: TowerHeader, encoders: tuple[str, ...]) -> None:
        """Refuse a tower that what loads the target cannot have."""
        kind = tower.architecture
        if kind.name not in encoders:
            titles = " or ".join(ARCHITECTURES[name].title for name in encoders)
            why = f", {kind.not_in_hosts}" if kind.not_in_hosts else ""
            raise IncompatibleTowerError(
                f"{tower.source} is a {kind.title}{why}: a swapped {self.spec.title} can have a {titles} as its tower"
            )
