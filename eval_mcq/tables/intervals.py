"""95 % intervals of shares, gains and averages that are valid for few questions, and for several questions per patient.

All are score intervals: unlike a bootstrap or a normal approximation they do not shrink to a point if every answer is
right, or no answer has changed. Questions on the same patient (or image) count less: their number is divided by the
design effect, estimated between patients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

CONFIDENCE = 0.95

FEWEST = 6
"""Minimum number of patients for a gain: if all answers of five change for the better, exact McNemar gives p = 0.06."""

_Z = float(norm.isf((1 - CONFIDENCE) / 2))

Floats = NDArray[np.float64]
Ids = NDArray[np.int_]


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A share, an average or a gain with its interval, on a 0-1 scale."""

    value: float
    interval: Interval


def wilson(right: float, n: float) -> Interval:
    """Compute the Wilson score interval of a share, valid at small n, 0 % and 100 % (Wilson 1927, JASA 22, 209-212).

    Args:
        right: Number of right answers; need not be an integer.
        n: Number of questions.
    """
    square = _Z**2
    middle = (right + square / 2) / (n + square)
    half = _Z / (n + square) * sqrt(max(right * (n - right), 0.0) / n + square / 4)
    return Interval(
        0.0 if right <= 0 else max(0.0, middle - half), 1.0 if right >= n else min(1.0, middle + half)
    )


def tango(gained: float, lost: float, n: float) -> Interval:
    """Compute the score interval of a paired difference of two shares (Tango 1998, Stat Med 17, 891-908).

    It contains all differences that the score test (equation 6 there, McNemar's for a difference of 0) does not reject.

    Args:
        gained: Number of questions that only the second model gets right; need not be an integer.
        lost: Number that only the first one gets right.
        n: Number of questions.
    """
    found = (gained - lost) / n

    def score(difference: float) -> float:
        # Maximum-likelihood share of lost questions, given the difference.
        b = (2 * n - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        lost_share = (sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * lost_share + difference * (1 - difference))
        return (gained - lost - n * difference) / sqrt(variance) if variance > 0 else 0.0

    edge = 1 - 1e-12
    low = brentq(lambda d: score(d) - _Z, -edge, found) if found > -edge else -1.0
    high = brentq(lambda d: score(d) + _Z, found, edge) if found < edge else 1.0
    return Interval(float(low), float(high))


def design_effect(residuals: Floats, sizes: Floats, groups: Ids) -> float:
    """Estimate the design effect: the variance of a sum relative to independent terms (Kish 1965).

    Estimated as between-group over independent variance (Rao and Scott 1992, Biometrics 48, 577-585), and clipped
    between 1 and its value if all terms of a group are equal. This upper bound is used if nothing can be estimated: if
    no term differs from the mean, or with fewer than `FEWEST` groups.

    Args:
        residuals: Terms minus their mean, shape ``(n,)``.
        sizes: Weight of each term, shape ``(n,)``.
        groups: Group of each term, shape ``(n,)``; any numbers.
    """
    _, group = np.unique(groups, return_inverse=True)
    count, n = int(group.max()) + 1, len(residuals)
    most = float((np.bincount(group, sizes) ** 2).sum() / (sizes**2).sum())
    independent = float((residuals**2).sum())
    if count < FEWEST or independent == 0:
        return most
    between = float((np.bincount(group, residuals) ** 2).sum()) * count / (count - 1)
    return float(np.clip(between / (independent * n / (n - 1)), 1.0, most))


def share(right: NDArray[np.bool_], patients: Ids) -> Estimate:
    """Estimate the share of right answers, shape ``(n,)``: Wilson with the effective number of questions."""
    values = right.astype(float)
    effective = _effective(values, patients)
    value = float(values.mean())
    return Estimate(value, wilson(value * effective, effective))


def gain(before: NDArray[np.bool_], after: NDArray[np.bool_], patients: Ids) -> Estimate:
    """Estimate the paired difference of two shares, each ``(n,)``: Tango with the effective number of questions."""
    change = after.astype(float) - before
    effective = _effective(change, patients)
    scale = effective / len(change)
    gained, lost = float((change > 0).sum()), float((change < 0).sum())
    return Estimate(float(change.mean()), tango(gained * scale, lost * scale, effective))


def mean(parts: Sequence[Estimate], values: Sequence[Floats], patients: Sequence[Ids]) -> Estimate:
    """Estimate the unweighted mean of shares or gains over diseases, from their intervals (square-and-add).

    The squared distances of the limits add up like variances (Newcombe 1998, Stat Med 17, 873-890; Zou, Huang and Zhang
    2009, Comput Stat Data Anal 53, 1080-1085). Patients with several diseases widen it by the design effect.

    Args:
        parts: The estimate of each disease.
        values: The answers of each disease (1 right, 0 wrong, or their difference), shape ``(n,)``.
        patients: The patients of these answers.
    """
    value = float(np.mean([part.value for part in parts]))
    totals, sizes, groups = [], [], []
    for of_disease, of_patients in zip(values, patients, strict=True):
        ids, group = np.unique(of_patients, return_inverse=True)
        groups.append(ids)
        sizes.append(np.bincount(group) / len(group))
        totals.append(np.bincount(group, of_disease - of_disease.mean()) / len(group))
    widened = sqrt(design_effect(np.concatenate(totals), np.concatenate(sizes), np.concatenate(groups)))
    below = _added([part.value - part.interval.low for part in parts], widened)
    above = _added([part.interval.high - part.value for part in parts], widened)
    return Estimate(value, Interval(value - below, value + above))


def _added(distances: Sequence[float], widened: float) -> float:
    """Return the distance of the mean's limit; at most that for perfectly correlated diseases."""
    return min(widened * sqrt(sum(d * d for d in distances)), sum(distances)) / len(distances)


def _effective(values: Floats, patients: Ids) -> float:
    """Return the number of independent questions with the same information."""
    return len(values) / design_effect(values - values.mean(), np.ones(len(values)), patients)
