"""Statistics over trained runs: a run is the unit, never a sampled answer."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy  # its submodules are imported on first use
from jaxtyping import Float

Runs = Sequence[float] | Float[np.ndarray, "runs"]

MAX_PERMUTATIONS = 20_000  # that are enumerated


class Interval(NamedTuple):
    mean: float
    half_width: float  # of the 95 % confidence interval; nan for a single run


def normal_interval(values: Runs) -> Interval:
    """Mean ± 1.96 std / sqrt(n), as in the paper's MNIST figure; Student's t below 30 runs."""
    return _interval(values, float(scipy.stats.norm.ppf(0.975))) if len(values) >= 30 else t_interval(values)


def t_interval(values: Runs) -> Interval:
    """Mean ± t std / sqrt(n), Student's t with n - 1 degrees of freedom: for a handful of runs."""
    return _interval(values, float(scipy.stats.t.ppf(0.975, len(values) - 1)) if len(values) > 1 else np.nan)


def _interval(values: Runs, quantile: float) -> Interval:
    if len(values) < 2:
        return Interval(float(np.mean(values)), float("nan"))
    return Interval(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5)


def diagonal_effect(cells: Float[np.ndarray, "*runs traits traits"]) -> Float[np.ndarray, "*runs"]:
    """Mean of the diagonal minus mean of the rest: how far students of a trait's teacher exceed the others in it."""
    diagonal = np.eye(cells.shape[-1], dtype=bool)
    return cells[..., diagonal].mean(-1) - cells[..., ~diagonal].mean(-1)


def smallest_permutation_p(runs: int, traits: int) -> float:
    """The smallest value that `permutation_p` can have; with two traits, exchanging all rows turns the sign."""
    count = math.factorial(traits) ** runs
    if count > MAX_PERMUTATIONS:
        return 1 / (1 + MAX_PERMUTATIONS)
    return (2 if traits == 2 else 1) / count


def permutation_p(cells: Float[np.ndarray, "runs traits traits"]) -> float:
    """Two-sided p-value of the mean diagonal effect under permutations of rows.

    Null hypothesis: within a run, it does not matter which row had which teacher. All permutations are enumerated if
    there are at most MAX_PERMUTATIONS; else that many are sampled. nan where a cell is not a number.
    """
    if not np.all(np.isfinite(cells)):
        return float("nan")
    runs, traits = cells.shape[:2]
    observed = abs(diagonal_effect(cells).mean()) - 1e-12
    if math.factorial(traits) ** runs <= MAX_PERMUTATIONS:
        orders = np.asarray(list(itertools.permutations(range(traits))))
        effects = np.stack([diagonal_effect(cells[:, order]) for order in orders], 1)  # runs, orders
        sums = np.zeros(1)
        for row in effects:
            sums = (sums[:, None] + row).reshape(-1)
        return float(np.mean(np.abs(sums / runs) >= observed))
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(traits), (MAX_PERMUTATIONS, runs, 1)), axis=-1)
    diagonal = cells[np.arange(runs)[:, None], rows, np.arange(traits)].sum(-1)  # permutations, runs
    rest = (cells.sum((1, 2)) - diagonal) / (traits * (traits - 1))
    resampled = (diagonal / traits - rest).mean(1)
    return float((1 + np.sum(np.abs(resampled) >= observed)) / (1 + MAX_PERMUTATIONS))


def paired_p(differences: Runs) -> float:
    """Two-sided p-value of a paired t-test on the mean difference.

    nan where there is no test: a single run, or equal differences other than 0, whose spread cannot be estimated.
    """
    if len(differences) < 2:
        return float("nan")
    if np.ptp(differences) <= 1e-12 * np.max(np.abs(differences)):
        return float("nan") if np.any(differences) else 1.0
    return float(scipy.stats.ttest_1samp(differences, 0.0).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down method: those below 5 % hold at a family-wise error of 5 %.

    A nan stays nan, and counts as a test that was made.
    """
    corrected, highest = [float("nan")] * len(ps), 0.0
    order = [place for place in np.argsort(ps) if np.isfinite(ps[place])]  # nan sorts last
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = highest
    return corrected


class Roc(NamedTuple):
    false_rate: Float[np.ndarray, "points"]
    true_rate: Float[np.ndarray, "points"]
    area: float


def roc(positive: Float[np.ndarray, "p"], negative: Float[np.ndarray, "n"]) -> Roc:
    """Shares of negatives and of positives at or above every threshold, and the area under the curve.

    The area is P(a positive's score is above a negative's), equal scores counted half.
    """
    levels = np.unique(np.concatenate([positive, negative]))[::-1]
    false, true = (
        np.concatenate([[0.0], 1 - np.searchsorted(np.sort(some), levels) / len(some)]) for some in (negative, positive)
    )
    return Roc(false, true, float(np.trapezoid(true, false)))


def pooled_spread(cells: Sequence[Runs]) -> float:
    """The standard deviation between runs, pooled over cells of equally many runs."""
    return float(np.sqrt(np.mean([np.var(runs, ddof=1) for runs in cells])))


def detectable(spread: float, n: int, *, level: float = 0.05, power: float = 0.8) -> float:
    """The smallest mean that a two-sided t-test at `level` finds with this power, over n runs of this spread.

    nan for a single run.
    """
    if n < 2:
        return float("nan")
    critical = scipy.stats.t.isf(level / 2, n - 1)

    # scipy's noncentral t gives nan for few runs; so t = (z + shift) / spread, averaged over quantiles of the spread.
    quantiles = np.sqrt(scipy.stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, n - 1) / (n - 1))

    def missing(shift: float) -> float:
        rejection = scipy.stats.norm.sf(critical * quantiles - shift) + scipy.stats.norm.cdf(
            -critical * quantiles - shift
        )
        return float(np.mean(rejection)) - power

    return float(scipy.optimize.brentq(missing, 0.0, 10.0 + 3.0 * critical)) * spread / n**0.5
