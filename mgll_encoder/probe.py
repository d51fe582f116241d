"""How much a tower sees: a linear classifier on its frozen features."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mgll_encoder.common.cli import track
from mgll_encoder.common.images import open_image
from mgll_encoder.preprocess import image_transform
from mgll_encoder.tower import Tower


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


def linear_probe(
    train: NDArray[np.floating],
    train_labels: NDArray[np.bool_],
    test: NDArray[np.floating],
    test_labels: NDArray[np.bool_],
    names: Sequence[str],
    strength: float = 0.01,
) -> dict[str, float]:
    """One logistic regression per label (class-balanced) on standardised features.

    Args:
        train: Features to fit on, [n, width].
        train_labels: Which label is true of which image, [n, labels].
        test: Features to judge on, [m, width].
        test_labels: Likewise, [m, labels].
        names: Names of the labels.
        strength: Inverse of the L2 penalty (scikit-learn's C).

    Returns:
        Label -> area under the ROC curve on the test images, for labels that have positives and negatives
        on both sides.
    """
    result = {}
    for column, name in enumerate(names):
        known, asked = train_labels[:, column], test_labels[:, column]
        if known.all() or asked.all() or not known.any() or not asked.any():
            continue
        probe = make_pipeline(
            StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
        )
        probe.fit(train, known)
        result[name] = float(roc_auc_score(asked, probe.decision_function(test)))
    return result
