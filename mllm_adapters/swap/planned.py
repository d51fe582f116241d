"""A planned swap or conversion: show it, write it, or load it."""

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from torch import Tensor

from mllm_adapters.checkpoints.checkpoint import Checkpoint
from mllm_adapters.core.contract import Family, Plan
from mllm_adapters.loading.delta import stored_names
from mllm_adapters.loading.load import check_complete, load_plan
from mllm_adapters.swap.apply import apply_plan, inputs
from mllm_adapters.swap.report import plan_table
from mllm_adapters.swap.writer import check_output

if TYPE_CHECKING:
    from mllm_adapters.alignment.align import Alignment

WIDTH = 120
"""Width of a text report in columns."""


@dataclass(frozen=True)
class Fitting:
    """Settings for fitting the connector on images: see `mllm_adapters.align`."""

    images: Path
    samples: int
    device: str


@dataclass
class SwapPlan:
    """A planned swap, or conversion; see `mllm_adapters.plan_swap`.

    Attributes:
        plan: The target's tensors, its configuration, and the vision contract before and after.
        family: The family that made the plan.
        checkpoint: The plan's source.
        name: Default name of the result's folder.
        warnings: Warnings about the tower.
        fitting: Settings for fitting the connector before anything is written; None for a plain swap.
        unfitted: The plan without fitting.
        alignment: The fitted connector layers.
    """

    plan: Plan
    family: Family
    checkpoint: Checkpoint
    name: str
    warnings: tuple[str, ...] = ()
    fitting: Fitting | None = None
    unfitted: Plan | None = None
    alignment: "Alignment | None" = None
    _complete: bool = field(default=False, repr=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes about assumptions and changes, one sentence each."""
        return self.plan.notes

    def held_by_delta(self, *, reference_tower: bool = False) -> set[str]:
        """Return the names of the tensors that `write_delta` stores."""
        return stored_names(self.plan.steps, reference_tower=reference_tower)

    def table(self, *, copy: bool = False, held: Collection[str] | None = None) -> RenderableType:
        """Return the changes, for a rich console; arguments as in `plan_table`."""
        return plan_table(self.plan, self.checkpoint, copy=copy, held=held)

    def report(self) -> str:
        """Return the changes as text: vision contract, tensors, connector, how it loads, notes and warnings."""
        text = io.StringIO()
        console = Console(file=text, width=WIDTH, highlight=False)
        console.print(self.table())
        for kind, lines in (("note", self.notes), ("warning", self.warnings)):
            for line in lines:
                console.print(f"{kind}: {line}", markup=False, soft_wrap=True)
        return text.getvalue()

    def check(self, out: Path | None = None, *, force: bool = False) -> None:
        """Compare the planned tensors with the planned model's, once, and check that ``out`` is free.

        Raises:
            UserError: a tensor would be missing, unexpected or of another shape; or ``out`` exists.
        """
        if out is not None:
            check_output(out, force, inputs(self.plan))
        if not self._complete:
            check_complete(self.plan)
            self._complete = True

    def to_fit(self, fitting: Fitting) -> "SwapPlan":
        """Return the plan with its connector to be fitted on images, which are found but not opened.

        Raises:
            UserError: too few images, no such device, or nothing to fit.
        """
        from mgll_encoder.common.devices import find_device
        from mllm_adapters.alignment.align import fitted_plan
        from mllm_adapters.alignment.feature_pairs import find_images

        find_images(fitting.images, fitting.samples)
        find_device(fitting.device)
        plan = fitted_plan(self.plan, self.family, self.checkpoint)
        return replace(self, plan=plan, unfitted=self.plan, fitting=fitting, _complete=False)

    def fit(self) -> "SwapPlan":
        """Return the plan with its connector fitted; itself if nothing remains to be fitted.

        Raises:
            UserError: the images or the old tower cannot be read.
        """
        if self.fitting is None or self.unfitted is None or self.alignment is not None:
            return self
        from mllm_adapters.alignment.align import align

        found = align(
            self.unfitted,
            self.family,
            self.checkpoint,
            self.fitting.images,
            samples=self.fitting.samples,
            device=self.fitting.device,
        )
        return replace(self, plan=found.apply_to(self.plan), alignment=found)

    def write(self, out: Path | str, *, force: bool = False, copy: bool = False) -> Path:
        """Write the whole checkpoint.

        Args:
            out: Folder that appears when everything is written and checked.
            force: Replace ``out`` if it exists.
            copy: Copy unchanged files instead of hard-linking them.

        Raises:
            UserError: ``out`` exists or cannot be written, or the source cannot be read.
        """
        ready = self._ready(Path(out), force)
        return ready._write(Path(out), force=force, copy=copy)

    def write_delta(
        self,
        out: Path | str,
        *,
        reference_tower: bool = False,
        force: bool = False,
    ) -> Path:
        """Write only the tensors that differ from the source.

        Args:
            out: Folder to write.
            reference_tower: Reference the tower by its hashes instead of storing it.
            force: Replace ``out`` if it exists.

        Raises:
            UserError: as in `write`.
        """
        from mllm_adapters.swap.delta_files import stored_alone

        ready = self._ready(Path(out), force)
        delta = stored_alone(ready.plan, self.checkpoint, ready._fitted, reference_tower=reference_tower)
        return ready._write(Path(out), force=force, **delta)

    def load(self, dtype: Any = "auto") -> tuple[Any, Any | None]:
        """Load the model in evaluation mode and its processor, as `load_mllm` does after `write`.

        Args:
            dtype: Torch dtype of the weights, or ``auto`` for the planned one.

        Raises:
            UserError: the source cannot be read.
        """
        ready = self.fit()
        return load_plan(ready.plan, self.family, self.checkpoint, dtype=dtype, fitted=ready._fitted)

    def _ready(self, out: Path, force: bool) -> "SwapPlan":
        self.check(out, force=force)
        return self.fit()

    @property
    def _fitted(self) -> Mapping[str, Tensor] | None:
        return self.alignment.tensors if self.alignment else None

    def _write(self, out: Path, **options: Any) -> Path:
        trainings = [self.alignment.training()] if self.alignment else []
        return apply_plan(
            self.plan, self.family, self.checkpoint, out,
            checked=True, fitted=self._fitted, trainings=trainings, **options,
        )  # fmt: skip
