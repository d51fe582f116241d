"""Computes the values of a plan's tensors from the source checkpoint and the tower."""

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
from mllm_adapters.core.contract import Plan, VisionContract
from mllm_adapters.core.operations import Step


def compute(
    plan: Plan, checkpoint: Checkpoint, steps: Sequence[Step], fitted: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[Step, Tensor]]:
    """Yield the values of target tensors.

    Args:
        plan: The plan that the steps belong to.
        checkpoint: Its source.
        steps: The steps to compute, in order.
        fitted: Values of the steps without computation (``fit``), by name.
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
    """Return the tower of a plan, opened if it is not already open; None if it has none.

    Raises:
        UserError: it cannot be read.
    """
    if plan.tower is None or plan.opened is not None:
        return plan.opened
    activation = cast(Activation, plan.after.activation)  # checked there
    return inspect_tower(plan.tower, activation=activation, weights=plan.tower_weights)


def fit(state: Mapping[str, Tensor], trained: TowerSpec, contract: VisionContract) -> dict[str, Tensor]:
    """Adapt a tower that was trained with the pixel rule ``trained`` to the grid and pixels of a vision contract.

    Results are at least float32, because the host's dtype may be finer than the tower's.
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
    """A plan's tower after `fit`, one tensor at a time; it is opened on first use."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def read(self, name: str) -> Tensor:
        """Return the tensor of a key without prefix."""
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
