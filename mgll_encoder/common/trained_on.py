"""``mgll_trained_on.json``: which images the weights of a folder were trained on, told by hashes.

It goes with the weights from the tower to the model that the tower is put into, and on through every training, so that
a benchmark can be held against it. Of an image it keeps 64 bits of the hash of its content: no name, no patient.
"""

import base64
import binascii
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from mgll_encoder.common.errors import UserError

TRAINED_ON = "mgll_trained_on.json"
"""Name of the file, in the folder of a tower, a model or an adapter."""

TOWER = "tower"
"""The part that a swap replaces."""

_DIGITS = 16  # of a hash, in hexadecimal: 64 bits
_STORED = np.dtype("<u8")

Numbers = NDArray[np.uint64]


def as_numbers(digests: Iterable[str]) -> Numbers:
    """The first 64 bits of hashes in hexadecimal, [n]."""
    return np.array([int(digest[:_DIGITS], 16) for digest in digests], _STORED)


def _from_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return np.frombuffer(base64.b64decode(value, validate=True), _STORED)
    except (binascii.Error, ValueError):
        raise ValueError("is no base64 of 8 bytes per image") from None


def _to_base64(numbers: Numbers) -> str:
    return base64.b64encode(numbers.astype(_STORED).tobytes()).decode()


class Training(BaseModel):
    """One training.

    Attributes:
        parts: What learned: ``tower``, ``projector``, ``language_model``.
        command: The command that trained.
        splits: Of each data file, how its sides were drawn, as far as it says.
        images: 64 bits of the hash of each training image (`picture_digest`), sorted, [n]; base64 in the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    parts: tuple[str, ...] = Field(min_length=1)
    command: str
    splits: tuple[dict[str, str | int | float], ...] = ()
    images: Annotated[Numbers, BeforeValidator(_from_base64), PlainSerializer(_to_base64)]

    @classmethod
    def of(
        cls, parts: Sequence[str], command: str, digests: Iterable[str], splits: Sequence[dict[str, Any]] = ()
    ) -> "Training":
        """The record of a training that has seen images of these hashes."""
        return cls(
            parts=tuple(parts), command=command, splits=tuple(splits), images=np.unique(as_numbers(digests))
        )

    @property
    def title(self) -> str:
        """For people: what learned, and through which command."""
        return f"{' and '.join(part.replace('_', ' ') for part in self.parts)} ({self.command})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Training) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    trainings: tuple[Training, ...]


def trainings_of(folder: Path) -> tuple[Training, ...]:
    """The recorded trainings of the weights of a folder; none where it has no record.

    Raises:
        UserError: the record is damaged.
    """
    file = folder / TRAINED_ON
    if not file.is_file():
        return ()
    try:
        return _File.model_validate_json(file.read_bytes()).trainings
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UserError(
            f"{file}: '{where}': {first['msg']}: restore the record of what the weights were trained on, or remove it"
        ) from None


def write_trainings(folder: Path, trainings: Iterable[Training]) -> None:
    """Write the record into a folder, each training once; nothing where there is none."""
    if text := trainings_text(trainings):
        (folder / TRAINED_ON).write_text(text, encoding="utf-8")


def trainings_text(trainings: Iterable[Training]) -> str:
    """The text of the record, empty where there is no training."""
    different: list[Training] = []
    for training in trainings:
        if training not in different:
            different.append(training)
    return _File(trainings=tuple(different)).model_dump_json(indent=1) + "\n" if different else ""


def without_tower(trainings: Iterable[Training]) -> tuple[Training, ...]:
    """The trainings that still count where another tower has taken the place of the one that learned."""
    return tuple(training for training in trainings if training.parts != (TOWER,))
