"""The report of a run: results.json, report.md, figures."""

import importlib.metadata
import json
import math
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
from etils import epath
from rich.console import Console
from rich.table import Table

from sublim_jax import __version__, measurements, storage, workdir
from sublim_jax.digests import Source
from sublim_jax.errors import UserError
from sublim_jax.evaluation.statistics import t_interval
from sublim_jax.figures import Entry
from sublim_jax.measurements import Measurement, Measurements
from sublim_jax.progress import say
from sublim_jax.sharding import from_first
from sublim_jax.store import write_json

FIGURE = re.compile(r"\]\(figures/(.+)\.png\)")
ABOUT = "about.json"  # beside the measurements: versions, devices, models, notes
SCREEN_COLUMNS = 8  # a wider table is for the report alone


class Section(NamedTuple):
    """A part of a report: text, a table (its header first), and figures by name, each drawn to a path.

    A long table is for the report alone: `on_screen` is False.
    """

    title: str
    text: str
    table: Sequence[Sequence[str]]
    figures: Mapping[str, Callable[[epath.Path], None]]
    on_screen: bool = True


Notes = dict[str, Any]  # what a report states beside measurements: JSON values
Document = tuple[list[Entry], list[Section]]  # what results.json lists, and the parts of report.md


@runtime_checkable
class Described(Protocol):
    """What every experiment's spec has."""

    @property
    def experiment(self) -> str: ...

    @property
    def preset(self) -> str: ...

    @property
    def values(self) -> Mapping[str, object]: ...


Kind = TypeVar("Kind", bound=Described)


def finish(
    folder: epath.Path,
    spec: Kind,
    rows: Sequence[Measurement],
    document: Callable[[Kind, Measurements, Notes], Document],
    *,
    models: Sequence[Source] = (),
    notes: Notes | None = None,
) -> None:
    """Saves the measurements and writes their report, from the first process.

    Args:
      document: a function of the spec, the measurements and the notes to the contents of the report.
      models: the language models that were read.
    """
    if jax.process_index():
        return
    about = {
        "versions": versions(),
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}, {jax.process_count()} process(es)",
        "models": [model._asdict() for model in models],
        "notes": notes or {},
        "config": spec.values,
    }
    if not measurements.write(folder, spec.experiment, rows) and (folder / ABOUT).exists():
        # Whoever asks for the report of a finished run again has measured nothing.
        before = json.loads((folder / ABOUT).read_text())
        about |= {name: before[name] for name in ("versions", "devices")}
    write_json(folder / ABOUT, about)
    rewrite(folder, spec, document)


def rewrite(folder: epath.Path, spec: Kind, document: Callable[[Kind, Measurements, Notes], Document]) -> None:
    """Writes results.json, report.md and the figures from what `finish` saved, without computing anything.

    Raises UserError if the folder holds no finished run.
    """
    try:
        rows, about = measurements.read(folder), json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no measurements of a run; give the command that makes them") from error
    arms, sections = document(spec, rows, about["notes"])
    facts = {name: about[name] for name in ("versions", "models", "devices")}
    results = {"experiment": spec.experiment, "preset": spec.preset, "config": spec.values, **facts}
    _publish(folder, {**results, "arms": _finite(arms)}, sections)


def measured_config(folder: epath.Path) -> dict[str, Any]:
    """The config of a folder's measurements: another than the folder's own where a run with --update was interrupted.

    Raises UserError if the folder holds no run.
    """
    config = workdir.config_of(folder)
    try:
        return dict(json.loads((folder / ABOUT).read_text())["config"])
    except (OSError, ValueError, TypeError, KeyError):  # nothing is measured, or it was by an earlier version
        return config


def results_of(folder: epath.Path) -> dict[str, Any]:
    """The results.json of a report that has been written, for all processes."""
    return dict(from_first(lambda: json.loads((folder / "results.json").read_text())))


def _publish(path: epath.Path, results: dict[str, Any], sections: Sequence[Section]) -> None:
    """results.json, report.md, figures, and tables on screen."""
    folder = path / "figures"
    program = f"sublim_jax {results['versions']['sublim_jax']}, commit {results['versions']['commit']}"
    text = [f"# {results['experiment']}, preset {results['preset']}", "", f"{results['devices']}. {program}."]
    text += [f"Model {m['name']}: {m['path']}, SHA-256 {m['digest'][:16]}…" for m in results["models"]]
    for section in sections:
        text += ["", f"## {section.title}", "", section.text, ""]
        text += table_lines(section.table)
        for name, draw in section.figures.items():
            draw(folder / f"{name}.png")
            text += ["", f"![{name}](figures/{name}.png)"]
    before = (path / "report.md").read_text() if (path / "report.md").exists() else ""
    storage.write(path / "report.md", "\n".join(text) + "\n")
    drawn = {name for section in sections for name in section.figures}
    for name in set(FIGURE.findall(before)) - drawn:  # of another config, with --update
        (folder / f"{name}.png").unlink(missing_ok=True)
    write_json(path / "results.json", results)
    # Brackets in a table are a user's text, not markup.
    console = _Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    for section in sections:
        if section.on_screen and section.table and len(section.table[0]) <= SCREEN_COLUMNS:
            table = Table(*section.table[0], title=section.title)
            for row in section.table[1:]:
                table.add_row(*row)
            console.print(table)
    say(f"report: {path / 'report.md'}")
    for name in (name for section in sections for name in section.figures):
        say(f"figure: {folder / name}.png")
    say(f"numbers: {path / 'results.json'}")


class _Console(Console):
    """Rich's console, except that it does not end the program where nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that is being handled


def arm(name: str, metric: str, runs: Sequence[float], **more: object) -> Entry:
    """One entry of results.json: every run's value, their mean and t-interval, and additional fields."""
    mean, half_width = t_interval(runs)
    return {"name": name, "metric": metric, "mean": mean, "ci95": half_width, "runs": list(runs), **more}


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on, and of this program, with its commit."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    program = {"sublim_jax": __version__, "commit": commit(), "python": platform.python_version()}
    return program | {name: importlib.metadata.version(name) for name in names}


@cache
def commit() -> str:
    """The commit of the checkout at the first call, with "-dirty" if files differ from it; "unknown" outside one."""
    home = Path(__file__).parents[1]
    if not (home / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _finite(value: object) -> object:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plus_minus(mean: float | None, half_width: float | None) -> str:
    """Such as "0.528 ± 0.022"; without an interval if there is none; "undefined" where a run has no number."""
    if mean is None:
        return ""
    if math.isnan(mean):
        return "undefined"
    return f"{mean:.3f}" if half_width is None or math.isnan(half_width) else f"{mean:.3f} ± {half_width:.3f}"


def table_lines(table: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, its header first."""
    head, rules, rows = table[:1], [["---"] * len(row) for row in table[:1]], table[1:]
    return [_line(row) for row in (*head, *rules, *rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
