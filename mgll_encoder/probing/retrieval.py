"""Image-text retrieval: recall of texts for images, and of images for texts.

Label texts repeat, so an image has several correct texts and a text many correct images: one of them among the k
nearest is a hit. With few distinct texts many hits are due to chance, so the recall of a random order is given, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from mgll_encoder.probing.linear import CONFIDENCE, REPLICATES, Estimate, resampled

DEPTHS = (1, 5, 10)
DIRECTIONS = ("image to text", "text to image")

_NEAREST = 1000
"""Number of nearest images of a text considered in the bootstrap; a replicate practically always contains k of them."""

_CELLS = 4_000_000


@dataclass(frozen=True)
class Retrieval:
    """Recall in one direction.

    Attributes:
        direction: One of `DIRECTIONS`.
        queries: Number of images, or of distinct texts.
        candidates: Number of items that are searched.
        recall: k -> share of queries with a hit among the k nearest, in %, with interval (bootstrap over patients).
        chance: k -> recall of a random order, in %.
    """

    direction: str
    queries: int
    candidates: int
    recall: dict[int, Estimate]
    chance: dict[int, float]


def retrieval(
    images: NDArray[np.floating],
    texts: NDArray[np.floating],
    truth: NDArray[np.bool_],
    patients: Sequence[str],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> tuple[Retrieval, Retrieval]:
    """Compute recall in both directions.

    If a correct and a wrong candidate are equally near, the wrong one counts as nearer: a collapsed tower, with equal
    features for everything, scores 0.

    Args:
        images: Normalized image features, [n, D].
        texts: Normalized features of the distinct texts, [u, D].
        truth: Whether a text is true of an image, [n, u]; each row and each column has at least one.
        patients: Patient of each image.
        replicates: Bootstrap replicates over patients; texts without a sampled image do not count in a replicate.
        seed: Seed of the bootstrap.
    """
    similar = images.astype(np.float32) @ texts.astype(np.float32).T
    first = _ranks(similar, truth)
    order = _nearest(similar, truth)
    right = np.take_along_axis(truth.T, order, axis=1)
    owners = np.asarray(patients)
    to_text = [float((first < k).mean()) for k in DEPTHS]
    to_image = _text_recall(order, right, truth, np.ones(len(images)))
    sampled: list[tuple[list[float], list[float]]] = []
    for weights in resampled(owners, replicates, seed, max(1, _CELLS // len(images))):
        for weight in weights:
            hits = [float(weight[first < k].sum() / weight.sum()) for k in DEPTHS]
            sampled.append((hits, _text_recall(order, right, truth, weight)))
    return (
        _summary(0, len(images), len(texts), to_text, [a for a, _ in sampled], truth),
        _summary(1, len(texts), len(images), to_image, [b for _, b in sampled], truth.T),
    )


def _ranks(similar: NDArray[np.float32], truth: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the number of candidates before the nearest correct one, per query, [n]."""
    best = np.where(truth, similar, -np.inf).max(axis=1, keepdims=True)
    before: NDArray[np.int64] = ((similar >= best) & ~truth).sum(axis=1)
    return before


def _nearest(similar: NDArray[np.float32], truth: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the images sorted for each text, nearest first, wrong before correct on ties; [u, nearest]."""
    columns = range(similar.shape[1])
    return np.stack([np.lexsort((truth[:, u], -similar[:, u]))[:_NEAREST] for u in columns])


def _text_recall(
    order: NDArray[np.int64], right: NDArray[np.bool_], truth: NDArray[np.bool_], weight: NDArray[np.float64]
) -> list[float]:
    """Return the share of texts with a correct image among the k nearest of the images with a weight above 0, [n].

    An image sampled twice is searched once: two copies of a wrong one would take two of k ranks.
    """
    here = weight[order] > 0  # [u, nearest]
    before = np.cumsum(here & ~right, axis=1)
    found = np.where(right & here, before, np.inf).min(axis=1)
    asked = weight @ truth > 0
    return [float((found[asked] < k).mean()) for k in DEPTHS]


def _summary(
    direction: int,
    queries: int,
    candidates: int,
    values: Sequence[float],
    sampled: Sequence[Sequence[float]],
    truth: NDArray[np.bool_],
) -> Retrieval:
    tail = (100 - CONFIDENCE) / 2
    low, high = np.nanpercentile(100 * np.array(sampled), [tail, 100 - tail], axis=0)
    return Retrieval(
        DIRECTIONS[direction],
        queries,
        candidates,
        {
            k: Estimate(100 * value, float(a), float(b))
            for k, value, a, b in zip(DEPTHS, values, low, high, strict=True)
        },
        {k: 100 * _chance(truth.sum(axis=1), candidates, k) for k in DEPTHS},
    )


def _chance(positives: NDArray[np.int64], candidates: int, k: int) -> float:
    """Return the mean probability that k random candidates include a correct one: 1 - C(N-P, k) / C(N, k)."""
    wrong = candidates - positives.astype(np.float64)
    k = min(k, candidates)
    with np.errstate(invalid="ignore"):
        missed = (
            gammaln(wrong + 1)
            - gammaln(wrong - k + 1)
            + gammaln(candidates - k + 1)
            - gammaln(candidates + 1)
        )
    return float(np.where(wrong >= k, 1 - np.exp(missed), 1.0).mean())
