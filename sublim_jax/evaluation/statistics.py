"""Statistics over trained runs: a run is the unit, never a sampled answer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

Runs = Sequence[float] | Float[np.ndarray, "runs"]


class Interval(NamedTuple):
    mean: float
    half_width: float  # of the 95 % confidence interval; nan for a single run


def normal_interval(values: Runs) -> Interval:
    """Mean ± 1.96 std / sqrt(n): the interval of the paper's MNIST figure."""
    return _interval(values, float(stats.norm.ppf(0.975)))


def t_interval(values: Runs) -> Interval:
    """Mean ± t std / sqrt(n), Student's t with n - 1 degrees of freedom: for a handful of runs."""
    return _interval(values, float(stats.t.ppf(0.975, len(values) - 1)) if len(values) > 1 else np.nan)


def _interval(values: Runs, quantile: float) -> Interval:
    if len(values) < 2:
        return Interval(float(np.mean(values)), float("nan"))
    return Interval(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5)
