"""Intervals and tests for counts of right answers. All shares are on a 0-1 scale."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

CONFIDENCE = 0.95
REPLICATES = 2000


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


def wilson(right: int, n: int) -> Interval:
    """Wilson score interval of a share, sensible at small n and at 0 % and 100 % (Wilson 1927)."""
    interval = binomtest(right, n).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> float:
    """Two-sided exact McNemar p-value for two models on the same questions, shape ``(n,)`` each.

    Only questions that one model gets right and the other wrong count; without any, p is 1.
    """
    return exact_mcnemar(int((after & ~before).sum()), int((before & ~after).sum()))


def exact_mcnemar(gained: int, lost: int) -> float:
    """The same p-value from the numbers of questions gained and lost."""
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def p_of_guessing(right: int, questions: Mapping[int, int]) -> float:
    """Probability that guessing gets as many questions right, or more.

    Exact: binomial where all questions have the same number of options, Poisson-binomial where not.

    Args:
        right: Number of right answers.
        questions: Number of options to number of questions with so many.
    """
    *others, (options, n) = sorted(questions.items(), key=lambda entry: entry[1])
    chances = np.ones(1)  # of 0, 1, 2 ... right among the others
    for few_options, count in others:
        chances = np.convolve(chances, binom.pmf(np.arange(count + 1), count, 1 / few_options))
    beyond = binom.sf(right - 1 - np.arange(len(chances)), n, 1 / options)
    return min(1.0, float(chances @ beyond))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values, in the order given (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Replicates:
    """Bootstrap replicates of shares of right answers.

    Attributes:
        by_category: Shape ``(replicates, categories, arms)``; NaN where no question of a category was drawn.
        pooled: Shape ``(replicates, arms)``: all questions alike (micro).
    """

    by_category: NDArray[np.float64]
    pooled: NDArray[np.float64]

    @property
    def macro(self) -> NDArray[np.float64]:
        """Unweighted mean over categories, shape ``(replicates, arms)``."""
        return np.asarray(np.nanmean(self.by_category, axis=1))


def bootstrap(
    right: NDArray[np.bool_], categories: Sequence[str], clusters: Sequence[str],
    replicates: int = REPLICATES, seed: int = 0,
) -> Replicates:  # fmt: skip
    """Resample whole clusters (patients), so that questions that share a patient or an image stay together.

    Stratified: a cluster belongs to the rarest category among its questions, and each stratum keeps its
    number of clusters, so that small categories do not vanish. All arms see the same draws, so differences
    between arms are paired.

    Args:
        right: Shape ``(questions, arms)``.
        categories: Category of each question; output order is that of first appearance.
        clusters: Cluster of each question.
        replicates: Number of draws.
        seed: Seed of the draws.
    """
    names = list(dict.fromkeys(categories))
    sizes = Counter(categories)
    place = {name: i for i, name in enumerate(names)}
    column = np.array([place[category] for category in categories])
    cluster_ids = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    row = np.array([cluster_ids[cluster] for cluster in clusters])

    n = np.zeros((len(cluster_ids), len(names)))
    np.add.at(n, (row, column), 1)
    k = np.zeros((len(cluster_ids), len(names), right.shape[1]))
    np.add.at(k, (row, column), right)
    # Clusters with the same counts are the same to a draw: they are drawn as one pattern, as often as all of them.
    patterns, repeats = _patterns(np.concatenate([n, k.reshape(len(n), -1)], axis=1))
    n = patterns[:, : len(names)]
    k = patterns[:, len(names) :].reshape(len(patterns), len(names), -1)
    rarity = np.array([sizes[name] for name in names], dtype=float)
    stratum = np.where(n > 0, rarity, np.inf).argmin(axis=1)

    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(stratum == s) for s in np.unique(stratum)]
    by_category, pooled = [], []
    for draws in _chunks(replicates, len(patterns)):
        weights = np.zeros((draws, len(patterns)))
        for group in members:
            size = repeats[group].sum()
            weights[:, group] = generator.multinomial(size, repeats[group] / size, draws)
        drawn_n = weights @ n
        drawn_k = np.tensordot(weights, k, axes=1)
        with np.errstate(invalid="ignore"):
            by_category.append(drawn_k / drawn_n[:, :, None])
        pooled.append(drawn_k.sum(axis=1) / drawn_n.sum(axis=1)[:, None])
    return Replicates(np.concatenate(by_category), np.concatenate(pooled))


def _patterns(table: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Different rows of a table of counts, and how often each occurs."""
    counts = np.ascontiguousarray(table, dtype=np.uint32)
    keys = counts.view(
        np.dtype((np.void, counts.dtype.itemsize * counts.shape[1]))
    ).ravel()  # compared as bytes
    _, first, repeats = np.unique(keys, return_index=True, return_counts=True)
    return table[first], repeats


def _chunks(replicates: int, patterns: int) -> list[int]:
    """Numbers of replicates that keep the weights of a chunk near 32 MB."""
    size = max(1, 4_000_000 // patterns)
    return [min(size, replicates - start) for start in range(0, replicates, size)]


def percentile_interval(draws: NDArray[np.float64]) -> Interval:
    """Percentile interval of bootstrap replicates, shape ``(replicates,)``."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return Interval(float(low), float(high))
