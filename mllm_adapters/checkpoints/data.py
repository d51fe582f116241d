"""Pure data, checked when it is made."""

from pydantic import BaseModel, ConfigDict


class Data(BaseModel):
    """Data that does not change and has no field but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")
