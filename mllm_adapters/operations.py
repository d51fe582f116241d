"""The operations of a plan: how each target tensor is computed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from math import isqrt, sqrt
from typing import cast
from zlib import crc32

import torch
from torch import Tensor

from mgll_encoder import TowerHeader, fold_normalisation, inspect_tower, resample_positions
from mgll_encoder.common.errors import UserError
from mgll_encoder.spec import Activation, PixelRule
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.contract import Operation, Plan, Step, VisionContract

POSITIONS = "embeddings.position_embedding.weight"
PATCHES = "embeddings.patch_embedding.weight"


def compute(
    plan: Plan, checkpoint: Checkpoint, steps: Sequence[Step], fitted: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[Step, Tensor]]:
    """The values of target tensors, one at a time.

    Args:
        plan: The plan that the steps belong to.
        checkpoint: Its source.
        steps: Those steps whose values are wanted, in the order in which they come.
        fitted: Values of the steps whose operation is ``fit``, by name.
    """
    tower = FittedTower(plan)
    for step in steps:
        if step.operation == "fit":
            assert fitted is not None, "a plan with fitted tensors is executed with their values"
            yield step, fitted[step.name].to(getattr(torch, step.dtype))
            continue
        read = tower.read if step.operation == "tower" else checkpoint.read
        given = [read(name) for name in step.sources]
        yield step, OPERATIONS[step.operation](step, *given).to(getattr(torch, step.dtype))


def fitted_tower(plan: Plan) -> dict[str, Tensor]:
    """The plan's tower, resampled to the target's grid and folded to its normalisation; keys without prefix."""
    tower = open_tower(plan)
    if tower is None:
        return {}
    return fit({name: tower.read(name) for name in tower.tensors}, tower.spec, plan.after)


def open_tower(plan: Plan) -> TowerHeader | None:
    """The tower of a plan, opened now unless the plan holds it opened; None where it has none.

    Raises:
        UserError: it cannot be read.
    """
    if plan.tower is None or plan.opened is not None:
        return plan.opened
    activation = cast(Activation, plan.after.activation)  # checked there
    return inspect_tower(plan.tower, activation=activation, weights=plan.tower_weights)


def fit(state: Mapping[str, Tensor], trained: PixelRule, contract: VisionContract) -> dict[str, Tensor]:
    """Fit a tower that was trained with the pixels of ``trained`` to the grid and pixels of a vision contract.

    What is computed comes out in float32 at least: the host's dtype may be finer than the tower's.
    """
    fitted = dict(state)
    for name in (POSITIONS, PATCHES):
        fitted[name] = state[name].to(torch.promote_types(state[name].dtype, torch.float32))
    fitted[POSITIONS] = resample_positions(fitted[POSITIONS], contract.image_size // contract.patch_size)
    fitted[PATCHES], fitted[POSITIONS] = fold_normalisation(
        fitted[PATCHES],
        fitted[POSITIONS],
        trained=(trained.mean, trained.std),
        given=(contract.mean, contract.std),
    )
    return fitted


class FittedTower:
    """What `fitted_tower` gives, one tensor at a time; the tower is opened when the first is read."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def read(self, name: str) -> Tensor:
        """The tensor of a key without prefix."""
        return self._input_side[name] if name in (POSITIONS, PATCHES) else self._tower.read(name)

    @cached_property
    def _tower(self) -> TowerHeader:
        tower = open_tower(self._plan)
        assert tower is not None, "a plan with steps of a tower names it"
        return tower

    @cached_property
    def _input_side(self) -> dict[str, Tensor]:
        state = {name: self._tower.read(name) for name in (POSITIONS, PATCHES)}
        return fit(state, self._tower.spec, self._plan.after)


def mean_rows(rows: Tensor, number: int) -> Tensor:
    """``number`` rows, each the mean of ``rows``, in their dtype."""
    return rows.double().mean(dim=0, keepdim=True).to(rows.dtype).expand(number, -1)


def _copy(_: Step, value: Tensor) -> Tensor:
    return value


def _same(step: Step, value: Tensor, *aliases: Tensor) -> Tensor:
    for name, alias in zip(step.sources[1:], aliases, strict=True):
        if not torch.equal(value, alias):
            raise UserError(
                f"{step.sources[0]} and {name} are two names of one tensor, but hold different values: the file is "
                "damaged or was edited; download it again"
            )
    return value


def _slice(step: Step, fused: Tensor) -> Tensor:
    groups, units, start, stop = (int(step.arguments[name]) for name in ("groups", "units", "start", "stop"))
    parts = fused.reshape(groups, units, -1, *fused.shape[1:])
    return parts[:, start:stop].reshape(step.shape)


def _concat(step: Step, first: Tensor, *others: Tensor) -> Tensor:
    missing = step.shape[0] - sum(len(part) for part in (first, *others))
    return torch.cat([first, first.new_zeros(missing, *first.shape[1:]), *others])


def _reshape(step: Step, value: Tensor) -> Tensor:
    return value.reshape(step.shape)


def _resample(step: Step, table: Tensor) -> Tensor:
    leading, (rows, width) = int(step.arguments["leading"]), step.shape[-2:]
    fine = table.reshape(-1, width).to(torch.promote_types(table.dtype, torch.float32))
    return resample_positions(fine, isqrt(rows - leading), leading=leading).reshape(step.shape)


def _lora(step: Step, base: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return base.float() + step.arguments["scale"] * (up.float() @ down.float())


def _extend_rows(step: Step, rows: Tensor) -> Tensor:
    return torch.cat([rows, mean_rows(rows, step.shape[0] - len(rows))])


def _reinit(step: Step) -> Tensor:
    # By name, so that two tensors of one shape (keys and values, layer by layer) do not begin as the same.
    generator = torch.Generator().manual_seed(crc32(step.name.encode()))
    return torch.randn(step.shape, generator=generator) / sqrt(step.shape[-1])


def _zeros(step: Step) -> Tensor:
    return torch.zeros(step.shape)


def _ones(step: Step) -> Tensor:
    return torch.ones(step.shape)


def _identity(step: Step) -> Tensor:
    return torch.eye(*step.shape)


OPERATIONS: Mapping[Operation, Callable[..., Tensor]] = {
    "keep": _copy,
    "rename": _copy,
    "same": _same,
    "tower": _copy,
    "slice": _slice,
    "concat": _concat,
    "reshape": _reshape,
    "resample": _resample,
    "lora": _lora,
    "extend_rows": _extend_rows,
    "reinit": _reinit,
    "zeros": _zeros,
    "ones": _ones,
    "identity": _identity,
}
"""Operation -> function of the step and its sources' values."""
