"""The interface of a backend: what identifies its answers, known before anything heavy is loaded.

To add one: an `Answerer` (`eval_mcq.scoring.answerer`) that turns questions and images into scores, and a `Backend` in
this folder that describes and loads it. Batches, resuming, shards, merging, tables and reports need nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from eval_mcq.records.backend_record import BackendRecord
    from eval_mcq.scoring.answerer import Answerer
    from eval_mcq.scoring.prompt import Mode

WayName = Literal["auto", "prefix", "tree", "plain"]
EngineName = Literal["auto", "prefix", "tree", "plain", "vllm"]


@dataclass(frozen=True)
class Identity:
    """What the answers of a backend depend on, for the record of a run.

    Attributes:
        model: The model: its folder, or its name at a server.
        model_sha256: Hash of its files; empty if they are not known.
        dtype: Number format of its weights, and quantization if any; empty if not known.
        code: Versions that decide the numbers.
        versions: Package versions, for the reader.
        backend: The program that answers; None for this project's engine, whose version is in ``code``.
    """

    model: str
    model_sha256: str
    dtype: str
    code: str
    versions: Mapping[str, str]
    backend: "BackendRecord | None" = None


class Backend(Protocol):
    """Something that answers questions.

    Attributes:
        mode: The scoring mode in which it answers.
    """

    @property
    def mode(self) -> "Mode":
        """The scoring mode in which it answers."""

    @property
    def folder(self) -> Path | None:
        """The model's folder, which may tell what it was trained on; None if there is none on this machine."""

    @property
    def identity(self) -> Identity:
        """What its answers depend on.

        Raises:
            UserError: the model does not exist or cannot be read.
        """

    def load(self) -> "Answerer[Any]":
        """Load the model, or connect to the server.

        Raises:
            UserError: that fails for a reason that the user can change.
        """
