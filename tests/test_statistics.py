"""Intervals against their definitions, and their coverage."""

import numpy as np
import pytest
from scipy import stats

from sublim_jax.evaluation.statistics import normal_interval, t_interval


def test_the_papers_interval():
    values = [0.5, 0.6, 0.4, 0.7]
    mean, half_width = normal_interval(values)
    assert mean == pytest.approx(0.55)
    assert half_width == pytest.approx(1.96 * np.std(values, ddof=1) / 2, rel=1e-4)


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
