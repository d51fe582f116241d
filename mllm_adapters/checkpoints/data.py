"""Immutable data, validated on construction."""

from pydantic import BaseModel, ConfigDict


class Data(BaseModel):
    """Immutable data without additional fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
