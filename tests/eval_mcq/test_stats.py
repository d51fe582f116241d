import itertools
from collections import Counter

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from eval_mcq.scoring.prompt import shown_letters
from eval_mcq.tables.bias_report import diagnose
from eval_mcq.tables.calibration import calibration
from eval_mcq.tables.intervals import wilson
from eval_mcq.tables.stats import holm, mcnemar, p_of_guessing
from eval_mcq.tables.summary import compare
from tests.eval_mcq.bootstrap import bootstrap, percentile_interval
from tests.eval_mcq.helpers import run_of_counts


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (3, 9), (142, 171), (1, 1)])
def test_wilson_agrees_with_statsmodels(right, n):
    interval = wilson(right, n)
    assert (interval.low, interval.high) == pytest.approx(
        proportion_confint(right, n, method="wilson"), abs=1e-12
    )


def test_no_right_answer_out_of_seven_still_has_an_interval():
    assert wilson(0, 7).high == pytest.approx(0.354, abs=5e-4)


@pytest.mark.parametrize(("gained", "lost", "same"), [(9, 1, 20), (3, 3, 5), (0, 6, 1), (14, 5, 100)])
def test_mcnemar_agrees_with_statsmodels(gained, lost, same):
    before = np.array([False] * gained + [True] * lost + [True] * same)
    after = np.array([True] * gained + [False] * lost + [True] * same)
    table = [[same, lost], [gained, 0]]
    assert mcnemar(before, after) == pytest.approx(reference_mcnemar(table, exact=True).pvalue, abs=1e-12)


def test_models_that_never_differ_have_p_one():
    assert mcnemar(np.array([True, False]), np.array([True, False])) == 1.0


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.5, 0.9], [0.02], [0.03, 0.03, 0.001, 1.0, 0.2]])
def test_holm_agrees_with_statsmodels(p):
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist())


def outcomes(shares, n, seed=0):
    generator = np.random.default_rng(seed)
    right = np.concatenate([generator.random(n) < share for share in shares])
    return right, [f"d{d}" for d in range(len(shares)) for _ in range(n)]


def test_independent_questions_give_the_textbook_error_of_a_macro_average():
    n = 60
    right, categories = outcomes([0.2, 0.5, 0.9], n)
    draws = bootstrap(right[:, None], categories, [str(i) for i in range(len(right))])
    shares = right.reshape(3, n).mean(axis=1)
    expected = np.sqrt((shares * (1 - shares) / n).sum()) / 3
    assert draws.macro[:, 0].std() == pytest.approx(expected, rel=0.06)
    assert draws.macro[:, 0].mean() == pytest.approx(shares.mean(), abs=0.005)


def test_four_copies_of_each_answer_do_not_narrow_the_interval():
    right, categories = outcomes([0.3, 0.7], 50)
    patients = [str(i) for i in range(len(right))]
    once = bootstrap(right[:, None], categories, patients).macro[:, 0].std()
    clustered = bootstrap(
        np.repeat(right, 4)[:, None], list(np.repeat(categories, 4)), list(np.repeat(patients, 4))
    )
    unclustered = bootstrap(
        np.repeat(right, 4)[:, None], list(np.repeat(categories, 4)), list(map(str, range(400)))
    )
    assert clustered.macro[:, 0].std() == pytest.approx(once, rel=1e-9)
    assert unclustered.macro[:, 0].std() == pytest.approx(once / 2, rel=0.1)  # what clustering guards against


def test_a_small_disease_does_not_vanish_from_a_draw():
    right = np.array([[True]] * 200 + [[False]])
    draws = bootstrap(right, ["big"] * 200 + ["small"], [str(i) for i in range(201)])
    assert np.isfinite(draws.by_category).all()
    assert np.allclose(draws.macro, 0.5)


def test_differences_are_paired():
    right, categories = outcomes([0.5, 0.5], 100)
    better = right.copy()
    better[np.flatnonzero(~right)[:10]] = True
    draws = bootstrap(np.stack([right, better, right], axis=1), categories, [str(i) for i in range(200)])
    gain = percentile_interval(draws.macro[:, 1] - draws.macro[:, 0])
    assert gain.low > 0  # although both arms' own intervals overlap widely
    assert percentile_interval(draws.macro[:, 0]).high > percentile_interval(draws.macro[:, 1]).low
    assert np.array_equal(draws.macro[:, 2], draws.macro[:, 0])


def test_more_patients_than_fit_in_one_piece_draw_all_replicates():
    n = 5000
    right = np.arange(n) % 2 == 0
    draws = bootstrap(right[:, None], ["d"] * n, [str(i) for i in range(n)], replicates=900)
    assert draws.macro.shape == (900, 1)
    assert draws.macro.std() == pytest.approx(np.sqrt(0.25 / n), rel=0.1)


def test_the_same_seed_draws_the_same():
    right, categories = outcomes([0.4, 0.6], 20)
    ids = [str(i) for i in range(40)]
    assert np.array_equal(
        bootstrap(right[:, None], categories, ids).macro, bootstrap(right[:, None], categories, ids).macro
    )


@pytest.mark.parametrize("right", [0, 3, 7, 12])
def test_guessing_among_equal_questions_is_binomial(right):
    assert p_of_guessing(right, {4: 12}) == pytest.approx(
        binomtest(right, 12, 0.25, alternative="greater").pvalue
    )


def test_guessing_among_unequal_questions_is_counted_out():
    """All patterns of right and wrong answers to eight questions with 2, 3 and 5 options."""
    options = [2, 2, 2, 3, 3, 5, 5, 5]
    exact = np.zeros(9)
    for pattern in itertools.product((0, 1), repeat=8):
        exact[sum(pattern)] += np.prod(
            [1 / o if right else 1 - 1 / o for o, right in zip(options, pattern, strict=True)]
        )
    for right in range(9):
        assert p_of_guessing(right, Counter(options)) == pytest.approx(exact[right:].sum(), abs=1e-12)


def test_guessing_stays_exact_at_a_hundred_thousand_questions():
    assert p_of_guessing(40_000, {2: 60_000, 5: 40_000}) == pytest.approx(
        norm.sf((39_999.5 - 38_000) / np.sqrt(60_000 / 4 + 40_000 * 0.16)), rel=0.05
    )


def test_bootstrapping_patterns_of_patients_is_bootstrapping_patients():
    """Compared with sampling the patients themselves, one by one."""
    generator = np.random.default_rng(3)
    clusters = np.repeat(np.arange(60), 2)
    right = generator.random((120, 2)) < 0.6
    ours = bootstrap(right, ["d"] * 120, [str(c) for c in clusters], replicates=20_000)
    by_patient = right.reshape(60, 2, 2).mean(axis=1)
    plain = by_patient[generator.integers(0, 60, (20_000, 60))].mean(axis=1)
    assert ours.macro.mean(axis=0) == pytest.approx(plain.mean(axis=0), abs=2e-3)
    assert np.cov(ours.macro.T) == pytest.approx(np.cov(plain.T), rel=0.06, abs=5e-5)


def test_calibration_by_hand():
    probabilities = [[0.9, 0.1], [0.8, 0.1, 0.1], [0.55, 0.45], [0.2, 0.5, 0.3]]
    found = calibration(probabilities, [0, 1, 0, 2], bins=2)
    # One bin, (0.5, 1], holds three of them, right 2 of 3; the fourth, at exactly 0.5, is in (0, 0.5] and wrong.
    assert found.ece == pytest.approx(3 / 4 * abs(2.25 / 3 - 2 / 3) + 1 / 4 * 0.5)
    assert found.brier == pytest.approx(np.mean([0.02, 0.64 + 0.81 + 0.01, 2 * 0.45**2, 0.04 + 0.25 + 0.49]))
    assert [(b.n, b.low, b.high) for b in found.bins] == [(1, 0.0, 0.5), (3, 0.5, 1.0)]


def test_calibration_agrees_with_the_libraries():
    import torch
    from sklearn.metrics import brier_score_loss
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([0.7] * 4, 500)
    true = generator.integers(0, 4, 500)
    found = calibration(probabilities.tolist(), true.tolist())
    reference = multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(true), num_classes=4, n_bins=15, norm="l1"
    )
    assert found.ece == pytest.approx(float(reference), abs=1e-6)
    assert found.brier == pytest.approx(brier_score_loss(true, probabilities, scale_by_half=False), abs=1e-9)


def test_a_model_that_always_says_a_is_seen_by_its_recall():
    run = run_of_rotations(lambda shown: "A")
    how = diagnose(run)
    assert {letter: p.recall for letter, p in how.positions.items()} == {
        "A": 1.0,
        "B": 0.0,
        "C": 0.0,
        "D": 0.0,
    }
    assert {p.true for p in how.positions.values()} == {12}
    found = compare({"a": run})
    assert (found.orders, found.macro_chance, found.chance_every_order) == (4, 0.25, 0.25**4)
    assert averages_of(found) == (0.25, 0.0)
    assert averages_of(compare({"a": run_of_rotations(lambda shown: shown)})) == (1.0, 1.0)


def averages_of(comparison):
    """The Average of single orders, and of all of them."""
    arm = comparison.arms[0]
    return arm.one_order.estimate.value, arm.every_order.estimate.value


def run_of_rotations(choose):
    """Twelve questions in four rotations; ``choose`` gets the letter shown for the true option."""
    run = run_of_counts({"DR": (12, 12)})
    rows = []
    for row in run.rows:
        for rotation in range(4):
            shown = shown_letters(4, rotation)
            gold = "ABCD"[int(row.id.partition("-")[2]) % 4]
            said = "ABCD"[shown.index(choose(shown["ABCD".index(gold)]))]
            rows.append(
                row.model_copy(update={"rotation": rotation, "shown": shown, "gold": gold, "chosen": said})
            )
    return type(run)(run.folder, run.record.model_copy(update={"rotations": 4}), rows)
