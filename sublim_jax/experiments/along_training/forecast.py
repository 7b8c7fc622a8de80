"""Coverage as a forecast: the cosine of a student's first update with θ_T - θ⁰, against what it learns (2606.22019)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from scipy import stats

from sublim_jax import report
from sublim_jax.experiments.along_training import spec as specs
from sublim_jax.experiments.along_training.coverage import claimed, coverages
from sublim_jax.experiments.along_training.spec import ForecastSpec
from sublim_jax.experiments.mnist.report import accuracy_arm
from sublim_jax.experiments.mnist.run import test_accuracies
from sublim_jax.experiments.mnist.spec import MnistSpec
from sublim_jax.figures import Line, Panel, panels_figure
from sublim_jax.measurements import Measurements, each
from sublim_jax.progress import say

BOOTSTRAPS = 2000


def read(config: ConfigDict) -> ForecastSpec:
    return specs.read(ForecastSpec, config)


def run(spec: ForecastSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Coverage before training against accuracy after, over all settings."""
    data, store, mesh = claimed(spec, folder, update)
    rows = []
    with jax.default_matmul_precision(spec.mnist.precision):
        for number, setting in enumerate(settings := spec.settings, 1):
            name = setting_name(setting)
            say(f"setting {number} of {len(settings)}: {name}")
            covered = store.json("coverage", coverages, setting, spec.probe, data, store=store, mesh=mesh)
            rows += each(covered, arm=name, measure="coverage")
            rows += each(test_accuracies(setting, data, store, mesh)["auxiliary"], arm=name, measure="test_accuracy")
    report.finish(store.folder, spec, rows, document)


def document(spec: ForecastSpec, rows: Measurements, notes: report.Notes) -> report.Document:
    settings, arms = spec.settings, []
    for name in map(setting_name, settings):
        covered, accuracies = (rows.values(arm=name, measure=measure) for measure in ("coverage", "test_accuracy"))
        arms.append(accuracy_arm(name, accuracies, coverage=float(np.mean(covered)), coverage_runs=covered))
    x = np.asarray([arm["coverage"] for arm in arms])
    y = np.asarray([arm["mean"] for arm in arms])
    groups = {"all settings": np.arange(len(arms))}
    for title, key in GROUPS.items():
        names = [key(setting) for setting in settings]
        groups |= {f"{title} {name}": np.flatnonzero([n == name for n in names]) for name in dict.fromkeys(names)}
    table = [["settings", "number", "Spearman's ρ", "95 % (bootstrap over settings)"]]
    for name, members in groups.items():
        if name == "all settings" or len(members) >= 10:  # fewer say nothing
            rho, low, high = spearman(x[members], y[members])
            table.append([name, str(len(members)), f"{rho:+.2f}", f"{low:+.2f} to {high:+.2f}"])
    text = (
        f"Each of {len(arms)} settings: its students' coverage before training (the cosine of their first update with "
        f"θ_T − θ⁰, on {spec.probe} inputs, mean of {spec.mnist.runs} runs) and their test accuracy after, on "
        f"auxiliary logits. Spearman's ρ over all of them: **{table[1][2]}** ({table[1][3]})."
    )
    listing = [["setting", "coverage", "test accuracy"]]
    listing += [[arm["name"], f"{arm['coverage']:.4f}", report.plus_minus(arm["mean"], arm["ci95"])] for arm in arms]
    figure = partial(_forecast_figure, settings, x, y)
    return arms, [
        report.Section("Coverage as a forecast", text, table, {"forecast": figure}),
        report.Section("All settings", "", listing, {}),
    ]


GROUPS: dict[str, Callable[[MnistSpec], Any]] = {
    "inputs": lambda spec: spec.inputs.kind,
    "auxiliary logits": lambda spec: spec.model.auxiliary,
    "init distance": lambda spec: spec.student.init_distance,
    "width": lambda spec: spec.model.width,
}


def spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rank correlation with its 95 % percentile bootstrap interval."""
    rho = float(stats.spearmanr(x, y).statistic)
    rng = np.random.default_rng(0)
    resamples = rng.integers(0, len(x), (BOOTSTRAPS, len(x)))
    found = [stats.spearmanr(x[rows], y[rows]).statistic for rows in resamples if len(set(rows)) > 2]
    low, high = np.nanpercentile(found, (2.5, 97.5))
    return rho, float(low), float(high)


def setting_name(spec: MnistSpec) -> str:
    return (
        f"{spec.inputs.kind}, {spec.model.auxiliary} auxiliary logits, "
        f"distance {spec.student.init_distance:g}, width {spec.model.width}"
    )


def _forecast_figure(settings: list[MnistSpec], x: np.ndarray, y: np.ndarray, path: Any) -> None:
    panels = []
    for title, key in GROUPS.items():
        if title == "width":
            continue
        names = [key(setting) for setting in settings]
        lines = []
        for name in dict.fromkeys(names):
            mine = np.flatnonzero([n == name for n in names])
            lines.append(Line(f"{name}", x[mine], y[mine], {"ls": "", "marker": "o", "alpha": 0.7}))
        panels.append(Panel("coverage before training", "test accuracy after", lines, title=f"by {title}"))
    panels_figure(panels, path)
