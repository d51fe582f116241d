"""The steps of a plan, and their operations: how a target tensor is computed, its label, and its inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, isqrt, sqrt
from typing import Annotated, Literal, Self
from zlib import crc32

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from mgll_encoder import resample_positions
from mgll_encoder.common.errors import MismatchError
from mllm_adapters.checkpoints.data import Data

OperationName = Literal[
    "keep", "rename", "same", "tower", "slice", "concat", "reshape", "resample", "lora",
    "extend_rows", "reinit", "zeros", "ones", "identity", "fit", "trained",
]  # fmt: skip
"""An operation as it stands in a plan, see `OPERATIONS`."""


@dataclass(frozen=True)
class Operation:
    """How a target tensor is made.

    Attributes:
        name: Name in a plan and in the record of a swap.
        label: Label in the table of a plan.
        compute: Computes the tensor from the step and its sources' values; None if the values are given when
            the plan is executed.
        copies_bytes: Whether the bytes of the source tensor are unchanged.
        in_place: Whether they also keep their name: a file with only such tensors is hard-linked.
        from_base: Whether the result follows from the source checkpoint alone.
        from_tower: Whether the sources are those of the plan's tower.
        sources: Minimum and maximum number of source tensors.
        arguments: Required keys of `Step.arguments`.
    """

    name: OperationName
    label: str
    compute: "Callable[..., Tensor] | None"
    copies_bytes: bool = False
    in_place: bool = False
    from_base: bool = False
    from_tower: bool = False
    sources: tuple[float, float] = (0, 0)
    arguments: frozenset[str] = field(default=frozenset())

    def check(self, step: "Step") -> None:
        """Refuse a step that does not fit this operation.

        Raises:
            ValueError: it has too few or too many sources, or lacks arguments.
        """
        fewest, most = self.sources
        if not fewest <= len(step.sources) <= most:
            raise ValueError(f"{step.name}: operation '{self.name}' cannot read {len(step.sources)} tensors")
        if missing := self.arguments - step.arguments.keys():
            raise ValueError(f"{step.name}: operation '{self.name}' lacks {', '.join(sorted(missing))}")


def mean_rows(rows: Tensor, number: int) -> Tensor:
    """Return ``number`` rows, each the mean of ``rows``, in their dtype."""
    return rows.double().mean(dim=0, keepdim=True).to(rows.dtype).expand(number, -1)


def _copy(_: "Step", value: Tensor) -> Tensor:
    return value


def _same(step: "Step", value: Tensor, *aliases: Tensor) -> Tensor:
    for name, alias in zip(step.sources[1:], aliases, strict=True):
        if not torch.equal(value, alias):
            raise MismatchError(
                f"{step.sources[0]} and {name} are two names of one tensor, but hold different values: the file is "
                "damaged or was edited; download it again"
            )
    return value


def _slice(step: "Step", fused: Tensor) -> Tensor:
    groups, units, start, stop = (int(step.arguments[name]) for name in ("groups", "units", "start", "stop"))
    parts = fused.reshape(groups, units, -1, *fused.shape[1:])
    return parts[:, start:stop].reshape(step.shape)


def _concat(step: "Step", first: Tensor, *others: Tensor) -> Tensor:
    missing = step.shape[0] - sum(len(part) for part in (first, *others))
    return torch.cat([first, first.new_zeros(missing, *first.shape[1:]), *others])


def _reshape(step: "Step", value: Tensor) -> Tensor:
    return value.reshape(step.shape)


def _resample(step: "Step", table: Tensor) -> Tensor:
    leading, (rows, width) = int(step.arguments["leading"]), step.shape[-2:]
    fine = table.reshape(-1, width).to(torch.promote_types(table.dtype, torch.float32))
    return resample_positions(fine, isqrt(rows - leading), leading=leading).reshape(step.shape)


def _lora(step: "Step", base: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return base.float() + step.arguments["scale"] * (up.float() @ down.float())


def _extend_rows(step: "Step", rows: Tensor) -> Tensor:
    return torch.cat([rows, mean_rows(rows, step.shape[0] - len(rows))])


def _reinit(step: "Step") -> Tensor:
    # By name, so that two tensors of one shape (such as keys and values) do not start equal.
    generator = torch.Generator().manual_seed(crc32(step.name.encode()))
    return torch.randn(step.shape, generator=generator) / sqrt(step.shape[-1])


def _zeros(step: "Step") -> Tensor:
    return torch.zeros(step.shape)


def _ones(step: "Step") -> Tensor:
    return torch.ones(step.shape)


def _identity(step: "Step") -> Tensor:
    return torch.eye(*step.shape)


_ONE, _SOME, _ANY = (1, 1), (1, inf), (0, inf)

KEEP = Operation(
    "keep", "kept as they are", _copy, copies_bytes=True, in_place=True, from_base=True, sources=_ONE
)
RENAME = Operation("rename", "kept under a new name", _copy, copies_bytes=True, from_base=True, sources=_ONE)
SAME = Operation("same", "kept once of several names", _same, from_base=True, sources=_SOME)
"""The source tensor's values, which the file contains under several names; they must be equal."""

TOWER = Operation("tower", "from the tower", _copy, from_tower=True, sources=_ONE)
"""A tensor of the plan's tower, adapted to the target's grid and normalization."""

EXTEND_ROWS = Operation(
    "extend_rows",
    "extended by rows (each the mean of the old rows)",
    _extend_rows,
    from_base=True,
    sources=_ONE,
)
REINIT = Operation("reinit", "re-initialized", _reinit)
"""Random values, because the width of the input has changed."""

ZEROS = Operation("zeros", "set to zero", _zeros)
ONES = Operation("ones", "set to one", _ones)
"""Scale of a normalization next to a re-initialized layer."""

IDENTITY = Operation("identity", "set to the identity", _identity)
FIT = Operation("fit", "fitted on images", None)
"""See `mllm_adapters.alignment.align`."""

SLICE = Operation(
    "slice", "cut out of fused tensors", _slice, from_base=True, sources=_ONE,
    arguments=frozenset({"groups", "units", "start", "stop"}),
)  # fmt: skip
"""Part of the rows of a fused tensor: viewed as [groups, units, rows, ...], units start to stop of every group.
``chunk(3)[0]`` is groups=1, units=3, start=0, stop=1."""

CONCAT = Operation("concat", "joined", _concat, from_base=True, sources=_SOME)
"""The sources concatenated along rows, with zeros between the first and the last."""

RESHAPE = Operation("reshape", "kept in another shape", _reshape, from_base=True, sources=_ONE)
RESAMPLE = Operation(
    "resample", "position tables resampled", _resample, from_base=True, sources=_ONE,
    arguments=frozenset({"leading"}),
)  # fmt: skip
"""A position table [..., leading + N, C], with its square grid resampled bicubically."""

LORA = Operation(
    "lora", "merged with LoRA", _lora, from_base=True, sources=(3, 3), arguments=frozenset({"scale"})
)
"""base + scale * B @ A, of the sources (base, A, B)."""

TRAINED = Operation("trained", "trained", None, sources=_ANY)
"""Values from a later training instead of the source tensor's; does not occur in plans of swaps."""

OPERATIONS: Mapping[str, Operation] = {
    operation.name: operation
    for operation in (
        KEEP, RENAME, SAME, TOWER, EXTEND_ROWS, REINIT, ZEROS, ONES, IDENTITY, FIT, SLICE, CONCAT, RESHAPE, RESAMPLE,
        LORA, TRAINED,
    )
}  # fmt: skip
"""All operations by name, in the order of a plan's table."""


def _known_dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"'{name}' is not a torch dtype")
    return name


class Step(Data):
    """One target tensor.

    Attributes:
        name: Key in the target checkpoint.
        dtype: Torch dtype name, such as ``float16``.
        shape: Target shape.
        operation: Name of the operation that makes it, see `OPERATIONS`.
        sources: Keys in the source checkpoint (``PART/KEY`` in an attached part) or, for ``tower``, in the
            tower; empty if nothing is read.
        replaces: Key of the source tensor that it replaces without using its values, if any.
        arguments: Further inputs of the operation, see `Operation`.
    """

    name: str
    dtype: Annotated[str, AfterValidator(_known_dtype)]
    shape: tuple[Annotated[int, Field(ge=0, lt=2**48)], ...]
    operation: OperationName
    sources: tuple[str, ...] = ()
    replaces: str | None = None
    arguments: dict[str, float] = Field(default_factory=dict)

    @property
    def kind(self) -> Operation:
        """Return the operation object."""
        return OPERATIONS[self.operation]

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        self.kind.check(self)
        return self
