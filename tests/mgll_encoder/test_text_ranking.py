import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from mgll_encoder.pretraining.validation_metrics import mean_average_precision, ranking_metrics, recall_at

TRUTH = np.array([[1, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1]], bool)


def test_a_perfect_order_scores_one():
    assert mean_average_precision(TRUTH.astype(float), TRUTH) == 1
    assert recall_at(3, TRUTH.astype(float), TRUTH) == 1


def test_features_that_are_all_alike_score_chance():
    constant = np.full(TRUTH.shape, 0.7)
    assert mean_average_precision(constant, TRUTH) == pytest.approx(TRUTH[:, :3].mean())
    for k in (1, 2, 3):
        assert recall_at(k, constant, TRUTH) == pytest.approx(k / 4)
    per_text = np.broadcast_to([3.0, 1.0, 2.0, 9.0], TRUTH.shape)  # a favorite text, whatever the image
    assert mean_average_precision(per_text, TRUTH) == pytest.approx(TRUTH[:, :3].mean())


def test_random_scores_stay_near_chance_where_the_degenerate_accuracy_is_high():
    rng = np.random.default_rng(0)
    truth = rng.random((400, 32)) < 0.03
    scores = rng.normal(size=truth.shape)
    assert mean_average_precision(scores, truth) < 0.1
    assert (np.zeros_like(truth) == truth).mean() > 0.95  # what "everything negative" gets


def test_precision_is_the_mean_over_texts_that_tell_images_apart():
    scores = np.random.default_rng(1).normal(size=TRUTH.shape)
    expected = np.mean([average_precision_score(TRUTH[:, u], scores[:, u]) for u in range(3)])
    assert mean_average_precision(scores, TRUTH) == pytest.approx(expected)
    assert np.isnan(mean_average_precision(scores[:, 3:], TRUTH[:, 3:]))


def test_recall_counts_the_true_texts_among_the_nearest():
    scores = np.array([[9.0, 8, 7, 1], [1, 2, 3, 4], [4, 3, 2, 1], [0, 9, 0, 8]])
    assert recall_at(1, scores, TRUTH) == pytest.approx(np.mean([1 / 2, 1 / 3, 0, 1 / 2]))
    assert recall_at(2, scores, TRUTH) == pytest.approx(np.mean([1 / 2, 1 / 3, 0, 1]))
    assert np.isnan(recall_at(4, scores, TRUTH))  # everything is among the nearest


def test_each_granularity_is_judged_among_its_own_texts():
    truth = np.stack([TRUTH & (np.arange(4) < 2), TRUTH & (np.arange(4) >= 2)])
    found = ranking_metrics(TRUTH.astype(float), truth, ("status", "disease"))
    assert found["mAP"] == found["mAP_status"] == found["mAP_disease"] == 1
    assert found["recall@1_disease"] == pytest.approx(3.5 / 4)  # the third image has two true texts
    assert "recall@5" not in found
