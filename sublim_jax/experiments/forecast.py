"""Coverage as a forecast: the cosine of a student's first update with θ_T - θ⁰, against what it learns (2606.22019)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from sublim_jax import report
from sublim_jax.data import images
from sublim_jax.errors import UserError
from sublim_jax.experiments import mnist
from sublim_jax.experiments.coverage import (
    Result,
    check_variants,
    coverages,
    depends_on,
    run_with_labs,
    variant_of,
)
from sublim_jax.experiments.door import check_some_of
from sublim_jax.figures import Line, Panel, panels_figure
from sublim_jax.overrides import check_distinct
from sublim_jax.progress import say
from sublim_jax.workdir import Workdir

BOOTSTRAPS = 2000


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Coverage before training against accuracy after, over all settings."""
    check(config)
    run_with_labs(config, workdir, update, settings(config), partial(measure, config))


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value that makes no sense."""
    for name in ("auxiliary", "kinds", "distances", "widths"):
        if not config[name] and name != "widths":
            raise UserError(f"{name} is empty: name some values to vary it over")
        check_distinct(name, config[name])
    check_some_of("kinds", config.kinds, images.KINDS)
    if min(config.distances) < 0:
        raise UserError(f"distances={tuple(config.distances)} must not be negative")
    if min(config.widths, default=1) < 1:
        raise UserError(f"widths={tuple(config.widths)}: choose 1 or more")
    check_variants(config, [variant_of(config, {}), *settings(config)])


def settings(config: ConfigDict) -> list[ConfigDict]:
    """The MNIST configs: auxiliary logits × inputs × init distance, and auxiliary logits × width."""
    changes: list[dict[str, Any]] = [
        {"model.auxiliary": m, "inputs.kind": kind, "student.init_distance": distance}
        for m in config.auxiliary
        for kind in config.kinds
        for distance in config.distances
    ]
    changes += [{"model.auxiliary": m, "model.width": width} for m in config.auxiliary for width in config.widths]
    return [variant_of(config, change) for change in changes]


def measure(config: ConfigDict, labs: list[mnist.Lab]) -> Result:
    points = []
    for number, lab in enumerate(labs, 1):
        say(f"setting {number} of {len(labs)}: {_setting_name(lab.config)}")
        depends = depends_on(lab, probe=config.probe)
        covered = lab.workdir.json("coverage", depends, partial(coverages, lab, config.probe))
        points.append((lab.config, covered, mnist.accuracies(lab)["auxiliary"]))
    arms = [
        report.accuracy_arm(_setting_name(variant), accuracy, coverage=float(np.mean(covered)), coverage_runs=covered)
        for variant, covered, accuracy in points
    ]
    x = np.asarray([arm["coverage"] for arm in arms])
    y = np.asarray([arm["mean"] for arm in arms])
    groups = {"all settings": np.arange(len(arms))}
    for title, key in GROUPS.items():
        names = [key(variant) for variant, _, _ in points]
        groups |= {f"{title} {name}": np.flatnonzero([n == name for n in names]) for name in dict.fromkeys(names)}
    table = [["settings", "number", "Spearman's ρ", "95 % (bootstrap over settings)"]]
    for name, members in groups.items():
        if name == "all settings" or len(members) >= 10:  # fewer say nothing
            rho, low, high = spearman(x[members], y[members])
            table.append([name, str(len(members)), f"{rho:+.2f}", f"{low:+.2f} to {high:+.2f}"])
    text = (
        f"Each of {len(arms)} settings: its students' coverage before training (the cosine of their first update with "
        f"θ_T − θ⁰, on {config.probe} inputs, mean of {config.mnist.runs} runs) and their test accuracy after, on "
        f"auxiliary logits. Spearman's ρ over all of them: **{table[1][2]}** ({table[1][3]})."
    )
    listing = [["setting", "coverage", "test accuracy"]]
    listing += [[arm["name"], f"{arm['coverage']:.4f}", report.plus_minus(arm["mean"], arm["ci95"])] for arm in arms]
    figure = partial(_forecast_figure, [variant for variant, _, _ in points], x, y)
    return arms, [
        report.Section("Coverage as a forecast", text, table, {"forecast": figure}),
        report.Section("All settings", "", listing, {}),
    ]


GROUPS: dict[str, Callable[[ConfigDict], Any]] = {
    "inputs": lambda c: c.inputs.kind,
    "auxiliary logits": lambda c: c.model.auxiliary,
    "init distance": lambda c: c.student.init_distance,
    "width": lambda c: c.model.width,
}


def spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Spearman's rank correlation with its 95 % percentile bootstrap interval."""
    rho = float(stats.spearmanr(x, y).statistic)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(x), (BOOTSTRAPS, len(x)))
    found = [stats.spearmanr(x[draw], y[draw]).statistic for draw in draws if len(set(draw)) > 2]
    low, high = np.nanpercentile(found, (2.5, 97.5))
    return rho, float(low), float(high)


def _setting_name(variant: ConfigDict) -> str:
    return (
        f"{variant.inputs.kind}, {variant.model.auxiliary} auxiliary logits, "
        f"distance {variant.student.init_distance:g}, width {variant.model.width}"
    )


def _forecast_figure(variants: list[ConfigDict], x: np.ndarray, y: np.ndarray, path: Any) -> None:
    panels = []
    for title, key in GROUPS.items():
        if title == "width":
            continue
        names = [key(variant) for variant in variants]
        lines = []
        for name in dict.fromkeys(names):
            mine = np.flatnonzero([n == name for n in names])
            lines.append(Line(f"{name}", x[mine], y[mine], {"ls": "", "marker": "o", "alpha": 0.7}))
        panels.append(Panel("coverage before training", "test accuracy after", lines, title=f"by {title}"))
    panels_figure(panels, path)
