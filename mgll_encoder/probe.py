"""How much a tower sees: a linear classifier on its frozen features, judged on other patients."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mgll_encoder.common.cli import track
from mgll_encoder.common.images import open_image
from mgll_encoder.data.label_table import LabelledImages
from mgll_encoder.preprocess import image_transform
from mgll_encoder.tower import Tower

CONFIDENCE = 95
REPLICATES = 1000
METRICS = ("AUC", "mAP", "ACC")
"""Area under the ROC curve, average precision, accuracy (of the likeliest class where classes exclude each other, of
each label at probability 0.5 otherwise); over labels the unweighted mean (macro average)."""


@dataclass(frozen=True)
class Figure:
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
    """

    labels: dict[str, dict[str, float]]
    positives: dict[str, int]
    macro: dict[str, Figure]
    train: int
    test: int
    patients: int
    left_out: tuple[str, ...]


def pooled_features(tower: Tower, images: Sequence[Path], batch_size: int = 64) -> NDArray[np.float32]:
    """The tower's pooled features (class token after the last norm, no projection), [n, width].

    Args:
        tower: The tower; its own preprocessing is used.
        images: Image files.
        batch_size: Images per forward pass.

    Raises:
        UserError: an image cannot be read.
    """
    transform = image_transform(tower.spec)
    features = []
    starts = range(0, len(images), batch_size)
    with torch.inference_mode():
        for start in track(starts, "Reading features"):
            pixels = [transform(open_image(path)) for path in images[start : start + batch_size]]
            features.append(tower.model(torch.stack(pixels)).pooler_output.float().numpy())
    return np.concatenate(features)


def cached_features(tower: Tower, images: Sequence[Path], cache: Path) -> NDArray[np.float32]:
    """`pooled_features`, kept in a file whose name is a hash of tower, preprocessing and images.

    Args:
        tower: The tower.
        images: Image files; told apart by path, size and time of change.
        cache: Folder of such files.

    Raises:
        UserError: an image cannot be read.
    """
    digest = hashlib.sha256(tower.spec.model_dump_json().encode())
    for name, value in sorted(tower.model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    for path in images:
        state = path.stat()
        digest.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    file = cache / f"{digest.hexdigest()[:32]}.safetensors"
    if not file.is_file():
        features = pooled_features(tower, images)
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file({"features": features}, partial)
        partial.replace(file)
    return load_file(file)["features"]


def linear_scores(
    features: NDArray[np.floating], data: LabelledImages, strength: float = 0.01, positives: int = 1
) -> tuple[NDArray[np.float64], list[int]]:
    """Probabilities of every label for the test images, by logistic regression on standardised features.

    One regression per label (class-balanced), fitted on the training images.

    Args:
        features: Features of all images, [n, width].
        data: Their labels and sides.
        strength: Inverse of the L2 penalty (scikit-learn's C).
        positives: Least number of positive test images of a label that is kept.

    Returns:
        Probabilities, [test images, kept labels], and the places of the kept labels: those with positives and
        negatives on both sides, and enough of the first on the test side.
    """
    train, kept, columns = ~data.test, [], []
    for place in range(len(data.names)):
        known, asked = data.truth[train, place], data.truth[data.test, place]
        if known.all() or asked.all() or not known.any() or asked.sum() < max(1, positives):
            continue
        probe = make_pipeline(
            StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
        )
        probe.fit(features[train], known)
        columns.append(probe.predict_proba(features[data.test])[:, 1])
        kept.append(place)
    return np.stack(columns, axis=1) if columns else np.empty((int(data.test.sum()), 0)), kept


def judge(
    scores: NDArray[np.float64],
    kept: Sequence[int],
    data: LabelledImages,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> ProbeResult:
    """Metrics of scores on the test side.

    Args:
        scores: Probabilities, [test images, kept labels].
        kept: Places of those labels.
        data: Labels and sides.
        replicates: Bootstrap draws of whole patients.
        seed: Seed of the draws.
    """
    truth = data.truth[data.test][:, list(kept)]
    patients = np.array(data.patients)[data.test]
    names = [data.names[place] for place in kept]
    exclusive = data.exclusive and len(kept) == len(data.names)
    whole = _metrics(scores, truth, exclusive)
    draws = np.array(
        [
            np.nanmean(_metrics(scores[rows], truth[rows], exclusive), axis=0)
            for rows in track(_resampled(patients, replicates, seed), "Bootstrapping", replicates)
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
            metric: Figure(float(np.nanmean(whole[:, i])), float(low[i]), float(high[i]))
            for i, metric in enumerate(METRICS)
        },
        train=int((~data.test).sum()),
        test=int(data.test.sum()),
        patients=len(set(patients)),
        left_out=tuple(name for name in data.names if name not in names),
    )


def _metrics(scores: NDArray[np.float64], truth: NDArray[np.bool_], exclusive: bool) -> NDArray[np.float64]:
    """Metrics in %, [labels, METRICS]; NaN for a label without positives or negatives among these rows."""
    guess = scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1]) if exclusive else scores >= 0.5
    accuracy = (guess == truth).mean(axis=0)
    if exclusive:  # the accuracy of a classifier among classes is one figure
        accuracy = np.full(scores.shape[1], (guess & truth).any(axis=1).mean())
    rows = np.full((scores.shape[1], len(METRICS)), np.nan)
    for i in range(scores.shape[1]):
        if truth[:, i].any() and not truth[:, i].all():
            rows[i] = (
                roc_auc_score(truth[:, i], scores[:, i]),
                average_precision_score(truth[:, i], scores[:, i]),
                accuracy[i],
            )
    return rows * 100


def _resampled(patients: NDArray[np.str_], replicates: int, seed: int) -> list[NDArray[np.int64]]:
    """Rows of patients drawn with replacement, all rows of a patient together."""
    names, place = np.unique(patients, return_inverse=True)
    rows = [np.flatnonzero(place == i) for i in range(len(names))]
    draw = np.random.default_rng(seed)
    return [
        np.concatenate([rows[i] for i in draw.integers(len(names), size=len(names))])
        for _ in range(replicates)
    ]
