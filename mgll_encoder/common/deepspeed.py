"""DeepSpeed's configuration, as far as it is looked at here; the rest is DeepSpeed's own to check."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mgll_encoder.common.extras import require
from mgll_encoder.common.texts import read_as


class Zero(BaseModel):
    """Its section ``zero_optimization``."""

    model_config = ConfigDict(extra="allow", frozen=True)

    stage: Literal[0, 1, 2, 3] = 0


class DeepSpeedConfig(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="allow", frozen=True)

    zero_optimization: Zero = Zero()
    gradient_accumulation_steps: int | Literal["auto"] = 1


def read_deepspeed(path: Path) -> DeepSpeedConfig:
    """A DeepSpeed configuration.

    Raises:
        UserError: DeepSpeed is not installed; the file cannot be read; or a field that is looked at has a value that it
            cannot have.
    """
    require("deepspeed", f"deepspeed: {path}")
    return read_as(DeepSpeedConfig, path, "DeepSpeed configuration")
