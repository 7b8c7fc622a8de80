"""What the check says of its measurements: a verdict for each row, tables, figures."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sublim_jax.evaluation.statistics import normal_interval
from sublim_jax.experiments.alignment import measure
from sublim_jax.experiments.alignment.settings import NOISE, READS
from sublim_jax.experiments.alignment.spec import DECADES, SMALL, AlignmentSpec
from sublim_jax.figures import PAPER, Arm, Line, Panel, panels_figure
from sublim_jax.measurements import Measurements
from sublim_jax.report import Document, Notes, Section

SLOPE, CUBIC_SLOPE, EXACT = 0.05, 0.1, 1e-9
SLOPES = {"zero": None, "constant": 0.0, "slope 1": 1.0, "slope 2": 2.0}  # expected of controls
BOUND = 10.0  # of the error over the step, at every step of the fit
AS_PREDICTED, NOT = "as predicted", "NOT as predicted"
# The error stays in proportion to the step, as O(ε) says, but its first-order term is too small to fit a slope.
CONSISTENT = "consistent, slope not measurable"
STEP = "step of the teacher (r.m.s. change of logits)"


class Measured(NamedTuple):
    """One objective's numbers in a setting, for E steps of the teacher."""

    moved: Float[np.ndarray, "steps"]  # root mean square change of the logits on the support
    epsilons: Float[np.ndarray, "steps"]
    loss: float  # L_T(θ⁰)
    inner: Float[np.ndarray, "steps"]  # D_S·D_T
    change: Float[np.ndarray, "steps"]  # L_T(θ⁰ + α D_S) - L_T(θ⁰)
    predicted: float  # A by one forward-mode product
    explicit: float  # A by explicit gradients

    def lemma_error(self) -> np.ndarray:
        """|D_S·D_T / (ε A) - 1|."""
        return np.abs(self.inner / (self.epsilons * self.predicted) - 1)

    def step_error(self, rate: float) -> np.ndarray:
        """|(L_T(θ_S) - L_T(θ⁰)) / (-ε α A) - 1|."""
        return np.abs(self.change / (-self.epsilons * rate * self.predicted) - 1)


class Row(NamedTuple):
    """A setting, and its numbers by objective."""

    network: str
    teacher: str
    inputs: str
    smooth: bool
    measured: dict[str, Measured]

    @property
    def name(self) -> str:
        return f"{self.network}; {self.teacher}; {self.inputs}"

    @property
    def short(self) -> str:
        """What sets it apart from the first."""
        return ", ".join([self.network] + [text for text in (self.teacher, self.inputs) if text not in (READS, NOISE)])


class Control(NamedTuple):
    name: str
    reason: str  # why the theorem does not cover it
    expected: str  # one of SLOPES
    measured: Measured


def numbers(rows: Measurements, arm: str) -> dict[str, Measured]:
    """An arm's numbers by objective."""
    rows = rows.where(arm=arm)
    return {
        objective: Measured(
            moved=_series(rows, measure.MOVED),
            epsilons=_series(rows, measure.EPSILON),
            loss=rows.values(measure=measure.LOSS)[0],
            inner=_series(rows, measure.INNER, objective),
            change=_series(rows, measure.CHANGE, objective),
            predicted=rows.values(measure=measure.A, subject=objective)[0],
            explicit=rows.values(measure=measure.A_BY_GRADIENTS, subject=objective)[0],
        )
        for objective in rows.names("subject", measure=measure.INNER)
    }


def _series(rows: Measurements, what: str, subject: str = "", item: str = "") -> np.ndarray:
    """One measure over the steps of the teacher."""
    return np.asarray(rows.values(measure=what, subject=subject, item=item))


class Fit(NamedTuple):
    slope: float  # of log error over log step; nan where fewer than three points stand clear of rounding
    decades: float


def power(moved: np.ndarray, values: np.ndarray, usable: Bool[np.ndarray, "steps"]) -> Fit:
    """The exponent of a power law, fitted over the usable steps."""
    usable = usable & (values > 0) & (moved <= SMALL)
    if usable.sum() < 3:
        return Fit(float("nan"), 0.0)
    x, y = np.log10(moved[usable]), np.log10(values[usable])
    return Fit(float(np.polyfit(x, y, 1)[0]), float(x.max() - x.min()))


def document(spec: AlignmentSpec, rows: Measurements, notes: Notes) -> Document:
    """The arms of results.json, and the report's sections."""
    settings = []
    for about in notes["settings"]:
        row = Row(**about, measured={})
        settings.append(row._replace(measured=numbers(rows, row.name)))
    controls = []
    for about in notes["controls"]:
        (measured,) = numbers(rows, f"control: {about['name']}").values()
        controls.append(Control(**about, measured=measured))
    single = numbers(rows, measure.SINGLE)["kl"]
    lemma_arms, lemma = _lemma(settings, single, spec.learning_rate)
    control_arms, broken = _controls(controls, settings[0])
    label_arm, labels = _labels(rows.where(arm=measure.LABELS))
    groups = {"objectives × settings": lemma_arms, "controls": control_arms, "sampled labels": [label_arm]}
    verdicts = (AS_PREDICTED, CONSISTENT, NOT)
    table = [["rows", *verdicts]]
    for name, group in groups.items():
        table.append([name, *(str(sum(arm["verdict"] == verdict for arm in group)) for verdict in verdicts)])
    sections = [
        Section("The one-step alignment theorem", STATEMENT, table, {}),
        lemma,
        _steps(settings, rows.where(arm=measure.SIGNS), spec),
        broken,
        _single(single),
        labels,
        _optimizers(rows.where(arm=measure.OPTIMIZERS)),
    ]
    return [arm for group in groups.values() for arm in group], sections


STATEMENT = f"""A teacher moves from θ⁰ to θ⁰ + ε D_T. A student at θ⁰ takes one gradient step D_S of imitating it, on
any inputs, by a loss on a fixed subset of the logits (the support). If the loss has its minimum at agreement, then
D_S·D_T = ε A + O(ε²), where A = E[vᵀ M v] ≥ 0, v = J_f D_T and M is the loss's curvature at agreement; and for
D_T = −∇L_T the step α D_S changes the teacher's own loss by −ε α A + O(ε²). (Paper §6.1, App. C.)

Steps are given by how far the teacher's logits moved on the support (root mean square), so that networks compare.
A slope is that of log error over log step, fitted below {SMALL} and above rounding; the theorem says 1."""


def _lemma(rows: list[Row], single: Measured, rate: float) -> tuple[list[Arm], Section]:
    table = [
        ["network; teacher; inputs", *rows[0].measured, "decades", "A: two ways differ", "slopes of L_T", AS_PREDICTED]
    ]
    arms = []
    for row in rows:
        judged = {objective: judge(measured, rate, row.smooth) for objective, measured in row.measured.items()}
        for objective, one in judged.items():
            arms.append(_arm(f"{row.name}; {objective}", "slope", one.fit.slope, 1.0, one.error, one.verdict))
        steps = [one.step.slope for one in judged.values()]
        table.append(
            [
                row.name,
                *(f"{one.fit.slope:.3f}" for one in judged.values()),
                f"{min(one.fit.decades for one in judged.values()):.1f}",
                f"{max(one.differ for one in judged.values()):.0e}",
                f"{min(steps):.2f} to {max(steps):.2f}",
                f"{sum(one.verdict == AS_PREDICTED for one in judged.values())} of {len(judged)}",
            ]
        )
    text = (
        f"Slopes of |D_S·D_T / (ε A) − 1| for each objective: 1 ± {SLOPE} over at least {DECADES:g} decades is as "
        "predicted, with D_S·D_T > 0 at every step of the fit and A the same by one forward-mode product and by "
        f"explicit gradients to {EXACT:g}. Where the first-order term happens to be so small that no such slope can be "
        f"fitted above rounding, a row is consistent as long as the error stays below {BOUND:g} times the step. A ReLU "
        "network has kinks: for it only the sign and that bound are judged. "
        "LoRA's θ are the adapters as they stand; with B = 0 those of A have no gradient."
    )
    return arms, Section("D_S·D_T against ε A", text, table, {"lemma": partial(_lemma_figure, rows, single)})


class Judged(NamedTuple):
    error: Float[np.ndarray, "steps"]
    fit: Fit  # of the lemma's error
    step: Fit  # of the error of L_T's change
    differ: float  # A by one forward-mode product, and by explicit gradients
    verdict: str


def judge(m: Measured, rate: float, smooth: bool) -> Judged:
    """Whether an objective's numbers are as the theorem says, at a student's learning rate."""
    eps = np.finfo(float).eps
    error, step = m.lemma_error(), m.step_error(rate)
    fit = power(m.moved, error, error > 10 * eps / m.moved)
    rounding = eps * abs(m.loss) / np.abs(m.epsilons * rate * m.predicted)
    differ = abs(m.explicit / m.predicted - 1)
    small = m.moved <= SMALL
    positive = bool(np.all(m.inner[small] > 0))
    bounded = np.all(error[small] <= (BOUND * m.moved + 10 * eps / m.moved)[small])
    measurable = fit.decades >= DECADES
    if not (positive and differ <= EXACT and bounded) or (smooth and measurable and fit.slope < 1 - SLOPE):
        verdict = NOT
    elif not smooth or (measurable and fit.slope <= 1 + SLOPE):
        verdict = AS_PREDICTED
    else:
        verdict = CONSISTENT
    return Judged(error, fit, power(m.moved, step, step > 10 * rounding), differ, verdict)


def _lemma_figure(rows: list[Row], single: Measured, path: Any) -> None:
    losses = [Line(name, m.moved, m.lemma_error()) for name, m in rows[0].measured.items()]
    losses.append(Line("kl in float32", single.moved, single.lemma_error(), _dashed(PAPER)))
    networks = [Line(row.short, row.measured["kl"].moved, row.measured["kl"].lemma_error()) for row in rows]
    guide = Line("slope 1", single.moved, single.moved, {**_dashed("#888888"), "marker": ""})
    error = "|D_S·D_T / (ε A) − 1|"
    panels = [
        Panel(STEP, error, [*losses, guide], ("log", "log"), f"objectives ({rows[0].network})"),
        Panel(STEP, error, [*networks, guide], ("log", "log"), "networks, teachers, inputs (kl)"),
    ]
    panels_figure(panels, path)


def _steps(rows: list[Row], signs: Measurements, spec: AlignmentSpec) -> Section:
    moved, positive, signed = (_series(signs, what) for what in (measure.MOVED, measure.POSITIVE, measure.SIGNED))
    shares = {"D_S·D_T > 0": positive}
    for rate in signs.names("item", measure=measure.FALLS):
        shares[f"L_T falls, α = {rate}/step"] = _series(signs, measure.FALLS, item=rate)
    table = [["step of the teacher", *shares, "sign(D_S)·D_T > 0"]]
    for step, *values in zip(moved, *shares.values(), signed):
        table.append([f"{step:.1e}", *(f"{value:.3f}" for value in values)])
    broken = moved[positive < 1]
    where = f"first fails at a step of {broken[0]:.1e}" if len(broken) else "holds at every step tried"
    text = (
        f"Shares of {spec.num_draws} draws (network, MNIST rows and noise anew in each; KL). D_S·D_T > 0 "
        f"{where}. The length α of the student's step is given over the teacher's step, because D_S grows with that. "
        "The last column is what sign updates do: the theorem does not cover them."
    )
    lines = [Line(name, moved, values) for name, values in shares.items()]
    lines.append(Line("sign(D_S)·D_T > 0 (not covered)", moved, signed, _dashed(PAPER)))
    figures = {"step": partial(_step_figure, rows, spec.learning_rate, lines)}
    return Section("The student's step lowers the teacher's loss", text, table, figures)


def _step_figure(rows: list[Row], rate: float, shares: list[Line], path: Any) -> None:
    lines = [Line(row.short, row.measured["kl"].moved, row.measured["kl"].step_error(rate)) for row in rows]
    panels = [
        Panel(STEP, "|ΔL_T / (−ε α A) − 1|", lines, ("log", "log"), "the change of L_T against −ε α A (kl)"),
        Panel(STEP, "share of draws", shares, ("log", "linear"), "how far 'small enough' reaches"),
    ]
    panels_figure(panels, path)


def _controls(controls: list[Control], base: Row) -> tuple[list[Arm], Section]:
    eps = np.finfo(float).eps
    table = [["control", "theorem", "expected of |D_S·D_T|", "slope", "decades", "at the smallest step", "verdict"]]
    arms = []
    for control in controls:
        moved, inner = control.measured.moved, control.measured.inner
        scale = float(np.max(np.abs(inner)))
        fit = power(moved, np.abs(inner), np.abs(inner) > 100 * eps * scale * eps if scale else inner > 0)
        target = SLOPES[control.expected]
        if target is None:
            holds = not np.any(inner)
        else:
            holds = abs(fit.slope - target) <= (CUBIC_SLOPE if target == 2 else SLOPE) and fit.decades >= DECADES
        verdict = AS_PREDICTED if holds else NOT
        table.append(
            [
                control.name,
                control.reason or "covered",
                control.expected,
                f"{fit.slope:.3f}",
                f"{fit.decades:.1f}",
                f"{inner[0]:+.2e}",
                verdict,
            ]
        )
        arms.append(_arm(f"control: {control.name}", "slope of |D_S·D_T|", fit.slope, target, np.abs(inner), verdict))
    return arms, Section(
        "Controls",
        "Each breaks one condition of the theorem, and must then not behave as it says. Labels that ignore small moves "
        "of the teacher, and a student that starts elsewhere, are pulled by a constant; |z − y|³ has no curvature at "
        "agreement; a teacher whose loss lies in parameters that the student does not see has no effect at all, to "
        "the bit. A support that depends on the teacher breaks the theorem where only the teacher is cut to it; where "
        "both are, the set stays the same for small ε and the lemma holds.",
        table,
        {"controls": partial(_controls_figure, controls, base.measured["kl"])},
    )


def _controls_figure(controls: list[Control], kl: Measured, path: Any) -> None:
    lines = [Line("kl (covered)", kl.moved, np.abs(kl.inner), {"color": "#222222"})]
    for control in controls:
        if control.expected != "zero":
            lines.append(Line(control.name, control.measured.moved, np.abs(control.measured.inner)))
    panels_figure([Panel(STEP, "|D_S·D_T|", lines, ("log", "log"), "controls")], path)


def _single(m: Measured) -> Section:
    error = m.lemma_error()
    best = int(np.argmin(error))
    lost = m.moved[(error > 0.01) & (m.moved < m.moved[best])]
    text = (
        f"The first row's KL in float32: its error is smallest, {error[best]:.0e}, at a step of {m.moved[best]:.0e}; "
        f"below, rounding of the logits takes over, and at {lost.max():.0e} the error passes 1 %. "
        if len(lost)
        else "The first row's KL in float32 stays within 1 % over the steps tried. "
    )
    return Section("Where float32 breaks", text + "The dashed line of the first figure.", [], {})


def _labels(rows: Measurements) -> tuple[Arm, Section]:
    (exact,) = rows.values(subject="probabilities")
    mean, half_width = normal_interval(np.asarray(rows.values(subject="labels")))
    verdict = AS_PREDICTED if abs(mean - exact) <= half_width else NOT
    text = (
        f"Labels drawn from the teacher at temperature 1: D_S·D_T is {mean:.4e} ± {half_width:.1e} over draws (95 %), "
        f"and {exact:.4e} with the teacher's probabilities: {verdict}."
    )
    arm = _arm(measure.LABELS, measure.INNER, mean, exact, np.asarray([mean]), verdict)
    return {**arm, "ci95": half_width}, Section("Sampled labels", text, [], {})


def _optimizers(rows: Measurements) -> Section:
    table = [["update", measure.COSINE, "theorem"]]
    for row in rows:
        table.append([row.subject, f"{row.value:.4f}", "covered" if row.subject == "gradient" else "no guarantee"])
    text = "One update of the first row's student on KL, with a small step of the teacher (ε = 0.001)."
    return Section("Adam and sign updates", text, table, {})


def _arm(name: str, metric: str, value: float, predicted: float | None, runs: np.ndarray, verdict: str) -> Arm:
    return {
        "name": name,
        "metric": metric,
        "mean": value,
        "ci95": None,
        "runs": [float(run) for run in runs],
        "paper": predicted,
        "verdict": verdict,
    }


def _dashed(color: str) -> dict[str, Any]:
    return {"ls": "--", "color": color}
