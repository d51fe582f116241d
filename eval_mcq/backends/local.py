"""Models of this project's families on this machine, answered by its own engine."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_mcq.backends.base import Identity, WayName
from eval_mcq.backends.fingerprint import code_version, model_fingerprint, package_versions
from mgll_encoder.common.devices import Precision, find_device
from mgll_encoder.common.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch

    from eval_mcq.scoring.prompt import Mode
    from eval_mcq.scoring.score import Scorer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where and in which number format a model is computed."""

    device: "torch.device"
    dtype: "torch.dtype"
    four_bit: bool = False

    @property
    def number_format(self) -> str:
        """Number format, for the record of a run."""
        return str(self.dtype).removeprefix("torch.") + (", nf4" if self.four_bit else "")


def placement(device: str = "auto", dtype: Precision = "auto", four_bit: bool = False) -> Placement:
    """Choose device and number format.

    Raises:
        UserError: there is no such device.
    """
    import torch

    chosen = find_device(device)
    if dtype == "auto":
        return Placement(chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32, four_bit)
    return Placement(chosen, getattr(torch, dtype), four_bit)


@dataclass(frozen=True)
class LocalModel:
    """A model folder that `mllm_adapters.load_mllm` reads.

    Attributes:
        folder: The folder.
        mode: Scoring mode.
        device: Device, or ``auto``.
        dtype: Number format, or ``auto``.
        four_bit: Load NF4 weights.
        way: What is shared between questions.
        name: Its name as given, such as a hub id; that of the folder if empty.
    """

    folder: Path
    mode: "Mode" = "letters"
    device: str = "auto"
    dtype: Precision = "auto"
    four_bit: bool = False
    way: WayName = "auto"
    name: str = ""

    @cached_property
    def placement(self) -> Placement:
        """Device and number format.

        Raises:
            UserError: there is no such device.
        """
        return placement(self.device, self.dtype, self.four_bit)

    @cached_property
    def identity(self) -> Identity:
        """What its answers depend on; hashes the folder.

        Raises:
            UserError: it is not a model folder.
        """
        sha256 = model_fingerprint(self.folder)
        named = self.name or str(self.folder)
        return Identity(named, sha256, self.placement.number_format, code_version(), package_versions())

    def load(self) -> "Scorer":
        """Load the model.

        Raises:
            UserError: it cannot be loaded, or not in this number format.
        """
        from eval_mcq.scoring.score import Scorer
        from mllm_adapters import load_mllm

        where = self.placement
        _logger.info(f"Loading {self.folder} on {where.device} ...")
        model, processor = load_mllm(self.folder, dtype=where.dtype, quantization=self._quantization())
        if where.four_bit and not getattr(model, "is_quantized", False):
            raise InvalidArgumentError(
                f"{self.folder} is not in the transformers layout, so it cannot be loaded in 4 bit: convert it "
                "first with `convert()`"
            )
        return Scorer(model, processor, where.device, where.dtype, self.mode, self.way)

    def _quantization(self) -> Any:
        if not self.placement.four_bit:
            return None
        from mgll_encoder.common.texts import read_json
        from mllm_adapters import nf4

        config = self.folder / "config.json"
        return nf4(read_json(config) if config.is_file() else {}, self.folder, self.placement.dtype)
