"""The header of a tower: what is known without reading its weights, and its tensors one at a time."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mgll_encoder.common.errors import UnsupportedCheckpointError
from mgll_encoder.tower.adapt import fit_positions
from mgll_encoder.tower.architectures import ARCHITECTURES
from mgll_encoder.tower.architectures.base import Architecture
from mgll_encoder.tower.keymap import KeyPlan, joined
from mgll_encoder.tower.spec import TowerSpec
from mgll_encoder.weights.finite import all_finite
from mgll_encoder.weights.torch_file import WeightSet
from mgll_encoder.weights.weight_file import WeightFile

Origin = Literal["stored", "option", "default", "architecture"]


@dataclass(frozen=True)
class StoredTower:
    """The opened files of a tower, and how their tensors map to those of a transformers model.

    Attributes:
        checkpoint: The files.
        plan: Where their keys go.
        grid: Patches along one side of the model's position table.
    """

    checkpoint: WeightFile
    plan: KeyPlan
    grid: int

    def read(self, name: str, *, as_stored: bool) -> Tensor:
        """Read one tensor, by its name in the model."""
        parts = []
        for source, fused in self.checkpoint.read(self.plan.sources[name]).items():
            place = self.plan.taken[source]
            parts.append(place.cut(fused)[place.targets.index(name)])
        tensor = joined(parts)
        return tensor if as_stored else self._fitted(name, tensor)

    def read_all(self) -> dict[str, Tensor]:
        """Read all tensors, by their names in the model."""
        state = self.plan.apply(self.checkpoint.read(self.plan.taken))
        return {name: self._fitted(name, tensor) for name, tensor in state.items()}

    def _fitted(self, name: str, tensor: Tensor) -> Tensor:
        if name != self.plan.architecture.positions:
            return tensor
        return fit_positions(tensor, self.plan.architecture, self.grid)


@dataclass(frozen=True)
class TowerHeader:
    """An opened tower: what is known without reading its weights, and its tensors one at a time.

    Attributes:
        spec: The tower's specification.
        tensors: Name in the loaded model -> dtype and shape as stored.
        dropped: Tensors of the source that are left out, counted per group.
        layout: Format of the source, in words.
        source: The file or folder.
        files: Its weight files.
        activation_source: Where the activation comes from.
        preprocessing_source: Where mean, std and resize rule come from.
        warnings: What the user should know, one sentence each; empty if nothing was assumed.
        weights: Which of two sets of weights in the source these are; None if there is only one.
        stored: The opened files; None for a tower made in memory.
    """

    spec: TowerSpec
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    dropped: dict[str, int]
    layout: str
    source: Path
    files: tuple[Path, ...]
    activation_source: Origin
    preprocessing_source: Origin
    warnings: tuple[str, ...] = ()
    weights: WeightSet | None = None
    stored: StoredTower | None = field(default=None, repr=False, compare=False)

    def read(self, name: str, *, as_stored: bool = False) -> Tensor:
        """Read one tensor by its name in the loaded model, in its stored dtype.

        Args:
            name: The name.
            as_stored: Return a position table without resampling.

        Raises:
            UserError: it is not finite, or the file has been truncated.
        """
        assert self.stored is not None, "a tower in memory has no file"
        tensor = self.stored.read(name, as_stored=as_stored)
        check_finite(name, tensor, self.source)
        return tensor

    @property
    def architecture(self) -> Architecture:
        """Architecture of the tower."""
        return ARCHITECTURES[self.spec.architecture]

    @property
    def parameters(self) -> int:
        """Number of weights of the tower, without the projection."""
        return sum(torch.Size(shape).numel() for _, shape in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The stored dtypes, e.g. ``("float16",)``."""
        return tuple(sorted({str(dtype).removeprefix("torch.") for dtype, _ in self.tensors.values()}))


def check_finite(name: str, tensor: Tensor, path: Path) -> None:
    """Reject a tensor with values that are not finite.

    Raises:
        UserError: it has some.
    """
    if not all_finite(tensor):
        raise UnsupportedCheckpointError(
            f"{path}: tensor '{name}' contains NaN or infinite values: expected finite weights; "
            "use an earlier checkpoint of this training"
        )
