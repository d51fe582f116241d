"""The operations of a plan: how each target tensor is computed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from mgll_encoder import fold_normalisation, resample_positions, tower_state_dict
from mgll_encoder.spec import PixelRule
from mllm_adapters.checkpoint import Checkpoint
from mllm_adapters.contract import Operation, Plan, Step, VisionContract

POSITIONS = "embeddings.position_embedding.weight"
PATCHES = "embeddings.patch_embedding.weight"

REINIT_SEED = 0


def compute(plan: Plan, checkpoint: Checkpoint, steps: Sequence[Step]) -> Iterator[tuple[Step, Tensor]]:
    """The values of target tensors, one at a time.

    Args:
        plan: The plan that the steps belong to.
        checkpoint: Its source.
        steps: Those steps whose values are wanted, in the order in which they come.
    """
    tower = fitted_tower(plan) if any(s.operation == "tower" for s in steps) else {}
    for step in steps:
        value = OPERATIONS[step.operation](step, checkpoint, tower)
        yield step, value.to(getattr(torch, step.dtype))


def fitted_tower(plan: Plan) -> dict[str, Tensor]:
    """The plan's tower, resampled to the target's grid and folded to its normalisation; keys without prefix."""
    if plan.tower is None:
        return {}
    header, state = tower_state_dict(plan.tower, activation=plan.after.activation)
    return fit(state, header.spec, plan.after)


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


def _copy(step: Step, checkpoint: Checkpoint, _: Mapping[str, Tensor]) -> Tensor:
    assert step.source is not None
    return checkpoint.read(step.source)


def _tower(step: Step, _: Checkpoint, tower: Mapping[str, Tensor]) -> Tensor:
    assert step.source is not None
    return tower[step.source]


def _extend_rows(step: Step, checkpoint: Checkpoint, tower: Mapping[str, Tensor]) -> Tensor:
    rows = _copy(step, checkpoint, tower)
    mean = rows.double().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(step.shape[0] - rows.shape[0], -1)])


def _reinit(step: Step, _: Checkpoint, __: Mapping[str, Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(REINIT_SEED)
    return torch.randn(step.shape, generator=generator) / sqrt(step.shape[-1])


def _zeros(step: Step, _: Checkpoint, __: Mapping[str, Tensor]) -> Tensor:
    return torch.zeros(step.shape)


OPERATIONS: Mapping[Operation, Callable[[Step, Checkpoint, Mapping[str, Tensor]], Tensor]] = {
    "keep": _copy,
    "rename": _copy,
    "tower": _tower,
    "extend_rows": _extend_rows,
    "reinit": _reinit,
    "zeros": _zeros,
}
