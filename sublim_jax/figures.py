"""Drawing: every figure that a report shows."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from sublim_jax import storage
from sublim_jax.evaluation.statistics import normal_interval, t_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Entry = dict[str, Any]
Numbers = Sequence[float] | np.ndarray

INK, OURS, PAPER = "#222222", "#3b6fb6", "#d1495b"
CHANCE = 0.1


class Line(NamedTuple):
    """One series. `style` holds matplotlib's keywords; `band` the half-width of an interval at each point."""

    label: str
    x: Numbers
    y: Numbers
    style: dict[str, Any] = {}  # noqa: RUF012
    band: Numbers | None = None


class Panel(NamedTuple):
    """One pair of axes; `scales` are matplotlib's names for x and y."""

    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    scales: tuple[str, str] = ("linear", "linear")
    title: str = ""


def banded(label: str, x: Numbers, runs: Sequence[Numbers] | np.ndarray, **style: Any) -> Line:
    """The mean over runs at each x, with its 95 % interval.

    Args:
      runs: every run's value, at each x.
    """
    intervals = [normal_interval(row) for row in runs]
    band = [0.0 if math.isnan(interval.half_width) else interval.half_width for interval in intervals]
    return Line(label, x, [interval.mean for interval in intervals], {"marker": "", **style}, band)


def panels_figure(panels: Sequence[Panel], path: epath.Path) -> None:
    """Panels in rows of two."""
    from matplotlib import colormaps

    rows, columns = math.ceil(len(panels) / 2), min(len(panels), 2)
    figure = _figure(5.4 * columns, 4.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels):
        if len(panel.lines) > 10:
            axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
        for line in panel.lines:
            style = {"marker": ".", "ms": 4, "lw": 1.2, **line.style}
            (curve,) = axes.plot(line.x, line.y, label=line.label, **style)
            if line.band is not None:
                low, high = ([y + sign * b for y, b in zip(line.y, line.band)] for sign in (-1, 1))
                axes.fill_between(line.x, low, high, color=curve.get_color(), alpha=0.2, lw=0)
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, xscale=panel.scales[0], yscale=panel.scales[1])
        axes.set_title(panel.title, fontsize=10)
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(panel.lines) > 10 else {}
        axes.legend(frameon=False, fontsize=7, **beside)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def arms_figure(arms: list[Entry], path: epath.Path, xlabel: str = "", chance: float | None = CHANCE) -> None:
    """One row per arm: every run as a dot, mean and interval if there are several, the published value as a diamond.

    Args:
      xlabel: by default MNIST's metric.
      chance: position of the line for chance, on an axis of 0 to 1; None for a line at 0 and automatic limits.
    """
    figure = _figure(7.5, 0.5 * len(arms) + 1.2)
    axes = figure.subplots()
    for row, arm in enumerate(reversed(arms)):
        axes.barh(row, arm["mean"], height=0.62, color=OURS, alpha=0.25, zorder=1)
        # Above and below the interval, not on it.
        jitter = [row + (-1) ** index * (0.1 + 0.12 * abs(math.sin(7.0 * index))) for index in range(len(arm["runs"]))]
        several = len(arm["runs"]) > 1
        axes.plot(arm["runs"], jitter, "o", ms=2.5 if several else 5.0, color=OURS, alpha=0.7, zorder=4, mew=0)
        if several:
            axes.errorbar(arm["mean"], row, xerr=arm["ci95"], color=INK, capsize=3, fmt="|", ms=12, zorder=2)
        if arm.get("published") is not None:
            spread = arm["published_ci95"]
            axes.errorbar(arm["published"], row + 0.4, xerr=spread, fmt="D", ms=4, color=PAPER, capsize=2, zorder=4)
    axes.axvline(chance or 0, color="#888888", lw=0.8, ls=":")
    if chance is not None:
        axes.text(chance + 0.005, len(arms) - 0.42, "chance", color="#666666", fontsize=8)
    if chance is not None or not any(arm["mean"] for arm in arms):
        axes.set_xlim(0, 1)
    axes.locator_params(axis="x", nbins=6)
    axes.set_yticks(range(len(arms)), [textwrap.fill(arm["name"], 34) for arm in reversed(arms)])
    axes.set_ylim(-0.6, len(arms) - 0.1)
    axes.set_xlabel(xlabel or f"MNIST {arms[0]['metric'].replace('_', ' ')}")
    counts = sorted({len(arm["runs"]) for arm in arms})  # the untrained model has one run, students have several
    axes.plot([], [], "o", ms=3, color=OURS, label=f"a run ({' or '.join(map(str, counts))} each)")
    if counts[-1] > 1:
        axes.errorbar([], [], xerr=[], color=INK, capsize=3, fmt="|", label="mean, 95 % interval")
    if any(arm.get("published") is not None for arm in arms):
        axes.errorbar([], [], xerr=[], fmt="D", ms=4, color=PAPER, capsize=2, label="published")
    figure.legend(frameon=False, fontsize=8, loc="outside upper right", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def sweep_figure(points: list[Entry], axis: str, path: epath.Path, level: Entry | None = None) -> None:
    """One line per arm over the values of the axis, or points if they are not numbers, with every run as a dot.

    Args:
      level: an arm that does not depend on the axis, drawn across.
    """
    values = list(dict.fromkeys(point["value"] for point in points))
    numeric = _numbers(values)
    place = numeric or dict(zip(values, range(len(values))))
    width, line_style = 7.5, "-" if numeric else "none"
    figure = _figure(width, 4.5)
    axes = figure.subplots()
    names = list(dict.fromkeys(point["name"] for point in points))
    for name in names:
        arm_points = [point for point in points if point["name"] == name]
        if numeric:
            arm_points.sort(key=lambda point: place[point["value"]])
        x = [place[point["value"]] for point in arm_points]
        half_widths = [0 if math.isnan(point["ci95"]) else point["ci95"] for point in arm_points]
        averages = [point["mean"] for point in arm_points]
        line = axes.errorbar(x, averages, half_widths, label=name, capsize=3, marker="o", ms=4, ls=line_style)
        for position, point in zip(x, arm_points):
            axes.plot([position] * len(point["runs"]), point["runs"], ".", ms=3, alpha=0.5, color=line[0].get_color())
    positive = [value for value in numeric.values() if value > 0]
    if positive and min(numeric.values()) >= 0 and max(positive) >= 20 * min(positive):
        axes.set_xscale("symlog", linthresh=min(positive))  # logarithmic, with room for 0
    axes.set_xticks(list(place.values()), values, fontsize=10 if numeric else 8, rotation=0 if numeric else 15)
    axes.minorticks_off()
    if level is not None:
        axes.axhline(level["mean"], color=PAPER, lw=1.2, ls="--", label=level["name"])
        if math.isfinite(level["ci95"]):
            low, high = level["mean"] - level["ci95"], level["mean"] + level["ci95"]
            axes.axhspan(low, high, color=PAPER, alpha=0.2, lw=0)
    axes.axhline(CHANCE, color="#888888", lw=0.8, ls=":", label="chance")
    axes.set_ylim(0, 1)
    axes.set_xlabel(axis)
    axes.set_ylabel("MNIST test accuracy")
    longest = 0.6 + 0.065 * max(map(len, [*names, level["name"] if level else ""]))  # inches, with its mark
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=min(4, max(1, int(width / longest))))
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


MATRIX = ("margin of", "student of", "margin over the neutral teacher's student, logits")


def matrix_figure(
    cells: Float[np.ndarray, "runs rows columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    path: epath.Path,
    labels: tuple[str, str, str] = MATRIX,
) -> None:
    """Differences in logits, means over runs with their 95 % intervals, coloured about 0.

    Args:
      labels: of columns, rows and colours; by default for students by their teacher, and measured traits.
    """
    wide = max(1.4, 0.11 * max(map(len, columns)))
    figure = _figure(wide * len(columns) + 2.4, 1.0 * len(rows) + 1.6)
    axes = figure.subplots()
    means = cells.mean(0)
    limit = float(np.max(np.abs(means), initial=1e-6, where=np.isfinite(means)))
    image = axes.imshow(means, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(means):
        half_width = t_interval(cells[:, row, column]).half_width
        text = f"{value:+.2f}\n± {half_width:.2f}" if np.isfinite(half_width) else f"{value:+.2f}"
        ink = "white" if abs(value) > 0.6 * limit else INK
        axes.text(column, row, text, ha="center", va="center", color=ink)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    figure.colorbar(image, ax=axes, label=labels[2])
    _save(figure, path)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # slow to import, and not needed by commands that draw nothing

    return Figure((width, height), layout="constrained")


def _save(figure: "Figure", path: epath.Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=160)
    storage.write(path, picture.getvalue())


def _numbers(values: list[str]) -> dict[str, float]:
    """Values as numbers; empty where one is none."""
    try:
        return {value: float(value) for value in values}
    except ValueError:
        return {}
