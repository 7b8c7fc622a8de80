"""What is shown: the arms of results.json and the sections of report.md, from the spec and the measurements."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sublim_jax.evaluation.statistics import normal_interval
from sublim_jax.experiments.mnist.spec import MnistSpec
from sublim_jax.figures import Arm, arms_figure, sweep_figure
from sublim_jax.measurements import Measurements
from sublim_jax.report import Document, Notes, Section, plus_minus

TITLES = {
    "reference": "reference",
    "teacher": "teacher",
    "auxiliary": "student (auxiliary logits)",
    "all": "student (all logits)",
    "cross_auxiliary": "cross-init student (auxiliary logits)",
    "cross_all": "cross-init student (all logits)",
    "real": "student on real images (auxiliary logits)",
}
READING_ERROR = 0.003  # of a published value that was read off a figure
NOTE = (
    "Intervals are 95 % over runs (± 1.96 std / √runs). Inside: within the paper's value ± (its half-width + ours + "
    f"{READING_ERROR} for reading its figure)."
)


def document(spec: MnistSpec, rows: Measurements, notes: Notes) -> Document:
    """Accuracy of every arm, or of every arm at every point of a sweep."""
    if spec.sweep.axis:
        points = [
            {**_arm(spec, name, rows.values(item=value, arm=name)), "value": value}
            for value in rows.names("item")
            for name in rows.names("arm")
        ]
        figure = partial(sweep_figure, points, spec.sweep.axis)
        return points, [Section(f"Test accuracy over {spec.sweep.axis}", NOTE, _table(points), {"sweep": figure})]
    arms = {name: _arm(spec, name, rows.values(arm=name)) for name in rows.names("arm")}
    figures: dict[str, Callable[[Any], None]] = {"arms": partial(arms_figure, list(arms.values()))}
    if curve := _dose_curve(arms):
        axis = "epochs of cloning the reference before distillation"
        figures["cloning"] = partial(sweep_figure, curve, axis)
    everything = list(arms.values())
    return everything, [Section(f"Test accuracy over {spec.runs} runs", NOTE, _table(everything), figures)]


def accuracy_arm(name: str, accuracies: Sequence[float], **more: Any) -> Arm:
    """One entry of results.json: test accuracy of every run, its mean and interval, and whatever belongs to it."""
    mean, half_width = normal_interval(accuracies)
    values = {"mean": mean, "ci95": half_width, "runs": list(accuracies)}
    return {"name": name, "metric": "test_accuracy", **values, "paper": None, **more}


def _arm(spec: MnistSpec, name: str, accuracies: Sequence[float]) -> Arm:
    published, half_width = spec.published.get(name, (None, None))
    title = TITLES.get(name) or f"student cloned for {name.removeprefix('clone ')} epochs (auxiliary logits)"
    return accuracy_arm(title, accuracies, paper=published, paper_ci95=half_width)


def _dose_curve(arms: dict[str, Arm]) -> list[Arm]:
    """Accuracy over the epochs of cloning, the uncloned cross-init student at 0 and the reference's own as the aim."""
    doses = {name.removeprefix("clone "): arm for name, arm in arms.items() if name.startswith("clone ")}
    if len(doses) < 2:
        return []
    if "cross_auxiliary" in arms:
        doses = {"0": arms["cross_auxiliary"], **doses}
    points = [{**arm, "value": dose, "name": "cloned student"} for dose, arm in doses.items()]
    if "auxiliary" in arms:
        points += [{**arms["auxiliary"], "value": dose, "name": "same-init student"} for dose in doses]
    return points


def _table(arms: Sequence[Arm]) -> list[list[str]]:
    sweep = "value" in arms[0]
    rows = [(["value"] if sweep else []) + ["arm", "test accuracy", "runs", "paper", "inside"]]
    for arm in arms:
        row = [arm["value"]] if sweep else []
        row += [arm["name"], plus_minus(arm["mean"], arm["ci95"]), str(len(arm["runs"]))]
        row += [plus_minus(arm["paper"], arm["paper_ci95"]), {None: "", True: "yes", False: "no"}[_inside(arm)]]
        rows.append(row)
    return rows


def _inside(arm: Arm) -> bool | None:
    """Whether an arm agrees with the paper within both intervals and the error of reading a figure."""
    if arm["paper"] is None or math.isnan(arm["ci95"]):
        return None
    return abs(arm["mean"] - arm["paper"]) <= arm["ci95"] + arm["paper_ci95"] + READING_ERROR
