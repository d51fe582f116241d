"""What identifies the program that answered a run, where it is not this project's own engine."""

import json

from pydantic import BaseModel, ConfigDict, JsonValue

from eval_mcq.items.schema import Text


class BackendRecord(BaseModel):
    """The program that answered, and what it was asked to do. Any difference is another run, but in ``told``.

    Attributes:
        name: The program: ``transformers``, ``vllm``, ``endpoint``.
        version: Its version, or that of the protocol.
        sent: What else decides the answers: settings, hashes, and formats. Never a secret.
        told: What a reader wants to know besides; does not count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    version: str
    sent: dict[str, JsonValue] = {}
    told: dict[str, JsonValue] = {}

    @property
    def text(self) -> str:
        """The same as one line, in the same order whatever that of ``sent``."""
        return f"{self.name} {self.version} {json.dumps(self.sent, sort_keys=True, ensure_ascii=False)}"
