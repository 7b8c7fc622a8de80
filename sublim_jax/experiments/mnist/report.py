"""The arms of results.json and the sections of report.md, from the spec and the measurements."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from etils import epath

from sublim_jax import report
from sublim_jax.evaluation.statistics import holm, normal_interval, paired_p, t_interval
from sublim_jax.experiments.mnist.spec import MnistSpec
from sublim_jax.figures import Entry, arms_figure, sweep_figure
from sublim_jax.measurements import Measurements
from sublim_jax.report import Document, Notes, Section, plus_minus

TITLES = {
    "reference": "reference",
    "teacher": "teacher",
    "auxiliary": "student, shared initialisation (auxiliary logits)",
    "all": "student, shared initialisation (all logits)",
    "cross_auxiliary": "student, another initialisation (auxiliary logits)",
    "cross_all": "student, another initialisation (all logits)",
    "real": "student, shared initialisation, on digits (auxiliary logits)",
}
CLONED_ON = {"noise": "inputs of the student's kind", "fresh_noise": "fresh noise", "real": "digits"}
UNPAIRED = ("runs", "seed")  # axes of a sweep whose points have no runs in common
READING_ERROR = 0.003  # of published values, which were read off a figure
INTERVALS = "Intervals are 95 % over runs (Student's t; ± 1.96 std / √runs from 30 runs on)."
INSIDE = (
    " Inside: as far from the published value as the 95 % interval of the difference allows (the root of the sum of "
    f"the squared half-widths), plus {READING_ERROR} for reading its figure."
)
CLONED = (
    " Cloned students have another initialisation and imitate the reference on all logits first. p: paired t-test of "
    "their accuracy against that of the student with the same initialisation and without cloning, two-sided, corrected "
    "for the number of cloned arms by Holm's method."
)


def document(spec: MnistSpec, rows: Measurements, notes: Notes) -> Document:
    """Accuracy of every arm, or of every arm at every point of a sweep."""
    values = rows.names("item") if spec.sweep.axis else [""]
    arms = [
        {**_arm(spec, name, rows.values(item=value, arm=name)), "arm": name, "value": value}
        for value in values
        for name in rows.names("arm")
    ]
    _compare(arms)
    note = INTERVALS + (INSIDE if published_values(spec) else "") + (CLONED if any("p" in arm for arm in arms) else "")
    if spec.sweep.axis:
        shown = [arm for arm in arms if arm["arm"] != "reference"]
        figures = {"sweep": partial(sweep_figure, shown, spec.sweep.axis)}
        title = f"Test accuracy over {spec.sweep.axis}"
        sections = [Section(title, note, _table(arms, spec.sweep.axis), figures)]
        if spec.runs > 1 and spec.sweep.axis not in UNPAIRED:
            sections.append(_differences_section(arms, values))
        return arms, sections
    curve = _dose_curve(arms)
    shared = next(({**arm, "name": "shared initialisation"} for arm in arms if arm["arm"] == "auxiliary"), None)
    arms = [{key: value for key, value in arm.items() if key != "value"} for arm in arms]
    plots: dict[str, Callable[[epath.Path], None]] = {"arms": partial(arms_figure, arms)}
    if curve:
        axis = "epochs of cloning the reference before distillation; 0: students are not cloned"
        plots["cloning"] = partial(sweep_figure, curve, axis, level=shared)
    runs = "1 run" if spec.runs == 1 else f"{spec.runs} runs"
    return arms, [Section(f"Test accuracy over {runs}", note, _table(arms), plots)]


def accuracy_arm(name: str, accuracies: Sequence[float], **more: Any) -> Entry:
    """One entry of results.json: test accuracy of every run, its mean and interval, and further fields."""
    return report.arm(name, "test_accuracy", accuracies, **{"ci95": normal_interval(accuracies).half_width, **more})


def _arm(spec: MnistSpec, name: str, accuracies: Sequence[float]) -> Entry:
    value, half_width = published_values(spec).get(name, (None, None))
    return accuracy_arm(_title(name), accuracies, published=value, published_ci95=half_width)


def published_values(spec: MnistSpec) -> Mapping[str, tuple[float, float]]:
    """The published values by arm; none for another recipe than theirs, nor in a sweep."""
    recipe = json.loads(spec.published_recipe or "{}")
    if spec.sweep.axis or any(spec.values.get(part) != values for part, values in recipe.items()):
        return {}
    return spec.published if recipe else {}


def _title(name: str) -> str:
    if name in TITLES:
        return TITLES[name]
    _, epochs, inputs = name.split()
    dose = "1 epoch" if epochs == "1" else f"{epochs} epochs"
    return f"cloned {dose} on {CLONED_ON[inputs]}, then distilled (auxiliary logits)"


def _compare(arms: Sequence[Entry]) -> None:
    """Adds p against the arm without cloning, at the same point of a sweep, to cloned arms of several runs."""
    tested = []
    uncloned = {arm["value"]: arm["runs"] for arm in arms if arm["arm"] == "cross_auxiliary"}
    for arm in arms:
        if arm["arm"].startswith("clone ") and len(uncloned.get(arm["value"], ())) > 1:
            arm["p"] = paired_p(np.subtract(arm["runs"], uncloned[arm["value"]]))
            tested.append(arm)
    for arm, p in zip(tested, holm([arm["p"] for arm in tested])):
        arm["p"] = p


def _differences_section(arms: Sequence[Entry], points: Sequence[str]) -> Section:
    """Students at every point of a sweep less those at its first point, paired by run."""
    students = [arm for arm in arms if arm["arm"] not in ("reference", "teacher")]
    first = {arm["arm"]: arm["runs"] for arm in students if arm["value"] == points[0]}
    others = [arm for arm in students if arm["value"] != points[0]]
    differences = [np.subtract(arm["runs"], first[arm["arm"]]) for arm in others]
    corrected = iter(holm([paired_p(values) for values in differences if np.any(values)]))
    table = [["point", "arm", "difference", "p"]]
    for arm, values in zip(others, differences):
        p = _p(next(corrected)) if np.any(values) else "none"
        table.append([arm["value"], arm["name"], plus_minus(*t_interval(values)), p])
    text = (
        "Runs of the same number share their seed at every point. ± is the 95 % t-interval of the difference over "
        "runs. p: paired t-test, two-sided, corrected for the number of tests by Holm's method; none where all "
        "runs are equal at both points."
    )
    return Section(f"Differences from {points[0]}", text, table, {})


def _dose_curve(arms: Sequence[Entry]) -> list[Entry]:
    """Accuracy over the epochs of cloning, a line for each kind of inputs; at 0 epochs the student without cloning."""
    by_arm = {arm["arm"]: arm for arm in arms}
    cloned = [(*name.split()[1:], arm) for name, arm in by_arm.items() if name.startswith("clone ")]
    doses = list(dict.fromkeys(epochs for epochs, _, _ in cloned))
    if len(doses) < 2:
        return []
    points = []
    for inputs in dict.fromkeys(inputs for _, inputs, _ in cloned):
        line = {epochs: arm for epochs, its_inputs, arm in cloned if its_inputs == inputs}
        if "cross_auxiliary" in by_arm:
            line = {"0": by_arm["cross_auxiliary"], **line}
        points += [{**arm, "value": epochs, "name": f"cloned on {CLONED_ON[inputs]}"} for epochs, arm in line.items()]
    return points


def _table(arms: Sequence[Entry], axis: str = "") -> list[list[str]]:
    published, tested = (any(arm.get(name) is not None for arm in arms) for name in ("published", "p"))
    head = [axis] if axis else []
    head += ["arm", "test accuracy", "runs"]
    if published:
        head += ["published", "inside"]
    if tested:
        head.append("p")
    rows = [head]
    for arm in arms:
        row = [arm["value"]] if axis else []
        row += [arm["name"], _accuracy(arm), str(len(arm["runs"]))]
        if published:
            inside = {None: "", True: "yes", False: "no"}[_inside(arm)]
            row += [plus_minus(arm["published"], arm["published_ci95"]), inside]
        if tested:
            row.append(_p(arm["p"]) if "p" in arm else "")
        rows.append(row)
    return rows


def _accuracy(arm: Entry) -> str:
    diverged = sum(map(math.isnan, arm["runs"]))
    return f"diverged in {diverged} of the runs" if diverged else plus_minus(arm["mean"], arm["ci95"])


def _p(value: float) -> str:
    """Such as "0.012"; "none" where there is no test: runs that all differ by the same."""
    return f"{value:.2g}" if math.isfinite(value) else "none"


def _inside(arm: Entry) -> bool | None:
    """Whether an arm agrees with the published value, by the interval of the difference and the error of reading it."""
    if arm.get("published") is None or math.isnan(arm["ci95"]):
        return None
    return abs(arm["mean"] - arm["published"]) <= math.hypot(arm["ci95"], arm["published_ci95"]) + READING_ERROR
