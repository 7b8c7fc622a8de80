"""What the check of the theorem found, and how it is told: verdicts, tables, figures."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from sublim_jax.evaluation.statistics import Interval
from sublim_jax.figures import PAPER, Arm, Line, Panel, panels_figure
from sublim_jax.report import Section

SMALL = 0.004  # the teacher's step up to which first-order statements are judged
SLOPE, CUBIC_SLOPE, EXACT, DECADES = 0.05, 0.1, 1e-9, 4.0
BOUND = 10.0  # of the error over the step, at every step of the fit
AS_PREDICTED, NOT = "as predicted", "NOT as predicted"
# The error stays in proportion to the step, as O(ε) says, but its first-order term is too small to fit a slope.
CONSISTENT = "consistent, slope not measurable"


class Measured(NamedTuple):
    """A setting's numbers for O objectives and E steps of the teacher."""

    moved: Float[np.ndarray, "steps"]  # root mean square change of the logits on the support
    epsilons: Float[np.ndarray, "steps"]
    loss: float  # L_T(θ⁰)
    inner: Float[np.ndarray, "objectives steps"]  # D_S·D_T
    change: Float[np.ndarray, "objectives steps"]  # L_T(θ⁰ + α D_S) - L_T(θ⁰)
    predicted: Float[np.ndarray, "objectives"]  # A by one forward-mode product
    explicit: Float[np.ndarray, "objectives"]  # A by explicit gradients


class Row(NamedTuple):
    network: str
    teacher: str
    inputs: str
    objectives: list[str]
    measured: Measured


class Control(NamedTuple):
    name: str
    reason: str  # why the theorem does not cover it
    expected: str  # constant, slope 1, slope 2 or zero
    measured: Measured


class Signs(NamedTuple):
    """Shares of draws, at each step of the teacher."""

    moved: Float[np.ndarray, "steps"]
    rates: Float[np.ndarray, "rates"]  # of the student, in units of 1/ε
    positive: Float[np.ndarray, "steps"]  # D_S·D_T > 0
    lower: Float[np.ndarray, "steps rates"]  # the step lowers L_T
    signed: Float[np.ndarray, "steps"]  # sign(D_S)·D_T > 0


class Labels(NamedTuple):
    exact: float  # D_S·D_T of soft labels
    drawn: Interval  # of labels drawn at T = 1


class Findings(NamedTuple):
    config: ConfigDict
    rows: list[Row]
    controls: list[Control]
    single: Measured
    signs: Signs
    labels: Labels
    optimizers: dict[str, float]


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


def lemma_error(measured: Measured, index: int) -> np.ndarray:
    """|D_S·D_T / (ε A) - 1|."""
    return np.abs(measured.inner[index] / (measured.epsilons * measured.predicted[index]) - 1)


def step_error(measured: Measured, index: int, rate: float) -> np.ndarray:
    """|(L_T(θ_S) - L_T(θ⁰)) / (-ε α A) - 1|."""
    return np.abs(measured.change[index] / (-measured.epsilons * rate * measured.predicted[index]) - 1)


def document(findings: Findings) -> tuple[list[Arm], list[Section]]:
    """The arms of results.json, and the report's sections."""
    lemma_arms, lemma = _lemma(findings)
    control_arms, controls = _controls(findings)
    label_arm, labels = _labels(findings.labels)
    groups = {"objectives × settings": lemma_arms, "controls": control_arms, "sampled labels": [label_arm]}
    verdicts = (AS_PREDICTED, CONSISTENT, NOT)
    table = [["rows", *verdicts]]
    for name, group in groups.items():
        table.append([name, *(str(sum(arm["verdict"] == verdict for arm in group)) for verdict in verdicts)])
    statement = Section("The one-step alignment theorem", STATEMENT, table, {})
    arms = [arm for group in groups.values() for arm in group]
    return arms, [
        statement,
        lemma,
        _steps(findings),
        controls,
        _single(findings),
        labels,
        _optimizers(findings.optimizers),
    ]


STATEMENT = f"""A teacher moves from θ⁰ to θ⁰ + ε D_T. A student at θ⁰ takes one gradient step D_S of imitating it, on
any inputs, by a loss on a fixed subset of the logits (the support). If the loss has its minimum at agreement, then
D_S·D_T = ε A + O(ε²), where A = E[vᵀ M v] ≥ 0, v = J_f D_T and M is the loss's curvature at agreement; and for
D_T = −∇L_T the step α D_S changes the teacher's own loss by −ε α A + O(ε²). (Paper §6.1, App. C.)

Steps are given by how far the teacher's logits moved on the support (root mean square), so that networks compare.
A slope is that of log error over log step, fitted below {SMALL} and above rounding; the theorem says 1."""


def _lemma(findings: Findings) -> tuple[list[Arm], Section]:
    objectives = findings.rows[0].objectives
    table = [
        ["network; teacher; inputs", *objectives, "decades", "A: two ways differ", "slopes of L_T", "as predicted"]
    ]
    arms = []
    for row in findings.rows:
        mine = [_judge_lemma(findings.config, row, index) for index in range(len(objectives))]
        for objective, judged in zip(objectives, mine):
            name = f"{row.network}; {row.teacher}; {row.inputs}; {objective}"
            arms.append(_arm(name, "slope", judged.fit.slope, 1.0, judged.error, judged.verdict))
        steps = [judged.step.slope for judged in mine]
        table.append(
            [
                f"{row.network}; {row.teacher}; {row.inputs}",
                *(f"{judged.fit.slope:.3f}" for judged in mine),
                f"{min(judged.fit.decades for judged in mine):.1f}",
                f"{max(judged.differ for judged in mine):.0e}",
                f"{min(steps):.2f} to {max(steps):.2f}",
                f"{sum(judged.verdict == AS_PREDICTED for judged in mine)} of {len(mine)}",
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
    return arms, Section("D_S·D_T against ε A", text, table, {"lemma": partial(_lemma_figure, findings)})


class Judged(NamedTuple):
    error: Float[np.ndarray, "steps"]
    fit: Fit  # of the lemma's error
    step: Fit  # of the error of L_T's change
    differ: float  # A by one forward-mode product, and by explicit gradients
    verdict: str


def _judge_lemma(config: ConfigDict, row: Row, index: int) -> Judged:
    m, eps = row.measured, np.finfo(float).eps
    error = lemma_error(m, index)
    fit = power(m.moved, error, error > 10 * eps / m.moved)
    step = step_error(m, index, config.learning_rate)
    rounding = eps * abs(m.loss) / np.abs(m.epsilons * config.learning_rate * m.predicted[index])
    differ = abs(m.explicit[index] / m.predicted[index] - 1)
    positive = bool(np.all(m.inner[index][m.moved <= SMALL] > 0))
    small = m.moved <= SMALL
    bounded = np.all(error[small] <= (BOUND * m.moved + 10 * eps / m.moved)[small])
    smooth, measurable = "ReLU" not in row.network, fit.decades >= DECADES
    if not (positive and differ <= EXACT and bounded) or (smooth and measurable and fit.slope < 1 - SLOPE):
        verdict = NOT
    elif not smooth or (measurable and fit.slope <= 1 + SLOPE):
        verdict = AS_PREDICTED
    else:
        verdict = CONSISTENT
    return Judged(error, fit, power(m.moved, step, step > 10 * rounding), differ, verdict)


def _lemma_figure(findings: Findings, path: Any) -> None:
    base = findings.rows[0]
    losses = [
        Line(name, base.measured.moved, lemma_error(base.measured, index)) for index, name in enumerate(base.objectives)
    ]
    losses.append(Line("kl in float32", findings.single.moved, lemma_error(findings.single, 0), _dashed(PAPER)))
    networks = [
        Line(_name(row), row.measured.moved, lemma_error(row.measured, row.objectives.index("kl")))
        for row in findings.rows
    ]
    guide = Line("slope 1", base.measured.moved, base.measured.moved, {**_dashed("#888888"), "marker": ""})
    label = "step of the teacher (r.m.s. change of logits)"
    error = "|D_S·D_T / (ε A) − 1|"
    panels = [
        Panel(label, error, [*losses, guide], ("log", "log"), f"objectives ({base.network})"),
        Panel(label, error, [*networks, guide], ("log", "log"), "networks, teachers, inputs (kl)"),
    ]
    panels_figure(panels, path)


def _steps(findings: Findings) -> Section:
    signs = findings.signs
    falls = [f"L_T falls, α = {rate:g}/step" for rate in signs.rates]
    table = [["step of the teacher", "D_S·D_T > 0", *falls, "sign(D_S)·D_T > 0"]]
    for index, moved in enumerate(signs.moved):
        shares = [signs.positive[index], *signs.lower[index], signs.signed[index]]
        table.append([f"{moved:.1e}", *(f"{share:.3f}" for share in shares)])
    broken = signs.moved[signs.positive < 1]
    where = f"first fails at a step of {broken[0]:.1e}" if len(broken) else "holds at every step tried"
    text = (
        f"Shares of {findings.config.draws} draws (network, MNIST rows and noise anew in each; KL). D_S·D_T > 0 "
        f"{where}. The length α of the student's step is given over the teacher's step, because D_S grows with that. "
        "The last column is what sign updates do: the theorem does not cover them."
    )
    figures = {"step": partial(_step_figure, findings)}
    return Section("The student's step lowers the teacher's loss", text, table, figures)


def _step_figure(findings: Findings, path: Any) -> None:
    signs, rate = findings.signs, findings.config.learning_rate
    lines = [
        Line(_name(row), row.measured.moved, step_error(row.measured, row.objectives.index("kl"), rate))
        for row in findings.rows
    ]
    shares = [Line("D_S·D_T > 0", signs.moved, signs.positive)]
    for index, rate in enumerate(signs.rates):
        shares.append(Line(f"L_T falls, α = {rate:g}/step", signs.moved, signs.lower[:, index]))
    shares.append(Line("sign(D_S)·D_T > 0 (not covered)", signs.moved, signs.signed, _dashed(PAPER)))
    label = "step of the teacher (r.m.s. change of logits)"
    panels = [
        Panel(label, "|ΔL_T / (−ε α A) − 1|", lines, ("log", "log"), "the change of L_T against −ε α A (kl)"),
        Panel(label, "share of draws", shares, ("log", "linear"), "how far 'small enough' reaches"),
    ]
    panels_figure(panels, path)


def _controls(findings: Findings) -> tuple[list[Arm], Section]:
    eps = np.finfo(float).eps
    table = [["control", "theorem", "expected of |D_S·D_T|", "slope", "decades", "at the smallest step", "verdict"]]
    arms = []
    for control in findings.controls:
        m = control.measured
        inner = m.inner[0]
        scale = float(np.max(np.abs(inner)))
        fit = power(m.moved, np.abs(inner), np.abs(inner) > 100 * eps * scale * eps if scale else inner > 0)
        target = {"zero": None, "constant": 0.0, "slope 1": 1.0, "slope 2": 2.0}[control.expected]
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
        {"controls": partial(_controls_figure, findings)},
    )


def _controls_figure(findings: Findings, path: Any) -> None:
    base = findings.rows[0]
    m = base.measured
    kl = Line("kl (covered)", m.moved, np.abs(m.inner[base.objectives.index("kl")]), {"color": "#222222"})
    lines = [
        Line(control.name, control.measured.moved, np.abs(control.measured.inner[0]))
        for control in findings.controls
        if control.expected != "zero"
    ]
    label = "step of the teacher (r.m.s. change of logits)"
    panels_figure([Panel(label, "|D_S·D_T|", [kl, *lines], ("log", "log"), "controls")], path)


def _single(findings: Findings) -> Section:
    m = findings.single
    error = lemma_error(m, 0)
    best = int(np.argmin(error))
    lost = m.moved[(error > 0.01) & (m.moved < m.moved[best])]
    text = (
        f"The first row's KL in float32: its error is smallest, {error[best]:.0e}, at a step of {m.moved[best]:.0e}; "
        f"below, rounding of the logits takes over, and at {lost.max():.0e} the error passes 1 %. "
        if len(lost)
        else "The first row's KL in float32 stays within 1 % over the steps tried. "
    )
    return Section("Where float32 breaks", text + "The dashed line of the first figure.", [], {})


def _labels(labels: Labels) -> tuple[Arm, Section]:
    mean, half_width = labels.drawn
    verdict = AS_PREDICTED if abs(mean - labels.exact) <= half_width else NOT
    text = (
        f"Labels drawn from the teacher at temperature 1: D_S·D_T is {mean:.4e} ± {half_width:.1e} over draws (95 %), "
        f"and {labels.exact:.4e} with the teacher's probabilities: {verdict}."
    )
    arm = _arm("labels sampled at T = 1", "D_S·D_T", mean, labels.exact, np.asarray([mean]), verdict)
    return {**arm, "ci95": half_width}, Section("Sampled labels", text, [], {})


def _optimizers(cosines: dict[str, float]) -> Section:
    table = [["update", "cos(update, D_T)", "theorem"]]
    for name, value in cosines.items():
        table.append([name, f"{value:.4f}", "covered" if name == "gradient" else "no guarantee"])
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


def _name(row: Row) -> str:
    """A row by what sets it apart."""
    apart = [row.network] + [text for text in (row.teacher, row.inputs) if text not in ("reads MNIST", "noise")]
    return ", ".join(apart)


def _dashed(color: str) -> dict[str, Any]:
    return {"ls": "--", "color": color}
