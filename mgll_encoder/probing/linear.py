"""How much a tower sees: a linear classifier on its frozen features, and the judge of every kind of probe."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mgll_encoder.common.progress import track
from mgll_encoder.data.label_table import LabeledImages
from mgll_encoder.probing.features import cached_features as cached_features
from mgll_encoder.probing.features import pooled_features as pooled_features

CONFIDENCE = 95
REPLICATES = 1000
METRICS = ("AUC", "mAP", "ACC")
"""Area under the ROC curve, average precision, accuracy (of the likeliest class where classes exclude each other, of
each label at probability 0.5 otherwise); over labels the unweighted mean (macro average)."""

_CELLS = 4_000_000
"""Weights (draws x images) of the bootstrap that are in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A value in %, with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        labels: Label -> metric -> value in %, for labels with positives and negatives on both sides.
        positives: Label -> positive test images.
        macro: Metric -> macro average with interval (bootstrap over patients).
        train: Training images.
        test: Test images.
        patients: Patients on the test side.
        left_out: Labels that lack positives or negatives on a side, or have too few positives on the test side.
        runs: Metric -> macro average, of each training; values above are means over these.
    """

    labels: dict[str, dict[str, float]]
    positives: dict[str, int]
    macro: dict[str, Estimate]
    train: int
    test: int
    patients: int
    left_out: tuple[str, ...]
    runs: tuple[dict[str, float], ...] = ()


def mixed(data: LabeledImages) -> NDArray[np.bool_]:
    """Which labels are true of some and known not to be true of others of these images, [labels]."""
    return np.asarray(data.truth.any(axis=0) & data.false.any(axis=0))


def kept_labels(data: LabeledImages, positives: int = 1, trained: bool = True) -> list[int]:
    """Places of the labels that can be judged.

    Args:
        data: Labels and sides.
        positives: Least number of positive test images.
        trained: Whether positive and negative training images are needed too.
    """
    asked = data.subset(data.test)
    enough = mixed(asked) & (asked.truth.sum(axis=0) >= positives)
    if trained:
        enough &= mixed(data.subset(~data.test))
    return np.flatnonzero(enough).tolist()


def fit_linear(features: NDArray[np.floating], truth: NDArray[np.bool_], strength: float = 0.01) -> Pipeline:
    """Logistic regression (class-balanced) on standardised features.

    Args:
        features: Of the training images, [n, width].
        truth: Whether the label is true of them, [n].
        strength: Inverse of the L2 penalty (scikit-learn's C).
    """
    regression = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
    return make_pipeline(StandardScaler(), regression).fit(features, truth)


def linear_scores(
    features: NDArray[np.floating], data: LabeledImages, strength: float = 0.01, positives: int = 1
) -> tuple[NDArray[np.float64], list[int]]:
    """Probabilities of every label for the test images, by logistic regression on standardised features.

    One regression per label (class-balanced), fitted on the training images of which the label is known.

    Args:
        features: Features of all images, [n, width].
        data: Their labels and sides.
        strength: Inverse of the L2 penalty (scikit-learn's C).
        positives: Least number of positive test images of a label that is kept.

    Returns:
        Probabilities, [test images, kept labels], and the places of the kept labels: those with positives and
        negatives on both sides, and enough of the first on the test side.
    """
    kept, columns = kept_labels(data, positives), []
    for place in track(kept, "Fitting one regression per label"):
        train = ~data.test & (data.truth | data.false)[:, place]
        fitted = fit_linear(features[train], data.truth[train, place], strength)
        columns.append(fitted.predict_proba(features[data.test])[:, 1])
    return np.stack(columns, axis=1) if columns else np.empty((int(data.test.sum()), 0)), kept


def evaluate(
    scores: NDArray[np.float64],
    kept: Sequence[int],
    data: LabeledImages,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> ProbeResult:
    """Metrics of scores on the test side.

    Args:
        scores: Probabilities, [test images, kept labels], or [runs, test images, kept labels]: every value is then the
            mean over runs, and so is every draw of the bootstrap.
        kept: Places of those labels.
        data: Labels and sides.
        replicates: Bootstrap draws of whole patients.
        seed: Seed of the draws.
    """
    runs = scores if scores.ndim == 3 else scores[None]
    asked = data.subset(data.test)
    truth = asked.truth[:, list(kept)]
    known = None if asked.known is None else asked.known[:, list(kept)]
    patients = np.array(data.patients)[data.test]
    names = [data.names[place] for place in kept]
    exclusive = data.exclusive and len(kept) == len(data.names)
    once = np.ones((1, len(truth)))
    each = np.stack(
        [metrics(run, truth, exclusive, once, known)[0] for run in runs]
    )  # [runs, labels, METRICS]
    whole = each.mean(axis=0)
    chunk = max(1, _CELLS // max(1, len(truth)))
    draws = np.concatenate(
        [
            np.mean(
                [np.nanmean(metrics(run, truth, exclusive, weights, known), axis=1) for run in runs], axis=0
            )
            for weights in resampled(patients, replicates, seed, chunk)
        ]
    )
    tail = (100 - CONFIDENCE) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail], axis=0)
    return ProbeResult(
        labels={
            name: dict(zip(METRICS, map(float, row), strict=True))
            for name, row in zip(names, whole, strict=True)
        },
        positives={name: int(count) for name, count in zip(names, truth.sum(axis=0), strict=True)},
        macro={
            metric: Estimate(float(np.nanmean(whole[:, i])), float(low[i]), float(high[i]))
            for i, metric in enumerate(METRICS)
        },
        train=int((~data.test).sum()),
        test=int(data.test.sum()),
        patients=len(set(patients)),
        left_out=tuple(name for name in data.names if name not in names),
        runs=tuple(dict(zip(METRICS, map(float, np.nanmean(run, axis=0)), strict=True)) for run in each),
    )


def metrics(
    scores: NDArray[np.floating],
    truth: NDArray[np.bool_],
    exclusive: bool,
    weights: NDArray[np.float64],
    known: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """Metrics in %, of one set of scores under many weightings of the images.

    They equal those of scikit-learn with ``sample_weight``; here each label is sorted once for all weightings, because
    a bootstrap over 25,000 images and 14 labels would otherwise take minutes.

    Args:
        scores: Probabilities, [n, labels].
        truth: Which label is true of which image, [n, labels].
        exclusive: Whether labels are classes, of which the likeliest is the answer.
        weights: How often each image counts, [weightings, n].
        known: Whether an image counts for a label, [n, labels]; None where all do.

    Returns:
        [weightings, labels, METRICS]; NaN for a label without positives or negatives.
    """
    guess = scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1]) if exclusive else scores >= 0.5
    right = (guess == truth).astype(np.float64)
    if exclusive:  # the accuracy of a classifier among classes is one figure
        hits = np.asarray((guess & truth).any(axis=1), np.float64)
        right = np.repeat(hits[:, None], scores.shape[1], axis=1)
    found = np.full((len(weights), scores.shape[1], len(METRICS)), np.nan)
    counted = np.ones(scores.shape) if known is None else known.astype(np.float64)
    with np.errstate(invalid="ignore"):
        found[..., 2] = weights @ (right * counted) / (weights @ counted)
    for label in range(scores.shape[1]):
        some = weights if known is None else weights * known[:, label]
        found[:, label, :2] = _ranked(scores[:, label], truth[:, label], some)
    found[np.isnan(found[..., 0])] = np.nan
    return found * 100


def _ranked(
    scores: NDArray[np.floating], truth: NDArray[np.bool_], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Area under the ROC curve and average precision under each weighting, [weightings, 2]; ties fall together."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    sorted_weights = weights[:, order]
    true = np.cumsum(sorted_weights * truth[order], axis=1)[:, ends]
    false = np.cumsum(sorted_weights, axis=1)[:, ends] - true
    gained = np.diff(true, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = np.sum(np.diff(false, axis=1, prepend=0) * (true - gained / 2), axis=1)
        area /= true[:, -1] * false[:, -1]
        precision = np.where(gained > 0, true / (true + false), 0)
        average = np.sum(gained * precision, axis=1) / true[:, -1]
    average[false[:, -1] == 0] = np.nan
    return np.stack([area, average], axis=1)


def resampled(
    patients: NDArray[np.str_], replicates: int, seed: int, chunk: int
) -> Iterator[NDArray[np.float64]]:
    """Bootstrap over whole patients: how often each image is drawn, [at most ``chunk`` draws, n], chunk by chunk."""
    names, place = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    starts = range(0, replicates, chunk)
    for start in track(starts, "Bootstrapping") if len(starts) > 1 else starts:
        draws = [
            np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
            for _ in range(min(chunk, replicates - start))
        ]
        yield np.stack(draws)[:, place].astype(np.float64)
