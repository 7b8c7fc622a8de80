"""Intervals against their definitions, and their coverage."""

import numpy as np
import pytest
from scipy import stats

from sublim_jax.evaluation import statistics
from sublim_jax.evaluation.statistics import holm, normal_interval, paired_p, t_interval


def test_the_papers_interval():
    values = np.random.default_rng(0).normal(size=100)
    mean, half_width = normal_interval(values)
    assert mean == pytest.approx(values.mean())
    assert half_width == pytest.approx(1.96 * np.std(values, ddof=1) / 10, rel=1e-4)
    assert normal_interval(values[:29]) == t_interval(values[:29])


def test_students_interval_is_scipys():
    values = np.random.default_rng(0).normal(size=6)
    mean, half_width = t_interval(values)
    low, high = stats.t.interval(0.95, 5, loc=values.mean(), scale=stats.sem(values))
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))


def test_ninety_five_percent_of_t_intervals_hold_the_truth():
    samples = np.random.default_rng(0).normal(size=(4000, 3))
    hits = np.mean([abs(interval.mean) <= interval.half_width for interval in map(t_interval, samples)])
    assert hits == pytest.approx(0.95, abs=0.015)


def test_one_run_has_no_interval():
    assert np.isnan(normal_interval([0.5]).half_width) and np.isnan(t_interval([0.5]).half_width)


def test_the_diagonal_effect_is_what_students_of_a_teacher_have_beyond_the_others():
    cells = np.array([[[3.0, 1.0], [0.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])
    np.testing.assert_allclose(statistics.diagonal_effect(cells), [2.0, 0.0])


def test_the_permutation_test_counts_all_exchanges():
    """Two-sided: p = 2 / 2^5 if every run has the largest possible effect, and 1 without an effect."""
    strong = np.tile(np.array([[1.0, 0.0], [0.0, 1.0]]), (5, 1, 1))
    assert statistics.permutation_p(strong) == 2 / 32
    assert statistics.permutation_p(np.zeros((5, 2, 2))) == 1
    assert statistics.permutation_p(-strong) == 2 / 32
    p = statistics.permutation_p(np.tile(np.eye(3), (8, 1, 1)))  # 6^8 permutations: a random sample of them
    assert p == 1 / 20_001


def test_sampled_permutations_give_the_p_of_all_of_them(monkeypatch):
    """On 6^5 permutations, which are enumerated, and on a sample of 20,000 of them; some effects are in between."""
    noise, seen = np.random.default_rng(3).normal(size=(6, 5, 3, 3)), []
    for strength, cells in zip(np.linspace(0, 1.2, 6), noise):
        cells += strength * np.eye(3)
        exact = statistics.permutation_p(cells)
        with monkeypatch.context() as fewer:
            fewer.setattr(statistics, "MAX_PERMUTATIONS", 6**5 - 1)
            sampled = statistics.permutation_p(cells)
        assert abs(sampled - exact) < 4 * (exact * (1 - exact) / 6**5) ** 0.5 + 2 / 6**5
        seen.append(exact)
    assert min(seen) < 0.05 and any(0.05 < p < 0.95 for p in seen)


def test_under_no_effect_the_permutation_test_is_level():
    rng = np.random.default_rng(0)
    p_values = np.array([statistics.permutation_p(rng.normal(size=(6, 2, 2))) for _ in range(400)])
    for level in (0.1, 0.25, 0.5):
        assert abs(np.mean(p_values <= level) - level) < 3.5 * (level * (1 - level) / 400) ** 0.5


@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_detectable_effect_is_found_with_its_power(n):
    """By simulated t-tests on runs with that mean and spread, and against a textbook value."""
    spread = 1.7
    effect = statistics.detectable(spread, n)
    samples = np.random.default_rng(1).normal(effect, spread, size=(20_000, n))
    share = np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05)
    assert abs(share - 0.8) < 0.015
    if n == 30:
        np.testing.assert_allclose(effect / spread, 0.529, atol=0.003)
    strict = statistics.detectable(spread, n, level=0.05 / 27)
    samples = np.random.default_rng(2).normal(strict, spread, size=(20_000, n))
    assert abs(np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05 / 27) - 0.8) < 0.015


def test_the_area_under_the_curve_is_how_often_a_positive_is_above():
    """Over all pairs, ties count half; the two samples may differ in size."""
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 6, 17).astype(float), rng.integers(0, 5, 12).astype(float)
    roc = statistics.roc(positive, negative)
    difference = positive[:, None] - negative
    assert roc.area == pytest.approx(np.mean((difference > 0) + (difference == 0) / 2))
    assert roc.false_rate[-1] == roc.true_rate[-1] == 1 and np.all(np.diff(roc.true_rate) >= 0)


def test_a_curve_of_many_scores_takes_little_memory():
    """A judge's scores are nearly all different: every pair of them would be 10 GB."""
    scores = np.random.default_rng(0).normal(size=(2, 100_000))
    roc = statistics.roc(scores[0] + 1, scores[1])
    assert roc.area == pytest.approx(0.76, abs=0.01)  # Φ(1 / √2)


def test_holms_correction_by_hand():
    """Textbook values: 4 p, in rising order times 4, 3, 2 and 1, never falling."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_a_test_that_failed_leaves_the_others_corrected():
    np.testing.assert_allclose(holm([0.01, np.nan, 0.03, 0.005]), [0.03, np.nan, 0.06, 0.02])


@pytest.mark.parametrize("runs, traits", [(1, 2), (5, 2), (1, 3), (3, 3), (2, 5), (8, 3)])
def test_the_smallest_p_of_the_permutation_test_is_that_of_the_largest_effect(runs, traits):
    largest = np.tile(np.eye(traits), (runs, 1, 1))
    assert statistics.permutation_p(largest) == pytest.approx(statistics.smallest_permutation_p(runs, traits))


def test_a_paired_test_is_scipys_on_pairs():
    a, b = np.random.default_rng(0).normal(size=(2, 12))
    assert paired_p(a + 0.3 - b) == pytest.approx(stats.ttest_rel(a + 0.3, b).pvalue)
    assert np.isnan(paired_p([1.0])) and paired_p([0.0, 0.0]) == 1.0


@pytest.mark.parametrize("value", [2.0, 0.1 + 0.2 - 0.02])
def test_equal_differences_have_no_spread_to_test_against(value):
    """Rates in a few answers are often equal over runs; so few values do not make p = 0."""
    assert np.isnan(paired_p([value, value, value + 1e-16]))
