"""A percentile bootstrap over patients: the reference for intervals with hundreds of patients."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval_mcq.tables.intervals import CONFIDENCE, Interval

REPLICATES = 2000


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
