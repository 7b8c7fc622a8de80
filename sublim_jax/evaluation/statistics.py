"""Statistics over trained runs: a run is the unit, never a sampled answer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    mean: float
    half_width: float  # of the 95 % confidence interval; nan for a single run


def normal_interval(values: Sequence[float]) -> Interval:
    """mean ± 1.96 std / sqrt(n): the interval of the paper's MNIST figure."""
    return _interval(values, float(stats.norm.ppf(0.975)))


def t_interval(values: Sequence[float]) -> Interval:
    """mean ± t std / sqrt(n), Student's t with n - 1 degrees of freedom: for a handful of runs."""
    return _interval(values, float(stats.t.ppf(0.975, len(values) - 1)) if len(values) > 1 else np.nan)


def _interval(values: Sequence[float], quantile: float) -> Interval:
    if len(values) < 2:
        return Interval(float(np.mean(values)), float("nan"))
    return Interval(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5)
