"""Verdicts on the theorem's predictions: slopes, signs, the fall of L_T, and A computed in two ways."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float

from sublim_jax.experiments.alignment import measure
from sublim_jax.experiments.alignment.spec import DECADES, SMALL
from sublim_jax.figures import Entry
from sublim_jax.measurements import Measurements

SLOPE, CUBIC_SLOPE, EXACT = 0.05, 0.1, 1e-9
# The expected exponent of |D_S·D_T| in the teacher's step, for controls.
SLOPES = {"zero": None, "constant": 0.0, "slope 1": 1.0, "slope 1, wrong sign": 1.0, "slope 2": 2.0}
BOUND = 10.0  # of the error over the step, at every step of the fit
FALLS = 2.0  # decades of steps over which the fall of L_T must be above rounding
AS_PREDICTED, OUTSIDE, NOT = "as predicted", "outside the theorem, as predicted", "NOT as predicted"
# Signs, falls and A as predicted, and the error is bounded by a multiple of the step, as O(ε) requires; but it falls
# faster, is too small to fit a slope, or bends at the network's kinks.
CONSISTENT = "consistent: signs and bounds as predicted"
STEP, LOG = "step of the teacher (r.m.s. change of logits)", ("log", "log")  # the axes of every figure


class Scale(NamedTuple):
    """The range in which first-order predictions are judged."""

    small: float = SMALL  # the largest step of the teacher
    decades: float = DECADES  # of steps that a slope needs
    rounding: float = 10.0  # of D_S·D_T, in units of the number type's resolution over the step


class Measured(NamedTuple):
    """One objective's numbers in a setting, for E steps of the teacher."""

    moved: Float[np.ndarray, "steps"]  # root mean square change of the logits on the support
    epsilons: Float[np.ndarray, "steps"]
    loss: float  # L_T(θ⁰)
    inner: Float[np.ndarray, "steps"]  # D_S·D_T
    change: Float[np.ndarray, "steps"]  # L_T(θ⁰ + α D_S) - L_T(θ⁰)
    predicted: float  # A by a forward-mode product
    explicit: float  # A as the derivative of D_S·D_T by ε

    def lemma_error(self) -> np.ndarray:
        """|D_S·D_T / (ε A) - 1|."""
        return np.abs(self.inner / (self.epsilons * self.predicted) - 1)

    def step_error(self, rate: float) -> np.ndarray:
        """|(L_T(θ_S) - L_T(θ⁰)) / (-ε α A) - 1|."""
        return np.abs(self.change / (-self.epsilons * rate * self.predicted) - 1)

    def negated(self) -> "Measured":
        """With the signs of D_S·D_T, A and the change of L_T flipped."""
        return self._replace(inner=-self.inner, change=-self.change, predicted=-self.predicted, explicit=-self.explicit)

    def up_to(self, epsilon: float) -> "Measured":
        """Only the steps with ε up to `epsilon`."""
        few = self.epsilons <= epsilon
        parts = {name: getattr(self, name)[few] for name in ("moved", "epsilons", "inner", "change")}
        return self._replace(**parts)


def numbers(rows: Measurements, arm: str) -> dict[str, Measured]:
    """An arm's numbers by objective."""
    rows = rows.where(arm=arm)
    moved, epsilons = (np.asarray(rows.values(measure=what)) for what in (measure.MOVED, measure.EPSILON))
    (loss,) = rows.values(measure=measure.LOSS)
    by_objective = {}
    for name in rows.names("subject", measure=measure.INNER):
        inner, change = (np.asarray(rows.values(measure=w, subject=name)) for w in (measure.INNER, measure.CHANGE))
        (a,), (explicit,) = (rows.values(measure=w, subject=name) for w in (measure.A, measure.A_BY_GRADIENTS))
        by_objective[name] = Measured(moved, epsilons, loss, inner, change, a, explicit)
    return by_objective


class Fit(NamedTuple):
    slope: float  # of log error over log step; nan if fewer than three points are above rounding
    decades: float


def power(moved: np.ndarray, values: np.ndarray, usable: Bool[np.ndarray, "steps"], small: float = SMALL) -> Fit:
    """The exponent of a power law, fitted over the usable steps up to `small`."""
    usable = usable & (values > 0) & (moved <= small)
    if usable.sum() < 3:
        return Fit(float("nan"), 0.0)
    x, y = np.log10(moved[usable]), np.log10(values[usable])
    return Fit(float(np.polyfit(x, y, 1)[0]), float(x.max() - x.min()))


class Judged(NamedTuple):
    error: Float[np.ndarray, "steps"]
    fit: Fit  # of the lemma's error
    step: Fit  # of the error of L_T's change
    differ: float  # A by one forward-mode product, and by the derivative of D_S·D_T
    verdict: str


def judge(m: Measured, rate: float, smooth: bool, scale: Scale = Scale()) -> Judged:  # noqa: B008
    """Whether an objective's measurements agree with the theorem, at a student's learning rate."""
    eps = np.finfo(float).eps
    error, step = m.lemma_error(), m.step_error(rate)
    hidden = scale.rounding * eps / m.moved
    fit = power(m.moved, error, error > hidden, scale.small)
    rounding = eps * abs(m.loss) / np.abs(m.epsilons * rate * m.predicted)
    differ = abs(m.explicit / m.predicted - 1)
    small = m.moved <= scale.small
    positive = bool(np.all(m.inner[small] > 0)) and m.predicted > 0
    bounded = np.all(error[small] <= (BOUND * m.moved + hidden)[small])
    # Steps at which the rounding error of the fall is within its bound.
    clear = m.moved[small & (scale.rounding * rounding <= BOUND * scale.small)]
    falls = np.all(step[small] <= (BOUND * m.moved + scale.rounding * rounding)[small]) and len(clear) > 1
    falls = falls and np.log10(clear.max() / clear.min()) >= FALLS
    measurable = fit.decades >= scale.decades
    if not (positive and falls and differ <= EXACT and bounded) or (smooth and measurable and fit.slope < 1 - SLOPE):
        verdict = NOT
    elif smooth and measurable and fit.slope <= 1 + SLOPE:
        verdict = AS_PREDICTED
    else:
        verdict = CONSISTENT
    return Judged(error, fit, power(m.moved, step, step > scale.rounding * rounding, scale.small), differ, verdict)


def inner_fit(m: Measured, scale: Scale = Scale()) -> Fit:  # noqa: B008
    """The exponent of |D_S·D_T| in the teacher's step."""
    size = np.abs(m.inner)
    return power(m.moved, size, size > 100 * np.finfo(float).eps ** 2 * np.max(size), scale.small)


def control_verdict(m: Measured, expected: str, outside: bool, rate: float, scale: Scale = Scale()) -> str:  # noqa: B008
    """Whether a control behaves as expected. For slope 1 the sign is judged, too."""
    if expected.startswith("slope 1"):
        signed = m.negated() if expected.endswith("wrong sign") else m
        holds = judge(signed, rate, True, scale).verdict in (AS_PREDICTED, CONSISTENT)
    elif expected == "zero":
        holds = not np.any(m.inner)
    else:
        fit, tolerance = inner_fit(m, scale), CUBIC_SLOPE if expected == "slope 2" else SLOPE
        holds = abs(fit.slope - (SLOPES[expected] or 0.0)) <= tolerance and fit.decades >= scale.decades
    if not holds:
        return NOT
    return OUTSIDE if outside else AS_PREDICTED


def arm_of(name: str, metric: str, slope: float, predicted: float | None, errors: npt.ArrayLike, verdict: str) -> Entry:
    """An entry of results.json: a slope, and what it is fitted to, `by_step`."""
    known = {"name": name, "metric": metric, "mean": slope, "ci95": None, "runs": [slope], "predicted": predicted}
    return {**known, "by_step": np.asarray(errors).tolist(), "verdict": verdict}
