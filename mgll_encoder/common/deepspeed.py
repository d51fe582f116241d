"""The fields of DeepSpeed's configuration that are used here; DeepSpeed checks the rest."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mgll_encoder.common.extras import require
from mgll_encoder.common.texts import read_as


class Zero(BaseModel):
    """The section ``zero_optimization``."""

    model_config = ConfigDict(extra="allow", frozen=True)

    stage: Literal[0, 1, 2, 3] = 0


class DeepSpeedConfig(BaseModel):
    """The configuration file."""

    model_config = ConfigDict(extra="allow", frozen=True)

    zero_optimization: Zero = Zero()
    gradient_accumulation_steps: int | Literal["auto"] = 1


def read_deepspeed(path: Path) -> DeepSpeedConfig:
    """Read a DeepSpeed configuration.

    Raises:
        UserError: DeepSpeed is not installed; the file cannot be read; or a field that is used has an invalid value.
    """
    require("deepspeed", f"deepspeed: {path}")
    return read_as(DeepSpeedConfig, path, "DeepSpeed configuration")
