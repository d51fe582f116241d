"""How a model was made, from the records in its folder: a copy for the record of a run, without names and paths."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from eval_mcq.records.leaks import trainings_of_model
from mgll_encoder.common.texts import checked
from mgll_encoder.common.trained_on import Curve

Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class TrainingSummary(BaseModel):
    """One training run.

    Attributes:
        title: What was trained, and by which command.
        images: Number of training images.
        losses: Training loss over the optimizer steps, if recorded.
        scores: Scores of the evaluations during training over the steps, if there were any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    images: Count
    losses: Curve = ()
    scores: Curve = ()


class FittedConnector(BaseModel):
    """A connector layer fitted in closed form; fields as in the table of ``swap-encoder --align``."""

    model_config = ConfigDict(frozen=True)

    connector: str
    r2: Finite
    r2_unaligned: Finite | None
    relative_error: Finite
    strength: Finite
    towards: str


class AlignmentSummary(BaseModel):
    """An alignment in closed form.

    Attributes:
        used: Number of images.
        held_out: Number of these that chose the ridge strength, and on which R² is measured.
        connectors: The fit of each connector layer.
    """

    model_config = ConfigDict(frozen=True)

    used: Count
    held_out: Count
    connectors: tuple[FittedConnector, ...]


class ModelHistory(BaseModel):
    """How a model was made, as far as its folder records it.

    Attributes:
        trainings: Its training runs, in order.
        alignment: The fit of its connector to a new tower; None without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trainings: tuple[TrainingSummary, ...] = ()
    alignment: AlignmentSummary | None = None


def history_of(model: Path) -> ModelHistory | None:
    """Read the records of a model folder, and of an adapter's base.

    Returns:
        The history; None if nothing is recorded.

    Raises:
        UserError: a record is damaged, or the base of an adapter is missing.
    """
    from mllm_adapters import (  # imports torch, which is not needed to read a run
        alignment_of,
        base_of_adapter,
    )

    # An adapter repeats the trainings of its base.
    trainings = dict.fromkeys(
        TrainingSummary(title=one.title, images=len(one.images), losses=one.losses, scores=one.scores)
        for one in trainings_of_model(model)
    )
    folder = base_of_adapter(model) or model
    found = alignment_of(folder)
    alignment = checked(AlignmentSummary, found, f"alignment in the record of {folder}") if found else None
    return ModelHistory(trainings=tuple(trainings), alignment=alignment) if trainings or alignment else None
