"""Models of this project's families on this machine, answered by its own engine."""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from eval_mcq.backends.base import Identity, WayName
from eval_mcq.backends.fingerprint import code_version, model_fingerprint, package_versions
from eval_mcq.backends.model_folder import ModelFolder
from mgll_encoder.common.errors import InvalidArgumentError

if TYPE_CHECKING:
    from eval_mcq.scoring.score import Scorer

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalModel(ModelFolder):
    """A model folder that `mllm_adapters.load_mllm` reads.

    Attributes:
        four_bit: Load NF4 weights.
        way: What is shared between questions.
    """

    four_bit: bool = False
    way: WayName = "auto"

    @property
    def number_format(self) -> str:
        """Number format, and quantization if any, for the record of a run."""
        return super().number_format + (", nf4" if self.four_bit else "")

    @cached_property
    def identity(self) -> Identity:
        """What its answers depend on; hashes the folder.

        Raises:
            UserError: it is not a model folder.
        """
        sha256 = model_fingerprint(self.folder)
        return Identity(self.named, sha256, self.number_format, code_version(), package_versions())

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
        if self.four_bit and not getattr(model, "is_quantized", False):
            raise InvalidArgumentError(
                f"{self.folder} is not in the transformers layout, so it cannot be loaded in 4 bit: convert it "
                "first with `convert()`"
            )
        return Scorer(model, processor, where.device, where.dtype, self.mode, self.way)

    def _quantization(self) -> Any:
        if not self.four_bit:
            return None
        from mgll_encoder.common.texts import read_json
        from mllm_adapters import nf4

        config = self.folder / "config.json"
        return nf4(read_json(config) if config.is_file() else {}, self.folder, self.placement.dtype)
