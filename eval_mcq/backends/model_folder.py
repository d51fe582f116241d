"""A model folder, and where and in which number format it is computed on this machine."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mgll_encoder.common.devices import Precision, find_device

if TYPE_CHECKING:
    import torch

    from eval_mcq.scoring.prompt import Mode


@dataclass(frozen=True)
class Placement:
    """Where and in which number format a model is computed."""

    device: "torch.device"
    dtype: "torch.dtype"


@dataclass(frozen=True)
class ModelFolder:
    """A model folder.

    Attributes:
        folder: The folder.
        name: Its name as given, such as a hub id; that of the folder if empty.
        mode: Scoring mode.
        device: Device, or ``auto``.
        dtype: Number format, or ``auto``: bfloat16 on a GPU, else float32.
    """

    folder: Path
    name: str = ""
    mode: "Mode" = "letters"
    device: str = "auto"
    dtype: Precision = "auto"

    @property
    def named(self) -> str:
        """Its name, for the record of a run."""
        return self.name or str(self.folder)

    @cached_property
    def placement(self) -> Placement:
        """Device and number format.

        Raises:
            UserError: there is no such device.
        """
        import torch

        chosen = find_device(self.device)
        if self.dtype == "auto":
            return Placement(chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32)
        return Placement(chosen, getattr(torch, self.dtype))

    @property
    def number_format(self) -> str:
        """Number format, for the record of a run."""
        return str(self.placement.dtype).removeprefix("torch.")
