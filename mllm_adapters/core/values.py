"""The values of a plan's tensors: each is computed by its operation, of the source checkpoint and the tower."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from mgll_encoder import TowerHeader, fold_normalization, inspect_tower
from mgll_encoder.tower.adapt import fit_positions
from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.spec import Activation, TowerSpec
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Plan, Step, VisionContract


def compute(
    plan: Plan, checkpoint: Checkpoint, steps: Sequence[Step], fitted: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[Step, Tensor]]:
    """The values of target tensors, one at a time.

    Args:
        plan: The plan that the steps belong to.
        checkpoint: Its source.
        steps: Those steps whose values are wanted, in the order in which they come.
        fitted: Values of the steps whose operation computes nothing (``fit``), by name.
    """
    tower = FittedTower(plan)
    for step in steps:
        operation = step.kind
        if operation.compute is None:
            assert fitted is not None, "a plan with fitted tensors is executed with their values"
            yield step, fitted[step.name].to(getattr(torch, step.dtype))
            continue
        read = tower.read if operation.from_tower else checkpoint.read
        given = [read(name) for name in step.sources]
        yield step, operation.compute(step, *given).to(getattr(torch, step.dtype))


def open_tower(plan: Plan) -> TowerHeader | None:
    """The tower of a plan, opened now unless the plan holds it opened; None where it has none.

    Raises:
        UserError: it cannot be read.
    """
    if plan.tower is None or plan.opened is not None:
        return plan.opened
    activation = cast(Activation, plan.after.activation)  # checked there
    return inspect_tower(plan.tower, activation=activation, weights=plan.tower_weights)


def fit(state: Mapping[str, Tensor], trained: TowerSpec, contract: VisionContract) -> dict[str, Tensor]:
    """Fit a tower that was trained with the pixels of ``trained`` to the grid and pixels of a vision contract.

    What is computed comes out in float32 at least: the host's dtype may be finer than the tower's.
    """
    fitted, kind = dict(state), ARCHITECTURES[trained.architecture]
    for name in (kind.positions, kind.patches):
        fitted[name] = state[name].to(torch.promote_types(state[name].dtype, torch.float32))
    table = fit_positions(fitted[kind.positions], kind, contract.image_size // contract.patch_size)
    fitted[kind.patches], rows = fold_normalization(
        fitted[kind.patches],
        table.reshape(-1, trained.width),
        trained=(trained.mean, trained.std),
        given=(contract.mean, contract.std),
        leading=kind.leading,
    )
    fitted[kind.positions] = rows.reshape(table.shape)
    return fitted


class FittedTower:
    """A plan's tower as `fit` makes it, one tensor at a time; it is opened when the first is read."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def read(self, name: str) -> Tensor:
        """The tensor of a key without prefix."""
        kind = self._tower.architecture
        return self._input_side[name] if name in (kind.positions, kind.patches) else self._tower.read(name)

    @cached_property
    def _tower(self) -> TowerHeader:
        tower = open_tower(self._plan)
        assert tower is not None, "a plan with steps of a tower names it"
        return tower

    @cached_property
    def _input_side(self) -> dict[str, Tensor]:
        kind = self._tower.architecture
        state = {name: self._tower.read(name, as_stored=True) for name in (kind.positions, kind.patches)}
        return fit(state, self._tower.spec, self._plan.after)
