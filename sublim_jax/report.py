"""What a run leaves for people: results.json, report.md, figures."""

import importlib.metadata
import math
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from sublim_jax.progress import say
from sublim_jax.workdir import Workdir, plain, write_json

Arm = dict[str, Any]

INK, OURS, PAPER = "#222222", "#3b6fb6", "#d1495b"
READING_ERROR = 0.003  # of a published value that was read off a figure
CHANCE = 0.1


def write_arms(
    workdir: Workdir, config: ConfigDict, arms: list[Arm], curves: dict[str, tuple[str, list[Arm]]] | None = None
) -> None:
    """Results of one experiment: arms with every run's value, and the paper's figure beside ours where it has one.

    Args:
      curves: more figures, {name: (axis, points)}, points as for `write_sweep`.
    """
    figures = {"arms": lambda path: arms_figure(arms, path)}
    for name, (axis, points) in (curves or {}).items():
        figures[name] = partial(sweep_figure, points, axis)
    _write(workdir, config, arms, figures)


def write_sweep(workdir: Workdir, config: ConfigDict, points: list[Arm]) -> None:
    """Results of a sweep: arms at every value of `config.sweep.axis`, under "value"."""
    _write(workdir, config, points, {"sweep": partial(sweep_figure, points, config.sweep.axis)})


def _write(workdir: Workdir, config: ConfigDict, arms: list[Arm], figures: dict[str, Callable[[Any], None]]) -> None:
    if jax.process_index():
        return
    results = {
        "experiment": config.experiment,
        "preset": config.preset,
        "config": plain(config),
        "versions": versions(),
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}, {jax.process_count()} process(es)",
        "arms": [{key: _finite(value) for key, value in arm.items()} for arm in arms],
    }
    folder = workdir.path / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        draw(folder / f"{name}.png")
    header, rows = _rows(arms)
    text = [
        f"# {config.experiment}, preset {config.preset}",
        *("", f"{results['devices']}; {config.runs} runs.", ""),
        *map(_line, [header, ["---"] * len(header), *rows]),
        "",
        "Intervals are 95 % over runs (± 1.96 std / √runs). Inside: within the paper's value ± (its half-width + "
        f"ours + {READING_ERROR} for reading its figure).",
        *(f"\n![{name}](figures/{name}.png)" for name in figures),
    ]
    (workdir.path / "report.md").write_text("\n".join(text) + "\n")
    write_json(workdir.path / "results.json", results)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    say(f"table: {workdir.path / 'report.md'}")
    for name in figures:
        say(f"figure: {folder / name}.png")
    say(f"numbers: {workdir.path / 'results.json'}")


def _rows(arms: list[Arm]) -> tuple[list[str], list[list[str]]]:
    sweep = "value" in arms[0]
    header = (["value"] if sweep else []) + ["arm", arms[0]["metric"].replace("_", " "), "runs", "paper", "inside"]
    rows = []
    for arm in arms:
        row = [arm["value"]] if sweep else []
        row += [arm["name"], _pm(arm["mean"], arm["ci95"]), str(len(arm["runs"]))]
        row += [_pm(arm["paper"], arm["paper_ci95"]), {None: "", True: "yes", False: "no"}[inside(arm)]]
        rows.append(row)
    return header, rows


def inside(arm: Arm) -> bool | None:
    """Whether an arm agrees with the paper within both intervals and the error of reading a figure."""
    if arm["paper"] is None or math.isnan(arm["ci95"]):
        return None
    return abs(arm["mean"] - arm["paper"]) <= arm["ci95"] + arm["paper_ci95"] + READING_ERROR


def arms_figure(arms: list[Arm], path: Any) -> None:
    """One row an arm: every run as a dot, mean and interval as a bar, the paper's value as a diamond."""
    figure, axes = plt.subplots(figsize=(7.5, 0.5 * len(arms) + 1.2), layout="constrained")
    for row, arm in enumerate(reversed(arms)):
        axes.barh(row, arm["mean"], height=0.62, color=OURS, alpha=0.25, zorder=1)
        jitter = [row + 0.22 * math.sin(7.0 * index) for index in range(len(arm["runs"]))]
        axes.plot(arm["runs"], jitter, "o", ms=2.5, color=OURS, alpha=0.7, zorder=2, mew=0)
        axes.errorbar(arm["mean"], row, xerr=arm["ci95"], color=INK, capsize=3, fmt="|", ms=12, zorder=3)
        if arm["paper"] is not None:
            axes.errorbar(
                arm["paper"], row + 0.4, xerr=arm["paper_ci95"], fmt="D", ms=4, color=PAPER, capsize=2, zorder=4
            )
    axes.axvline(CHANCE, color="#888888", lw=0.8, ls=":")
    axes.text(CHANCE + 0.005, len(arms) - 0.42, "chance", color="#666666", fontsize=8)
    axes.set_yticks(range(len(arms)), [arm["name"] for arm in reversed(arms)])
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(arms) - 0.1)
    axes.set_xlabel(f"MNIST {arms[0]['metric'].replace('_', ' ')}")
    axes.plot([], [], "o", ms=3, color=OURS, label=f"a run ({len(arms[0]['runs'])} each)")
    axes.errorbar([], [], xerr=[], color=INK, capsize=3, fmt="|", label="mean, 95 % interval")
    if any(arm["paper"] is not None for arm in arms):
        axes.errorbar([], [], xerr=[], fmt="D", ms=4, color=PAPER, capsize=2, label="paper")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, axes, path)


def sweep_figure(points: list[Arm], axis: str, path: Any) -> None:
    """One line an arm over the values of the axis, with every run as a dot."""
    values = list(dict.fromkeys(point["value"] for point in points))
    numeric = _numbers(values)
    place = numeric or dict(zip(values, range(len(values))))
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name in dict.fromkeys(point["name"] for point in points):
        mine = [point for point in points if point["name"] == name]
        x = [place[point["value"]] for point in mine]
        half_widths = [0 if math.isnan(point["ci95"]) else point["ci95"] for point in mine]
        means = [point["mean"] for point in mine]
        line = axes.errorbar(x, means, yerr=half_widths, capsize=3, marker="o", ms=4, label=name)
        for position, point in zip(x, mine):
            axes.plot([position] * len(point["runs"]), point["runs"], ".", ms=3, alpha=0.5, color=line[0].get_color())
    if numeric and min(numeric.values()) > 0 and max(numeric.values()) >= 20 * min(numeric.values()):
        axes.set_xscale("log")
    axes.set_xticks(list(place.values()), values)
    axes.minorticks_off()
    axes.axhline(CHANCE, color="#888888", lw=0.8, ls=":")
    axes.set_ylim(0, 1)
    axes.set_xlabel(axis)
    axes.set_ylabel("MNIST test accuracy")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, axes, path)


def _save(figure: Any, axes: Any, path: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    with path.open("wb") as file:
        figure.savefig(file, dpi=160)
    plt.close(figure)


def _numbers(values: list[str]) -> dict[str, float] | None:
    try:
        return {value: float(value) for value in values}
    except ValueError:
        return None


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _pm(mean: float | None, half_width: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.3f}" if half_width is None or math.isnan(half_width) else f"{mean:.3f} ± {half_width:.3f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
