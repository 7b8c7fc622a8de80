"""Coverage as a forecast: the cosine of a student's first update with θ_T - θ⁰ against its accuracy (2606.22019)."""

from collections.abc import Callable, Hashable
from functools import partial

import jax
import numpy as np
from etils import epath
from scipy import stats

from sublim_jax import report
from sublim_jax.experiments.along_training.coverage import claimed, coverages
from sublim_jax.experiments.along_training.spec import ForecastSpec
from sublim_jax.experiments.along_training.spec import check_typed as check_typed
from sublim_jax.experiments.along_training.spec import read as read_spec
from sublim_jax.experiments.mnist.report import accuracy_arm
from sublim_jax.experiments.mnist.run import test_accuracies
from sublim_jax.experiments.mnist.spec import MnistSpec
from sublim_jax.figures import Line, Panel, panels_figure
from sublim_jax.measurements import Measurements, from_array
from sublim_jax.progress import say

BOOTSTRAPS = 2000


read = partial(read_spec, ForecastSpec)


def run(spec: ForecastSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Measures coverage before training and accuracy after it, for all settings."""
    data, store, mesh = claimed(spec, folder, update)
    rows = []
    with jax.default_matmul_precision(spec.mnist.precision):
        for number, setting in enumerate(settings := spec.settings, 1):
            name = setting_name(setting)
            say(f"setting {number} of {len(settings)}: {name}")
            inputs = (setting, range(setting.runs), spec.probe, data)
            covered = store.json("coverage", coverages, *inputs, store=store, mesh=mesh)
            rows += from_array(covered, arm=name, measure="coverage")
            rows += from_array(
                test_accuracies(setting, data, store, mesh)["auxiliary"], arm=name, measure="test_accuracy"
            )
    report.finish(store.folder, spec, rows, document)


def document(spec: ForecastSpec, rows: Measurements, notes: report.Notes) -> report.Document:
    settings, arms = spec.settings, []
    for name in map(setting_name, settings):
        covered, accuracies = (rows.values(arm=name, measure=measure) for measure in ("coverage", "test_accuracy"))
        arms.append(accuracy_arm(name, accuracies, coverage=float(np.mean(covered)), coverage_runs=covered))
    x = np.asarray([arm["coverage"] for arm in arms])
    y = np.asarray([arm["mean"] for arm in arms])
    finite = np.isfinite(x) & np.isfinite(y)
    groups, panels, style = {"all settings": np.flatnonzero(finite)}, [], {"ls": "", "marker": "o", "alpha": 0.7}
    for title, key in GROUPS.items():
        values = [key(setting) for setting in settings]
        places = {value: np.flatnonzero([v == value for v in values] & finite) for value in dict.fromkeys(values)}
        groups |= {f"{title} {value}": members for value, members in places.items()}
        if title != "width":
            lines = [Line(f"{value}", x[members], y[members], style) for value, members in places.items()]
            panels.append(Panel("coverage before training", "test accuracy after", lines, title=f"by {title}"))
    table = [["settings", "number", "Spearman's ρ", "95 % (bootstrap over settings)"]]
    for name, members in groups.items():
        if name == "all settings" or len(members) >= 10:  # too few settings otherwise
            rho, low, high = spearman(x[members], y[members])
            table.append([name, str(len(members)), f"{rho:+.2f}", f"{low:+.2f} to {high:+.2f}"])
    text = (
        f"Each of {len(arms)} settings: its students' coverage before training (the cosine of their loss's negative "
        f"gradient with θ_T − θ⁰, on {spec.probe} inputs, mean of {spec.mnist.runs} runs) and their test accuracy "
        f"after, on auxiliary logits. Spearman's ρ over all of them: **{table[1][2]}** ({table[1][3]}). The interval "
        "treats settings as independent, although they share levels and runs."
    )
    if diverged := int(np.sum(~finite)):
        text += f" In {diverged} settings a run has diverged; they are left out of the ranks."
    listing = [["setting", "coverage", "test accuracy"]]
    listing += [[arm["name"], f"{arm['coverage']:.4f}", report.plus_minus(arm["mean"], arm["ci95"])] for arm in arms]
    figures = {"forecast": partial(panels_figure, panels)}
    return arms, [
        report.Section("Coverage as a forecast", text, table, figures),
        report.Section("All settings", "", listing, {}),
    ]


GROUPS: dict[str, Callable[[MnistSpec], Hashable]] = {
    "inputs": lambda spec: spec.inputs.kind,
    "auxiliary logits": lambda spec: spec.model.auxiliary,
    "init distance": lambda spec: spec.student.init_distance,
    "width": lambda spec: spec.model.width,
}


def spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rank correlation with its 95 % percentile bootstrap interval; nan for fewer than three points."""
    if len(x) < 3:
        return float("nan"), float("nan"), float("nan")
    rho = float(stats.spearmanr(x, y).statistic)
    rng = np.random.default_rng(0)
    resamples = rng.integers(0, len(x), (BOOTSTRAPS, len(x)))
    resamples = resamples[[len(set(rows)) > 2 for rows in resamples]]
    ranks_x, ranks_y = (stats.rankdata(values[resamples], axis=1) for values in (x, y))
    correlations = stats.pearsonr(ranks_x, ranks_y, axis=1).statistic
    low, high = np.nanpercentile(correlations, (2.5, 97.5))
    return rho, float(low), float(high)


def setting_name(spec: MnistSpec) -> str:
    return (
        f"{spec.inputs.kind}, {spec.model.auxiliary} auxiliary logits, "
        f"distance {spec.student.init_distance:g}, width {spec.model.width}"
    )
