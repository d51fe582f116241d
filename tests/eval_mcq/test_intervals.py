"""Intervals with few questions and with several questions per patient: their coverage is right, and never 100 %."""

import csv
import io
import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import multinomial

from eval_mcq.tables import intervals
from eval_mcq.tables.intervals import FEWEST, design_effect, tango
from eval_mcq.tables.multi_model import like_paper_pairs, long_table
from eval_mcq.tables.render import RENDERERS
from eval_mcq.tables.stats import exact_mcnemar
from eval_mcq.tables.summary import as_json, compare
from eval_mcq.tables.table_layout import by_disease, like_paper
from tests.eval_mcq.bootstrap import bootstrap, percentile_interval
from tests.eval_mcq.helpers import run_of_counts

Z = 1.959963984540054


def bounds(interval) -> tuple[float, float]:
    return interval.low, interval.high


@pytest.mark.parametrize(
    ("n", "gained", "lost", "printed"),
    [
        (50, 12, 2, (0.0611, 0.3447)),  # Newcombe's spreadsheet TANGO
        (21, 1, 7, (-0.517, -0.026)),  # Fagerland, Lydersen and Laake 2014, Stat Med 33, 2850-2875
    ],
)
def test_published_examples_of_tango(n, gained, lost, printed):
    digits = len(str(printed[0]).partition(".")[2])
    assert tuple(round(bound, digits) for bound in bounds(tango(gained, lost, n))) == printed


@pytest.mark.parametrize("n", [1, 4, 7, 14, 400])
def test_without_any_change_tango_has_a_closed_form(n):
    assert bounds(tango(0, 0, n)) == pytest.approx((-(Z**2) / (n + Z**2), Z**2 / (n + Z**2)))


@pytest.mark.parametrize(
    "counts", [(3, 0, 9), (5, 2, 13), (1, 7, 21), (0, 4, 40), (30, 22, 90), (2.4, 0.6, 5.5)]
)
def test_the_limits_of_tango_are_where_the_score_test_rejects(counts):
    """The maximum-likelihood trinomial with a given difference, found by search; its score is the quantile."""
    gained, lost, n = counts
    for limit, sign in zip(bounds(tango(*counts)), (1, -1), strict=True):

        def unlikely(share_lost, limit=limit):
            shares = np.array([share_lost + limit, share_lost, 1 - 2 * share_lost - limit])
            seen = np.array([gained, lost, n - gained - lost])
            return -float((seen[seen > 0] * np.log(np.maximum(shares[seen > 0], 1e-300))).sum())

        found = minimize_scalar(
            unlikely, bounds=(max(0.0, -limit), (1 - limit) / 2), method="bounded", options={"xatol": 1e-12}
        ).x
        variance = n * (2 * found + limit * (1 - limit))
        assert sign * (gained - lost - n * limit) / math.sqrt(variance) == pytest.approx(Z, rel=1e-3)


def test_no_interval_of_a_gain_collapses_at_any_small_n():
    for n in range(1, 15):
        for gained in range(n + 1):
            for lost in range(n + 1 - gained):
                low, high = bounds(tango(gained, lost, n))
                assert -1 <= low <= (gained - lost) / n <= high <= 1
                assert high - low > 0.2


def test_tango_says_zero_is_possible_where_mcnemar_does():
    for gained in range(15):
        for lost in range(15):
            low, high = bounds(tango(gained, lost, 40))
            assert (low <= 0 <= high) == (abs(gained - lost) <= Z * math.sqrt(gained + lost))


@pytest.mark.parametrize("n", [6, 10, 20])
def test_tango_covers_the_truth_with_few_questions(n):
    """All outcomes of n questions, weighted; a percentile bootstrap covers only a tenth if few answers change."""
    outcomes = [(g, k) for g in range(n + 1) for k in range(n + 1 - g)]
    limits = {outcome: bounds(tango(*outcome, n)) for outcome in outcomes}
    coverage = []
    for gain in (0.02, 0.1, 0.3, 0.5):
        for loss in (0.02, 0.1, 0.3):
            weight = multinomial(n, [gain, loss, 1 - gain - loss])
            coverage.append(
                sum(
                    weight.pmf([g, k, n - g - k])
                    for (g, k), (low, high) in limits.items()
                    if low <= gain - loss <= high
                )
            )
    assert min(coverage) > 0.9
    assert np.mean(coverage) > 0.945


def test_gains_are_told_from_as_many_patients_as_can_support_one():
    assert exact_mcnemar(FEWEST, 0) < 0.05 <= exact_mcnemar(FEWEST - 1, 0)


def test_independent_questions_count_in_full():
    right = np.random.default_rng(0).random(30) < 0.7
    assert design_effect(right - right.mean(), np.ones(30), np.arange(30)) == 1
    assert bounds(intervals.share(right, np.arange(30)).interval) == bounds(intervals.wilson(right.sum(), 30))


def test_copies_of_an_answer_add_nothing():
    draw = np.random.default_rng(1)
    before, after = draw.random(40) < 0.4, draw.random(40) < 0.6
    patients = np.arange(40)
    four = (np.repeat(before, 4), np.repeat(after, 4), np.repeat(patients, 4))
    assert bounds(intervals.share(four[0], four[2]).interval) == pytest.approx(
        bounds(intervals.share(before, patients).interval), rel=0.03
    )
    assert bounds(intervals.gain(*four).interval) == pytest.approx(
        bounds(intervals.gain(before, after, patients).interval), rel=0.03
    )
    same = np.ones(160, dtype=bool)  # nothing can be estimated: taken as if patients answered as one
    assert bounds(intervals.share(same, four[2]).interval) == pytest.approx(bounds(intervals.wilson(40, 40)))
    assert bounds(intervals.gain(same, same, four[2]).interval) == pytest.approx(bounds(tango(0, 0, 40)))


@pytest.mark.parametrize("eyes", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_with_hundreds_of_patients_they_are_those_of_a_bootstrap_over_patients(eyes, shared):
    """Two arms, three diseases; correlated eyes of a patient, patients with one disease or all three."""
    draw = np.random.default_rng(5)
    n = 300
    patients = np.repeat(np.arange(n), eyes)
    diseases, people, right = [], [], []
    skill = draw.normal(size=n)
    for d in range(3):
        chance = 1 / (1 + np.exp(-(1.2 * skill[patients] + d - 0.6)))
        diseases += [f"d{d}"] * len(patients)
        people.append(patients + (0 if shared else d * n))
        right.append(
            np.stack(
                [draw.random(len(patients)) < chance, draw.random(len(patients)) < chance + 0.08], axis=1
            )
        )
    answers, who, disease = np.concatenate(right), np.concatenate(people), np.array(diseases)
    draws = bootstrap(answers, diseases, [str(w) for w in who], replicates=4000)
    masks = [disease == f"d{d}" for d in range(3)]

    def half(interval) -> float:
        return (interval.high - interval.low) / 2

    shares = [intervals.share(answers[m, 0], who[m]) for m in masks]
    gains = [intervals.gain(answers[m, 0], answers[m, 1], who[m]) for m in masks]
    change = answers[:, 1].astype(float) - answers[:, 0]
    for d in range(3):
        assert half(shares[d].interval) == pytest.approx(
            half(percentile_interval(draws.by_category[:, d, 0])), rel=0.1
        )
        by_draw = draws.by_category[:, d, 1] - draws.by_category[:, d, 0]
        assert half(gains[d].interval) == pytest.approx(half(percentile_interval(by_draw)), rel=0.1)
    macro = intervals.mean(shares, [answers[m, 0].astype(float) for m in masks], [who[m] for m in masks])
    assert half(macro.interval) == pytest.approx(half(percentile_interval(draws.macro[:, 0])), rel=0.1)
    macro_gain = intervals.mean(gains, [change[m] for m in masks], [who[m] for m in masks])
    by_draw = draws.macro[:, 1] - draws.macro[:, 0]
    assert half(macro_gain.interval) == pytest.approx(half(percentile_interval(by_draw)), rel=0.1)


def test_patients_with_all_diseases_make_an_average_less_certain():
    draw = np.random.default_rng(2)
    good = draw.random(50) < 0.5
    values = [(good ^ (draw.random(50) < 0.1)).astype(float) for _ in range(4)]
    parts = [intervals.share(v.astype(bool), np.arange(50)) for v in values]
    alone = intervals.mean(parts, values, [np.arange(50) + 50 * d for d in range(4)]).interval
    together = intervals.mean(parts, values, [np.arange(50)] * 4).interval
    assert (
        1.6 < (together.high - together.low) / (alone.high - alone.low) <= 2
    )  # the square root of four diseases
    assert together.low >= np.mean([part.interval.low for part in parts]) - 1e-12


def test_an_average_of_perfect_answers_is_not_certain():
    table = compare({"a": run_of_counts({"DR": (7, 7), "AMD": (7, 7)})})
    (arm,) = table.arms
    assert arm.macro.interval.high == arm.micro.interval.high == 1
    assert 0.6 < arm.macro.interval.low < 0.8
    assert 0.7 < arm.micro.interval.low < 0.8


@pytest.fixture
def few():
    """Four questions of one disease and eight of another; only two answers of the first change."""
    return compare(
        {
            "base": run_of_counts({"CSR": (2, 4), "DR": (8, 8)}),
            "mgll": run_of_counts({"CSR": (4, 4), "DR": (8, 8)}),
        }
    )


def test_a_gain_without_any_change_has_an_interval(few):
    dr = few.arms[1].gains["DR"]
    assert dr.estimate.value == 0
    assert bounds(dr.estimate.interval) == pytest.approx((-0.3244, 0.3244), abs=1e-4)
    rows = {row[0]: row for row in by_disease(few).rows}
    assert rows["DR"][-2:] == ["0.0 [-32.4, 32.4]", "1.000"]


def test_too_few_patients_for_any_gain_are_said_in_every_table(few):
    assert few.arms[1].gains["CSR"].estimate is None
    for grid in (by_disease(few), like_paper(few), like_paper_pairs({"": few})):
        for name, render in RENDERERS.items():
            text = render(grid)
            shown = any(
                "too few" in row for row in grid.rows
            )  # of several models, only the Average has a gain
            assert ("too few" in text) == (shown or name != "csv")
            assert ("CSR (4)" in text) == (name != "csv")
    rows = {row[0]: row for row in by_disease(few).rows}
    assert rows["CSR"][-2:] == ["too few", "–"]
    assert rows["Average"][-2].startswith("+25.0 [")
    for row in csv.DictReader(io.StringIO(RENDERERS["csv"](long_table({"m": few})))):
        told = [row[name] for name in ("gain", "gain_low", "gain_high", "p", "p_holm")]
        if (row["arm"], row["disease"]) == ("mgll", "CSR"):
            assert (row["patients"], told) == ("4", [""] * 5)
        elif row["arm"] == "mgll":
            assert all(told[:3])
    plain = json.loads(json.dumps(as_json(few)))
    assert plain["arms"][1]["gains"]["CSR"]["estimate"] is None
    assert plain["arms"][1]["gains"]["CSR"]["patients"] == 4


def test_a_whole_bench_of_too_few_patients_tells_no_gain_at_all():
    table = compare({"base": run_of_counts({"CSR": (0, 2)}), "mgll": run_of_counts({"CSR": (2, 2)})})
    assert [row[-2:] for row in by_disease(table).rows] == [["too few", "–"]] * 3
    assert any("CSR (2), Average, All questions." in note for note in by_disease(table).notes)
    assert like_paper_pairs({"": table}).rows[4][-1].endswith("100.0 too few")


def test_many_questions_about_few_patients_are_few():
    base, mgll = run_of_counts({"DR": (5, 40)}), run_of_counts({"DR": (35, 40)})
    runs = {
        name: type(run)(
            run.folder, run.record, [r.model_copy(update={"cluster": r.id[-1]}) for r in run.rows]
        )
        for name, run in {"base": base, "mgll": mgll}.items()
    }
    assert compare(runs).arms[1].gains["DR"].patients == 10
    runs = {
        name: type(run)(
            run.folder, run.record, [r.model_copy(update={"cluster": str(len(r.id))}) for r in run.rows]
        )
        for name, run in runs.items()
    }
    assert compare(runs).arms[1].gains["DR"].estimate is None
