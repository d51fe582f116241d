"""``mgll_trained_on.json``: hashes of the images that the weights in a folder were trained on.

The file follows the weights from the tower to the swapped model and through every training run, so that a benchmark
can be checked against it, and a report can show the curves. It stores 64 bits of the hash of an image's content: no
name, no patient.
"""

import base64
import binascii
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from mgll_encoder.common.errors import BadDataError

TRAINED_ON = "mgll_trained_on.json"
"""File name, in the folder of a tower, a model or an adapter."""

TOWER = "tower"
"""Name of the part that a swap replaces."""

_DIGITS = 16  # hexadecimal digits of a hash that are stored: 64 bits
_STORED = np.dtype("<u8")

MOST_POINTS = 200
"""Maximum number of stored points of a training curve; longer ones are averaged in parts of equal length."""

Numbers = NDArray[np.uint64]
Curve = tuple[tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(allow_inf_nan=False)]], ...]
"""Points (optimizer step, value)."""


def as_numbers(digests: Iterable[str]) -> Numbers:
    """Return the first 64 bits of hexadecimal hashes, [n]."""
    return np.array([int(digest[:_DIGITS], 16) for digest in digests], _STORED)


def _from_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return np.frombuffer(base64.b64decode(value, validate=True), _STORED)
    except (binascii.Error, ValueError):
        raise ValueError("is not base64 of 8 bytes per image") from None


def _to_base64(numbers: Numbers) -> str:
    return base64.b64encode(numbers.astype(_STORED).tobytes()).decode()


class Training(BaseModel):
    """One training run.

    Attributes:
        parts: What was trained: ``tower``, ``projector``, ``language_model``.
        command: The command that trained.
        splits: For each data file, how its split was made, if recorded.
        images: 64 bits of the hash of each training image (`picture_digest`), sorted, [n]; base64 in the file.
        losses: Training loss over the steps, if recorded.
        scores: Score of the evaluations during training over the steps, if there were any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    parts: tuple[str, ...] = Field(min_length=1)
    command: str
    splits: tuple[dict[str, str | int | float], ...] = ()
    images: Annotated[Numbers, BeforeValidator(_from_base64), PlainSerializer(_to_base64)]
    losses: Curve = ()
    scores: Curve = ()

    @classmethod
    def of(
        cls, parts: Sequence[str], command: str, digests: Iterable[str], splits: Sequence[dict[str, Any]] = ()
    ) -> "Training":
        """Create the record of a training run on images with these hashes."""
        return cls(
            parts=tuple(parts), command=command, splits=tuple(splits), images=np.unique(as_numbers(digests))
        )

    def with_curves(self, losses: Curve, scores: Curve = ()) -> "Training":
        """Return the record with its curves, each of at most `MOST_POINTS` points."""
        return self.model_copy(update={"losses": thinned(losses), "scores": thinned(scores)})

    @property
    def title(self) -> str:
        """What was trained, and by which command, for display."""
        return f"{' and '.join(part.replace('_', ' ') for part in self.parts)} ({self.command})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Training) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]


def thinned(curve: Curve) -> Curve:
    """Average a curve in at most `MOST_POINTS` parts of equal length, each at its last step."""
    if len(curve) <= MOST_POINTS:
        return tuple((step, round(value, 6)) for step, value in curve)
    parts = np.array_split(np.array(curve), MOST_POINTS)
    return tuple((int(part[-1, 0]), round(float(part[:, 1].mean()), 6)) for part in parts)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    trainings: tuple[Training, ...]


def trainings_of(folder: Path) -> tuple[Training, ...]:
    """Read the recorded training runs of the weights in a folder; empty without a record.

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
        raise BadDataError(
            f"{file}: '{where}': {first['msg']}: restore the record of what the weights were trained on, or remove it"
        ) from None


def write_trainings(folder: Path, trainings: Iterable[Training]) -> None:
    """Write the record into a folder, without duplicates; nothing if there are no training runs."""
    if text := trainings_text(trainings):
        (folder / TRAINED_ON).write_text(text, encoding="utf-8")


def trainings_text(trainings: Iterable[Training]) -> str:
    """Return the text of the record, empty if there are no training runs."""
    different: list[Training] = []
    for training in trainings:
        if training not in different:
            different.append(training)
    return _File(trainings=tuple(different)).model_dump_json() + "\n" if different else ""


def without_tower(trainings: Iterable[Training]) -> tuple[Training, ...]:
    """Return the training runs that still apply after the trained tower has been replaced."""
    return tuple(training for training in trainings if training.parts != (TOWER,))
