import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from eval_mcq.stats import bootstrap, holm, mcnemar, percentile_interval, wilson


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
