"""Calibration of a model's probabilities: expected calibration error, Brier score, reliability bins."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 15
"""Bins of equal width over the probability of the chosen option."""


@dataclass(frozen=True)
class Bin:
    """A bin of questions whose chosen option has a probability in ``(low, high]``.

    Attributes:
        low: Lower bound.
        high: Upper bound.
        n: Number of questions.
        confidence: Their mean probability of the chosen option; 0 if there are none.
        accuracy: Their share of right answers; 0 if there are none.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Calibration of the softmax over the options.

    Attributes:
        ece: Expected calibration error (Naeini et al. 2015; Guo et al. 2017): mean over questions of the absolute
            difference of confidence and accuracy of their bin. Confidence is the probability of the most
            probable option.
        brier: Multi-class Brier score (Brier 1950): mean over questions of the summed squared differences between
            the probabilities and 1 for the true, 0 for the other options; 0 is perfect, 2 the worst.
        bins: Bins of a reliability diagram.
    """

    ece: float
    brier: float
    bins: list[Bin]


def calibration(
    probabilities: Sequence[Sequence[float]], true: Sequence[int], bins: int = BINS
) -> Calibration:
    """Compute the calibration over questions.

    Args:
        probabilities: Probabilities of each question's options, in order; their number may differ between questions.
        true: Index of the true option of each question.
        bins: Number of bins.
    """
    widest = max(map(len, probabilities))
    table = np.zeros((len(probabilities), widest))
    for row, values in zip(table, probabilities, strict=True):
        row[: len(values)] = values
    truth = np.zeros_like(table)
    truth[np.arange(len(table)), true] = 1
    confidence = table.max(axis=1)
    right = table.argmax(axis=1) == np.asarray(true)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    n = np.bincount(place, minlength=bins)
    of_bin = [
        np.bincount(place, weights=values, minlength=bins) for values in (confidence, right.astype(float))
    ]
    means = [np.divide(total, n, out=np.zeros(bins), where=n > 0) for total in of_bin]
    return Calibration(
        ece=float((n * np.abs(means[0] - means[1])).sum() / len(table)),
        brier=float(((table - truth) ** 2).sum(axis=1).mean()),
        bins=[
            Bin(i / bins, (i + 1) / bins, int(n[i]), float(means[0][i]), float(means[1][i]))
            for i in range(bins)
        ],
    )
