"""Ranking metrics of texts for images, by which a checkpoint is chosen.

Ties get the average over random orders, so features that do not distinguish images score exactly chance: the share of
true pairs for the average precision, k of U texts for recall@k.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

KS = (1, 5)
"""The k of recall@k."""


def mean_average_precision(scores: NDArray[np.floating], truth: NDArray[np.bool_]) -> float:
    """Compute the multi-label average precision, macro over texts.

    Args:
        scores: Similarity of image i and text u, [N, U].
        truth: Whether the text is true of the image, [N, U].

    Returns:
        The mean over texts that are true of some images and not of all of them; NaN if there is none. Chance is
        the mean share of images that a text is true of.
    """
    informative = np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0))
    precisions = [average_precision_score(truth[:, u], scores[:, u]) for u in informative]
    return float(np.mean(precisions)) if precisions else float("nan")


def recall_at(k: int, scores: NDArray[np.floating], truth: NDArray[np.bool_]) -> float:
    """Compute the share of an image's true texts among the k most similar to it, mean over images.

    Args:
        k: Number of texts.
        scores: Similarity, [N, U].
        truth: Whether the text is true of the image, [N, U].

    Returns:
        The recall; NaN if no image has a text, or if k covers the whole vocabulary.
    """
    asked = truth.any(axis=1)
    if k >= scores.shape[1] or not asked.any():
        return float("nan")
    scores, truth = scores[asked], truth[asked]
    ordered = np.sort(scores, axis=1)
    hits = np.zeros(len(scores))
    for i, row in enumerate(scores):
        above = len(row) - np.searchsorted(ordered[i], row, side="right")
        equal = len(row) - above - np.searchsorted(ordered[i], row, side="left")
        hits[i] = np.clip((k - above) / equal, 0, 1)[truth[i]].mean()
    return float(hits.mean())


def ranking_metrics(
    scores: NDArray[np.floating],
    truth: NDArray[np.bool_],
    granularities: Sequence[str],
) -> dict[str, float]:
    """Compute the metrics of every granularity, each among its own texts, and their means.

    Args:
        scores: Similarity of N images and the U texts of the vocabulary, [N, U].
        truth: Whether a text is true of an image at a granularity, [G, N, U].
        granularities: Names of the G granularities.

    Returns:
        ``mAP`` and ``recall@k`` (means over granularities), ``mAP_<granularity>``, ``recall@k_<granularity>``;
        undefined metrics are omitted.
    """
    found: dict[str, float] = {}
    for name, level in zip(granularities, truth, strict=True):
        texts, images = level.any(axis=0), level.any(axis=1)
        part, true = scores[images][:, texts], level[images][:, texts]
        found[f"mAP_{name}"] = mean_average_precision(part, true)
        found |= {f"recall@{k}_{name}": recall_at(k, part, true) for k in KS}
    found = {name: value for name, value in found.items() if not np.isnan(value)}
    for kind in ("mAP", *(f"recall@{k}" for k in KS)):
        values = [value for name, value in found.items() if name.startswith(f"{kind}_")]
        if values:
            found[kind] = float(np.mean(values))
    return found
