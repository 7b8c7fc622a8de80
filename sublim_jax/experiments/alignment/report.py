"""The report of the check: a verdict for each row, tables and figures."""

from functools import partial
from typing import TypeAlias

import numpy as np

from sublim_jax.evaluation.statistics import normal_interval
from sublim_jax.experiments.alignment import measure
from sublim_jax.experiments.alignment.spec import DECADES, SMALL, About, AlignmentSpec
from sublim_jax.experiments.alignment.verdicts import (
    AS_PREDICTED,
    BOUND,
    CONSISTENT,
    EXACT,
    FALLS,
    LOG,
    NOT,
    OUTSIDE,
    SLOPE,
    SLOPES,
    STEP,
    Measured,
    arm_of,
    control_verdict,
    inner_fit,
    judge,
    numbers,
)
from sublim_jax.figures import INK, Entry, Line, Panel, panels_figure
from sublim_jax.measurements import Measurements
from sublim_jax.report import Document, Notes, Section

MAX_STANDARD_ERRORS = 4.0  # of sampled labels; chance exceeds it once in 16,000 seeds
DASHED = {"ls": "--", "color": INK}


Settings: TypeAlias = dict[About, dict[str, Measured]]


def document(spec: AlignmentSpec, rows: Measurements, notes: Notes) -> Document:
    """The arms of results.json, and the report's sections."""
    settings = {about: numbers(rows, about.name) for about in (About(**setting) for setting in notes["settings"])}
    base, single = next(iter(settings.values())), numbers(rows, measure.SINGLE)["kl"]
    lemma_arms, lemma = _lemma(settings, single, spec.learning_rate)
    control_arms, broken = _controls(rows, notes["controls"], base["kl"], spec.learning_rate)
    label_arm, labels = _labels(rows.where(arm=measure.LABELS))
    groups = {"objectives × settings": lemma_arms, "controls": control_arms, "sampled labels": [label_arm]}
    verdicts = (AS_PREDICTED, OUTSIDE, CONSISTENT, NOT)
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


def _lemma(settings: Settings, single: Measured, rate: float) -> tuple[list[Entry], Section]:
    about, first = next(iter(settings.items()))
    table = [["network; teacher; inputs", *first, "decades", "A: two ways differ", "slopes of L_T", AS_PREDICTED]]
    arms = []
    for setting, measured in settings.items():
        judged = {objective: judge(m, rate, setting.smooth) for objective, m in measured.items()}
        for objective, row in judged.items():
            arms.append(arm_of(f"{setting.name}; {objective}", "slope", row.fit.slope, 1.0, row.error, row.verdict))
        every, steps = list(judged.values()), [row.step.slope for row in judged.values()]
        cells = [setting.name, *(f"{row.fit.slope:z.3f}" for row in every)]
        cells += [f"{min(row.fit.decades for row in every):.1f}", f"{max(row.differ for row in every):.0e}"]
        cells += [f"{min(steps):.2f} to {max(steps):.2f}"]
        table.append([*cells, f"{sum(row.verdict == AS_PREDICTED for row in every)} of {len(every)}"])
    text = (
        f"Slopes of |D_S·D_T / (ε A) − 1| for each objective: 1 ± {SLOPE} over at least {DECADES:g} decades is as "
        "predicted. Any smooth loss has that slope, by Taylor's theorem; so a row is as predicted only if also "
        "D_S·D_T > 0 at every step of the fit, the teacher's own loss falls by ε α A over at least "
        f"{FALLS:g} decades of steps, and A = E[vᵀ M v] is the derivative of D_S·D_T by ε to {EXACT:g}. Errors must "
        f"stay below {BOUND:g} times the step. Where the error's first-order term is so small that no slope can "
        "be fitted above rounding, a row is consistent. A ReLU network has kinks: for it the signs and the bounds are "
        "judged and no slope, so that its rows are consistent at best. "
        "LoRA's θ are the adapters as they stand; with B = 0 those of A have no gradient."
    )
    losses = [Line(name, m.moved, m.lemma_error()) for name, m in first.items()]
    losses.append(Line("kl in float32", single.moved, single.lemma_error(), DASHED))
    networks = [Line(at.short, by_loss["kl"].moved, by_loss["kl"].lemma_error()) for at, by_loss in settings.items()]
    guide = Line("slope 1", single.moved, single.moved, {**DASHED, "color": "#888888", "marker": ""})
    error = "|D_S·D_T / (ε A) − 1|"
    panels = [
        Panel(STEP, error, [*losses, guide], LOG, f"objectives ({about.network})"),
        Panel(STEP, error, [*networks, guide], LOG, "networks, teachers, inputs (kl)"),
    ]
    return arms, Section("D_S·D_T against ε A", text, table, {"lemma": partial(panels_figure, panels)})


def _steps(settings: Settings, signs: Measurements, spec: AlignmentSpec) -> Section:
    whats = (measure.MOVED, measure.POSITIVE, measure.SIGNED)
    moved, positive, signed = (np.asarray(signs.values(measure=what)) for what in whats)
    shares = {"D_S·D_T > 0": positive}
    for length in signs.names("item", measure=measure.FALLS):
        shares[f"L_T falls, α = {length}/step"] = np.asarray(signs.values(measure=measure.FALLS, item=length))
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
    rate, error = spec.learning_rate, "|ΔL_T / (−ε α A) − 1|"
    changes = [Line(at.short, by_loss["kl"].moved, by_loss["kl"].step_error(rate)) for at, by_loss in settings.items()]
    lines = [Line(name, moved, values) for name, values in shares.items()]
    lines.append(Line("sign(D_S)·D_T > 0 (not covered)", moved, signed, DASHED))
    panels = [
        Panel(STEP, error, changes, LOG, "the change of L_T against −ε α A (kl)"),
        Panel(STEP, "share of draws", lines, ("log", "linear"), "how far 'small enough' reaches"),
    ]
    figures = {"step": partial(panels_figure, panels)}
    return Section("The student's step lowers the teacher's loss", text, table, figures)


def _controls(
    rows: Measurements, controls: list[measure.Note], kl: Measured, rate: float
) -> tuple[list[Entry], Section]:
    table = [["control", "theorem", "expected of |D_S·D_T|", "slope", "decades", "at the smallest step", "verdict"]]
    arms, lines = [], [Line("kl (covered)", kl.moved, np.abs(kl.inner), {"color": "#222222"})]
    for control in controls:
        name, expected = control["name"], control["expected"]
        (measured,) = numbers(rows, f"control: {name}").values()
        for limit in rows.values(arm=f"control: {name}", measure=measure.MAX_EPSILON):
            measured = measured.up_to(limit)
        fit = inner_fit(measured)
        verdict = control_verdict(measured, expected, bool(control["reason"]), rate)
        if SLOPES[expected] is not None:
            lines.append(Line(name, measured.moved, np.abs(measured.inner)))
        shown = [f"{fit.slope:z.3f}", f"{fit.decades:.1f}", f"{measured.inner[0]:+.2e}"]
        table.append([name, control["reason"] or "covered", expected, *shown, verdict])
        runs = np.abs(measured.inner)
        arms.append(arm_of(f"control: {name}", "slope of |D_S·D_T|", fit.slope, SLOPES[expected], runs, verdict))
    text = (
        "Each breaks one condition of the theorem, and must then not behave as it says. Labels that ignore small moves "
        "of the teacher, and a student that starts elsewhere, are pulled by a constant; |z − y|³ has no curvature at "
        "agreement; a teacher whose loss lies in parameters that the student does not see has no effect at all, to "
        "the bit. A support that depends on the teacher breaks the theorem where only the teacher is cut to it; where "
        "both are, the set stays the same for small ε and the lemma holds, sign and all. Losses whose curvature at "
        "agreement is negative along the teacher's way obey Taylor's theorem with slope 1 as well as any: for them "
        "D_S·D_T < 0, and the teacher's own loss rises by −ε α A. It is the sign that sets the theorem apart."
    )
    panel = Panel(STEP, "|D_S·D_T|", lines, LOG, "controls")
    return arms, Section("Controls", text, table, {"controls": partial(panels_figure, [panel])})


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


def _labels(rows: Measurements) -> tuple[Entry, Section]:
    (exact,) = rows.values(subject="probabilities")
    draws = rows.values(subject="labels")
    mean, half_width = normal_interval(draws)
    errors = abs(mean - exact) / (float(np.std(draws, ddof=1)) / len(draws) ** 0.5)
    verdict = AS_PREDICTED if errors <= MAX_STANDARD_ERRORS else NOT
    text = (
        f"Labels drawn from the teacher at temperature 1: D_S·D_T is {mean:.4e} ± {half_width:.1e} over draws (95 %), "
        f"and {exact:.4e} with the teacher's probabilities, {errors:.1f} standard errors away; as predicted up to "
        f"{MAX_STANDARD_ERRORS:g}: {verdict}."
    )
    arm = arm_of(measure.LABELS, measure.INNER, mean, exact, [mean], verdict)
    return {**arm, "ci95": half_width}, Section("Sampled labels", text, [], {})


def _optimizers(rows: Measurements) -> Section:
    table = [["update", measure.COSINE, "theorem"]]
    for row in rows:
        table.append([row.subject, f"{row.value:.4f}", "covered" if row.subject == "gradient" else "no guarantee"])
    text = "One update of the first row's student on KL, with a small step of the teacher (ε = 0.001)."
    return Section("Adam and sign updates", text, table, {})
