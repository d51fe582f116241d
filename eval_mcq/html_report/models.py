"""How the models of a report were made: training curves, training runs and alignments, from the records of the runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval_mcq.records.model_history import AlignmentSummary, FittedConnector, TrainingSummary
from eval_mcq.records.run_record import Run
from mgll_encoder.common.trained_on import Curve


@dataclass(frozen=True)
class TrainingCurve:
    """A curve, and the arms whose models were trained so.

    Attributes:
        title: What was trained, and by which command.
        value: What was measured: ``loss`` or ``score``.
        arms: Indices of the arms.
        points: (optimizer step, value).
    """

    title: str
    value: str
    arms: tuple[int, ...]
    points: Curve


@dataclass(frozen=True)
class Models:
    """What the runs record about their models; arms that record the same are listed together.

    Attributes:
        curves: Training curves.
        trainings: Arms, and one of their training runs.
        alignments: Arms, their alignment, and one of its connector layers.
    """

    curves: Sequence[TrainingCurve]
    trainings: Sequence[tuple[str, TrainingSummary]]
    alignments: Sequence[tuple[str, AlignmentSummary, FittedConnector]]

    def __bool__(self) -> bool:
        return bool(self.trainings or self.alignments)


def models_of(arms: Mapping[str, Run]) -> Models:
    """Collect the histories of all arms."""
    trainings: dict[TrainingSummary, list[int]] = {}
    alignments: dict[AlignmentSummary, list[int]] = {}
    for arm, run in enumerate(arms.values()):
        if not (history := run.record.history):
            continue
        for training in dict.fromkeys(history.trainings):
            trainings.setdefault(training, []).append(arm)
        if history.alignment:
            alignments.setdefault(history.alignment, []).append(arm)
    names = list(arms)

    def named(places: Sequence[int]) -> str:
        return "; ".join(names[place] for place in places)

    return Models(
        curves=[
            TrainingCurve(one.title, value, tuple(places), points)
            for one, places in trainings.items()
            for value, points in (("loss", one.losses), ("score", one.scores))
            if points
        ],
        trainings=[(named(places), one) for one, places in trainings.items()],
        alignments=[
            (named(places), one, fit) for one, places in alignments.items() for fit in one.connectors
        ],
    )
