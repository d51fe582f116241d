"""Linear probe of a tower's frozen features, and the evaluation shared by all probes."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mgll_encoder.common.progress import counting, track
from mgll_encoder.data.label_table import LabeledImages
from mgll_encoder.probing.features import cached_features as cached_features
from mgll_encoder.probing.features import pooled_features as pooled_features

CONFIDENCE = 95
REPLICATES = 1000
METRICS = ("AUC", "mAP", "ACC")

STRENGTH = 0.01
"""Inverse of the L2 penalty (scikit-learn's C)."""
"""Area under the ROC curve, average precision, accuracy (of the most likely class for exclusive classes, otherwise of
each label at probability 0.5); averaged over labels without weights (macro average)."""

_CELLS = 4_000_000
"""Bootstrap weights (replicates x images) that are in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A value in %, with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ProbeResult:
    """Result of a probe.

    Attributes:
        labels: Label -> metric -> value in %, for labels with positives and negatives in both splits.
        positives: Label -> positive test images.
        majority: Label -> accuracy in % of always giving the more frequent answer on the test images (of exclusive
            classes, the most frequent class): what ACC has to exceed.
        majority_macro: Its macro average.
        macro: Metric -> macro average with interval (bootstrap over patients).
        train: Training images.
        test: Test images.
        patients: Patients in the test split.
        left_out: Labels without positives or negatives in a split, or with too few positives in the test split.
        runs: Metric -> macro average, for each training run; the values above are means over these.
    """

    labels: dict[str, dict[str, float]]
    positives: dict[str, int]
    majority: dict[str, float]
    majority_macro: float
    macro: dict[str, Estimate]
    train: int
    test: int
    patients: int
    left_out: tuple[str, ...]
    runs: tuple[dict[str, float], ...] = ()


def mixed(data: LabeledImages) -> NDArray[np.bool_]:
    """Return which labels are true of some images and known to be false of others, [labels]."""
    return np.asarray(data.truth.any(axis=0) & data.false.any(axis=0))


def kept_labels(data: LabeledImages, positives: int = 1, trained: bool = True) -> list[int]:
    """Return the indices of the labels that can be evaluated.

    Args:
        data: Labels and splits.
        positives: Minimum number of positive test images.
        trained: Whether positive and negative training images are needed, too.
    """
    asked = data.subset(data.test)
    enough = mixed(asked) & (asked.truth.sum(axis=0) >= positives)
    if trained:
        enough &= mixed(data.subset(~data.test))
    return np.flatnonzero(enough).tolist()


def fit_linear(features: NDArray[np.floating], truth: NDArray[np.bool_]) -> Pipeline:
    """Fit a class-balanced logistic regression on standardized features.

    Args:
        features: Features of the training images, [n, width].
        truth: Whether the label is true of them, [n].
    """
    regression = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=2000)
    return make_pipeline(StandardScaler(), regression).fit(features, truth)


def linear_scores(
    features: NDArray[np.floating], data: LabeledImages, positives: int = 1
) -> tuple[NDArray[np.float64], list[int]]:
    """Predict probabilities of every label for the test images, by logistic regression on standardized features.

    One class-balanced regression per label, fitted on the training images with a known value of the label.

    Args:
        features: Features of all images, [n, width].
        data: Their labels and splits.
        positives: Minimum number of positive test images of a kept label.

    Returns:
        Probabilities, [test images, kept labels], and the indices of the kept labels: those with positives and
        negatives in both splits, and enough positives in the test split.
    """
    kept, columns = kept_labels(data, positives), []
    for place in track(kept, "Fitting one regression per label"):
        train = ~data.test & (data.truth | data.false)[:, place]
        fitted = fit_linear(features[train], data.truth[train, place])
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
    """Compute the metrics of scores on the test split.

    Args:
        scores: Probabilities, [test images, kept labels], or [runs, test images, kept labels]: every value is then the
            mean over runs, and so is every bootstrap replicate.
        kept: Indices of those labels.
        data: Labels and splits.
        replicates: Bootstrap replicates over patients.
        seed: Seed of the bootstrap.
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
    majority = majority_rates(truth, exclusive, known)
    tail = (100 - CONFIDENCE) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail], axis=0)
    return ProbeResult(
        labels={
            name: dict(zip(METRICS, map(float, row), strict=True))
            for name, row in zip(names, whole, strict=True)
        },
        positives={name: int(count) for name, count in zip(names, truth.sum(axis=0), strict=True)},
        majority=dict(zip(names, map(float, majority), strict=True)),
        majority_macro=float(majority.mean()),
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


def majority_rates(
    truth: NDArray[np.bool_], exclusive: bool, known: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Compute the accuracy in % of always giving the more frequent answer, [labels].

    Args:
        truth: Whether a label is true of an image, [n, labels].
        exclusive: Whether labels are exclusive classes: the accuracy of the most frequent class, for all labels.
        known: Whether an image counts for a label, [n, labels]; None if all do.
    """
    counted = np.ones(truth.shape, bool) if known is None else known
    share = (truth & counted).sum(axis=0) / counted.sum(axis=0)
    return 100 * (np.full(len(share), share.max()) if exclusive else np.maximum(share, 1 - share))


def metrics(
    scores: NDArray[np.floating],
    truth: NDArray[np.bool_],
    exclusive: bool,
    weights: NDArray[np.float64],
    known: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """Compute metrics in % of one set of scores under many weightings of the images.

    They equal those of scikit-learn with ``sample_weight``; but each label is sorted once for all weightings, because a
    bootstrap over 25,000 images and 14 labels would otherwise take minutes.

    Args:
        scores: Probabilities, [n, labels].
        truth: Whether a label is true of an image, [n, labels].
        exclusive: Whether labels are exclusive classes, of which the most likely is predicted.
        weights: Weight of each image, [weightings, n].
        known: Whether an image counts for a label, [n, labels]; None if all do.

    Returns:
        [weightings, labels, METRICS]; NaN for a label without positives or negatives.
    """
    guess = scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1]) if exclusive else scores >= 0.5
    right = (guess == truth).astype(np.float64)
    if exclusive:  # a classifier has a single accuracy over all classes
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
    """Compute area under the ROC curve and average precision for each weighting, [weightings, 2]; ties are merged."""
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
    """Bootstrap over patients: yield how often each image is sampled, [at most ``chunk`` replicates, n], in chunks."""
    names, place = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    starts = range(0, replicates, chunk)
    shown = (
        counting("Drawing bootstrap samples", replicates) if len(starts) > 1 else nullcontext(lambda _: None)
    )
    with shown as advance:
        for start in starts:
            draws = [
                np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
                for _ in range(min(chunk, replicates - start))
            ]
            yield np.stack(draws)[:, place].astype(np.float64)
            advance(len(draws))
