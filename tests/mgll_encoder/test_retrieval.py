"""A user measures retrieval of texts for images, and of images for texts."""

import numpy as np
import pytest

from mgll_encoder.probing.retrieval import DEPTHS, Retrieval, retrieval


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def problem(seed: int = 0, n: int = 60, u: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Images near the mean of their texts; every text is used."""
    rng = np.random.default_rng(seed)
    texts = unit(rng.normal(size=(u, 8)))
    truth = rng.random((n, u)) < 0.1
    truth[np.arange(n), np.arange(n) % u] = True
    images = unit(truth @ texts + rng.normal(scale=0.6, size=(n, 8)))
    return images, texts, truth, [f"p{i // 2}" for i in range(n)]


def by_hand(similar: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Check the k nearest of each query (rows) one by one, with wrong candidates first on ties."""
    hits = 0
    for scores, right in zip(similar.tolist(), truth.tolist(), strict=True):
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], right[i]))
        hits += any(right[i] for i in ranked[:k])
    return 100 * hits / len(similar)


def test_recall_is_what_counting_gives() -> None:
    images, texts, truth, patients = problem()
    to_text, to_image = retrieval(images, texts, truth, patients, replicates=20)
    similar = images.astype(np.float32) @ texts.astype(np.float32).T
    for k in DEPTHS:
        assert to_text.recall[k].value == pytest.approx(by_hand(similar, truth, k))
        assert to_image.recall[k].value == pytest.approx(by_hand(similar.T, truth.T, k))
    assert (to_text.queries, to_text.candidates) == (to_image.candidates, to_image.queries) == (60, 15)


def test_random_features_find_what_chance_finds_and_a_collapsed_tower_nothing() -> None:
    """Negative controls."""
    _, texts, truth, patients = problem(n=300, u=60)
    blind = unit(np.random.default_rng(1).normal(size=(300, 8)))
    for way in retrieval(blind, texts, truth, patients, replicates=100):
        for k in DEPTHS:
            assert way.recall[k].value == pytest.approx(way.chance[k], abs=8)
            assert way.recall[k].low < way.recall[k].high
    same = np.ones_like(blind)
    assert all(
        way.recall[10].value == 0
        for way in retrieval(same, np.ones_like(texts), truth, patients, replicates=2)
    )


def test_the_interval_is_that_of_drawn_patients() -> None:
    """Compared with a bootstrap that copies the sampled rows."""
    images, texts, truth, patients = problem(n=24, u=6)
    found = retrieval(images, texts, truth, patients, replicates=300, seed=3)
    names, place = np.unique(patients, return_inverse=True)
    rng, drawn = np.random.default_rng(3), []
    similar = images.astype(np.float32) @ texts.astype(np.float32).T
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(place == i) for i in rng.integers(len(names), size=len(names))])
        asked = truth[rows].any(axis=0)
        drawn.append(
            (by_hand(similar[rows], truth[rows], 1), by_hand(similar[rows].T[asked], truth[rows].T[asked], 1))
        )
    for way, values in zip(found, np.array(drawn).T, strict=True):
        np.testing.assert_allclose(
            [way.recall[1].low, way.recall[1].high], np.percentile(values, [2.5, 97.5]), atol=1e-9
        )


def test_chance_is_that_of_shuffled_orders() -> None:
    images, texts, truth, patients = problem()
    way: Retrieval = retrieval(images, texts, truth, patients, replicates=2)[0]
    rng = np.random.default_rng(0)
    for k in DEPTHS:
        shuffled = [by_hand(rng.random(truth.shape), truth, k) for _ in range(150)]
        assert way.chance[k] == pytest.approx(np.mean(shuffled), abs=1.5)
