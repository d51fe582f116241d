"""Determines a swapped tower's image size: from the host's tokens, from the user, or as a suggestion.

Families plan for a size in pixels. The number of visual tokens is read from their plans, so this module does
not depend on how a family merges patches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, isqrt
from pathlib import Path

from mgll_encoder import TowerHeader
from mgll_encoder.common.errors import InvalidArgumentError, UserError
from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Family, Plan, Target

USUAL_STRETCH = 2
"""Factor by which a tower's grid may grow or shrink along one side without a warning."""

PlanAt = Callable[[int | None], Plan]
"""Image size in pixels, or None to keep the host's patches -> the plan."""


@dataclass(frozen=True)
class Join:
    """How a model makes tokens from patches: ``side`` x ``side`` become one, plus ``extra`` tokens."""

    side: int
    extra: int

    def tokens(self, grid: int) -> int:
        """Return the tokens of ``grid`` x ``grid`` patches."""
        return (grid // self.side) ** 2 + self.extra


def plan_at_size(
    family: Family,
    checkpoint: Checkpoint,
    tower: TowerHeader,
    target: Target = "own",
    *,
    image_size: int | None = None,
    tokens: int | None = None,
) -> tuple[Plan, str | None]:
    """Plan a swap for a size in pixels or a number of visual tokens.

    Args:
        family: The checkpoint's family.
        checkpoint: The checkpoint.
        tower: The new tower.
        target: Layout to write.
        image_size: Input side in pixels.
        tokens: Visual tokens per image, or per tile if images are cut into tiles.

    Returns:
        The plan, and a warning if neither was given and the host's grid is far from the tower's.

    Raises:
        UserError: both were given, or no image size gives this number of tokens; and as `Family.plan`.
    """

    def plan_at(size: int | None) -> Plan:
        return family.plan(checkpoint, tower, size, target)

    if tokens is not None and image_size is not None:
        raise InvalidArgumentError(
            f"`tokens={tokens}` and `image_size={image_size}`: give one, it decides the other"
        )
    if tokens is not None:
        return _with_tokens(plan_at, tokens, family.spec.title), None
    plan = plan_at(image_size)
    return plan, None if image_size else _warning(plan, plan_at, tower)


def _with_tokens(plan_at: PlanAt, tokens: int, title: str) -> Plan:
    usual = plan_at(None)
    if usual.after.tokens == tokens:
        return usual
    join = _join(usual)
    if join is None or _is_fixed(usual, plan_at, join):
        raise _fixed(tokens, title, usual)
    root = isqrt(max(tokens - join.extra, 0))
    if root < 1 or root**2 + join.extra != tokens:
        near = (max(root, 1) ** 2 + join.extra, (root + 1) ** 2 + join.extra)
        besides = " and the class token" if join.extra else ""
        raise InvalidArgumentError(
            f"`tokens={tokens}`: {title} makes a square of tokens{besides} of an image: try "
            f"{' or '.join(str(n) for n in sorted(set(near)))}"
        )
    size = root * join.side * usual.after.patch_size
    try:
        return plan_at(size)
    except UserError as error:
        raise InvalidArgumentError(
            f"`tokens={tokens}` takes images of {size} px, which cannot be: {error}"
        ) from None


def _is_fixed(usual: Plan, plan_at: PlanAt, join: Join) -> bool:
    """Whether the number of tokens does not depend on the patches, as with a Q-Former or a perceiver."""
    grid = join.side if usual.after.grid > join.side else 2 * join.side
    try:
        return plan_at(grid * usual.after.patch_size).after.tokens != join.tokens(grid)
    except UserError:
        return False


def _fixed(tokens: int, title: str, usual: Plan) -> UserError:
    return InvalidArgumentError(
        f"`tokens={tokens}`: {title} reads an image into {usual.after.tokens} tokens whatever its size: leave `tokens` "
        "out, or choose the size in pixels with `image_size`"
    )


def _join(plan: Plan) -> Join | None:
    """Return how the plan's model makes tokens from patches; None if their number does not depend on patches."""
    extra = int(plan.after.class_token and plan.after.tokens == plan.after.grid**2 + 1)
    root = isqrt(plan.after.tokens - extra)
    if root < 1 or root**2 + extra != plan.after.tokens or plan.after.grid // root < 1:
        return None
    return Join(plan.after.grid // root, extra)


def _warning(plan: Plan, plan_at: PlanAt, tower: TowerHeader) -> str | None:
    """Return a warning if the host has far more, or far fewer, patches than the tower was trained with."""
    own, grid, patch = tower.spec.grid, plan.after.grid, plan.after.patch_size
    if own <= USUAL_STRETCH * grid and grid <= USUAL_STRETCH * own:
        return None
    join = _join(plan)
    side = join.side if join else 1
    size = ceil(own / side) * side * patch
    try:
        proposed = plan_at(size).after.tokens
    except UserError:
        return _told(tower.source, own, plan, "choose another size with `image_size` or `tokens`")
    way_out = f"`image_size={size}` keeps the tower's own ({proposed} tokens)"
    return _told(
        tower.source, own, plan, f"{way_out}; `tokens=N` or another `image_size` selects another size"
    )


def _told(source: Path, own: int, plan: Plan, way_out: str) -> str:
    grid, size = plan.after.grid, plan.after.image_size
    return (
        f"{source.name} was trained on {own}x{own} patches; to keep the host's {grid}x{grid} it runs at "
        f"{size} px, with positions stretched {grid / own:.1f} times, where features get poor: {way_out}"
    )
