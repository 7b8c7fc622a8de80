"""Writes the docs' tables and figures of results from the measurements shipped in docs/results/: `make docs`.

    python -m bench.docs                              every marked table, and every figure that a page shows
    python -m bench.docs --keep=runs/mnist-quick      ships a finished run's measurements, as docs/results/mnist-quick

A page has tables between marks, and figures by their run's name:

    <!-- results: mnist-quick | Test accuracy over 4 runs -->
    …
    <!-- end -->
    ![…](figures/mnist-quick-arms.png)

Results from before measurements were shipped are between `<!-- not shipped: why -->` and `<!-- end -->`. `stray` lists
every other "value ± half-width" of a page that no shipped run has; a test checks that there are none.
"""

import datetime
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from sublim_jax import experiments, measurements, report
from sublim_jax.report import Section

HOME = Path(__file__).parents[1]
RESULTS, FIGURES = HOME / "docs" / "results", HOME / "docs" / "figures"
BLOCK = re.compile(r"<!-- results: (?P<name>[^|]+) \| (?P<title>.+?) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)
UNSHIPPED = re.compile(r"<!-- not shipped: .+? -->.*?<!-- end -->", re.DOTALL)
PAIR = re.compile(r"([+−-]?\d*\.\d+) ± (\d*\.\d+)")

_KEEP = flags.DEFINE_string("keep", "", "The workdir of a finished run to be shipped.")


class Run:
    """A shipped run and its report."""

    def __init__(self, folder: Path):
        config = ConfigDict(json.loads((folder / "config.json").read_text()))
        experiment = experiments.load(config.experiment)
        self.about = json.loads((folder / "about.json").read_text())
        self.spec = experiment.read(config)
        rows = measurements.read(epath.Path(folder))
        self.arms, self.sections = experiment.document(self.spec, rows, self.about["notes"])

    def section(self, title: str) -> Section:
        (matching,) = (section for section in self.sections if section.title == title)
        return matching

    @property
    def origin(self) -> str:
        versions = self.about["versions"]
        return f"{self.about['date']}, {self.about['devices']}, jax {versions['jax']}, commit {versions['commit']}"


def runs() -> dict[str, Run]:
    """All shipped runs, by name."""
    return {folder.name: Run(folder) for folder in sorted(RESULTS.iterdir()) if folder.is_dir()}


def pages() -> list[Path]:
    return [HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))]


def written(text: str, known: Mapping[str, Run]) -> str:
    """A page with the tables of the shipped runs between its marks."""

    def block(match: re.Match[str]) -> str:
        if match["name"] not in known:
            return match[0]
        run = known[match["name"]]
        table = "\n".join(report.table_lines(run.section(match["title"]).table))
        mark = f"<!-- results: {match['name']} | {match['title']} -->"
        return f"{mark}\n{table}\n\n*Measured {run.origin}; `docs/results/{match['name']}`.*\n<!-- end -->"

    return BLOCK.sub(block, text)


def shown_figures(text: str, known: Mapping[str, Run]) -> Iterator[tuple[str, str, str]]:
    """(file, run, figure) of every figure on a page that is from a shipped run, by the longest matching name."""
    for file in re.findall(r"figures/([^)/]+)\.png", text):
        for name in sorted(known, key=len, reverse=True):
            if file.startswith(f"{name}-"):
                yield file, name, file.removeprefix(f"{name}-")
                break


def stray(text: str, known: Mapping[str, Run]) -> list[str]:
    """Every "value ± half-width" of a page that is neither from a shipped run nor published."""
    pairs = {pair for run in known.values() for pair in pairs_of(run)}
    return [match[0] for match in PAIR.finditer(UNSHIPPED.sub("", text)) if _plain(*match.groups()) not in pairs]


def pairs_of(run: Run) -> set[tuple[str, str]]:
    """Every (mean, half-width) in a run's report, of its arms rounded to 2 or 3 digits, and of the paper."""
    text = " ".join([section.text for section in run.sections] + [c for s in run.sections for r in s.table for c in r])
    pairs = {_plain(*match.groups()) for match in PAIR.finditer(text)}
    values = [(arm["mean"], arm["ci95"]) for arm in run.arms] + [
        (arm["paper"], arm.get("paper_ci95")) for arm in run.arms
    ]
    for mean, half_width in values:
        if mean is not None and half_width is not None:
            pairs |= {_plain(f"{mean:.{digits}f}", f"{half_width:.{digits}f}") for digits in (2, 3)}
    return pairs


def _plain(mean: str, half_width: str) -> tuple[str, str]:
    sign = "-" if mean[0] in "−-" else ""
    return sign + mean.lstrip("+−-").removeprefix("0"), half_width.removeprefix("0")


def keep(workdir: Path) -> None:
    """Ships a run: its measurements, config and notes, without this machine's paths."""
    folder = RESULTS / workdir.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("measurements.parquet", "config.json"):
        shutil.copyfile(workdir / name, folder / name)
    about = json.loads((workdir / "about.json").read_text())
    about["models"] = [{**model, "path": Path(model["path"]).name} for model in about["models"]]
    seconds = (workdir / "measurements.parquet").stat().st_mtime
    about["date"] = datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def main(_: list[str]) -> None:
    if _KEEP.value:
        keep(Path(_KEEP.value))
    known = runs()
    for page in pages():
        text = page.read_text()
        page.write_text(written(text, known))
        for file, name, figure in shown_figures(text, known):
            for section in known[name].sections:
                if draw := section.figures.get(figure):
                    draw(epath.Path(FIGURES / f"{file}.png"))


if __name__ == "__main__":
    app.run(main)
