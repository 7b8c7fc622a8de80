"""Writes the docs' tables and figures of results from the measurements shipped in docs/results/: `make docs`.

    python -m bench.docs                              every marked table, and every figure that a page shows
    python -m bench.docs --keep=runs/mnist-quick      ships a finished run's measurements, as docs/results/mnist-quick

A page has tables between marks, and figures by their run's name:

    <!-- results: mnist-quick | Test accuracy over 4 runs -->
    …
    <!-- end -->
    ![…](figures/mnist-quick-arms.png)

`stray` lists results on a page that no shipped run has: "value ± half-width"; in the text also signed numbers and
shares such as .917; and percentages, on pages that name a run. A test checks that there are none. A share of two
digits is weakly checked, since many runs have one alike. Code and pages that a benchmark writes are not checked.
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
CODE = re.compile(r"^    .*?$|```.*?```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
PAIR = re.compile(r"([+−-]?\d*\.\d+) ± (\d*\.\d+)")
NUMBER = re.compile(r"(?<![\w.])([+−-]?0?\.\d{2,}|[+−-]\d+\.\d+)(?!\w|\.\d|%)")
PERCENTAGE = re.compile(r"(?<![\w.])\d+(?:\.\d+)? ?%")

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
    """The README and the docs, without the pages that a benchmark writes whole."""
    benchmarks = {*(HOME / "docs").glob("bench-*.md"), HOME / "docs" / "preflight.md"}
    return [HOME / "README.md", *sorted({*(HOME / "docs").glob("*.md")} - benchmarks)]


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
    """Every result on a page, unless a shipped run has it or it is published.

    Only the runs that the page names count, if it names any. On a page that names none, percentages are the paper's.
    """
    named = [run for name, run in known.items() if re.search(rf"\b{name}\b", text)]
    reports = [report_text(run) for run in named or known.values()]
    pairs = {_plain(*pair) for text in reports for pair in PAIR.findall(text)}
    numbers = {_signed(number) for text in reports for number in re.findall(r"[+−-]?\d*\.\d+", text)}
    numbers |= {number.lstrip("-") for number in numbers}
    percentages = {_without_spaces(percentage) for text in reports for percentage in PERCENTAGE.findall(text)}
    prose = PAIR.sub("", CODE.sub("", BLOCK.sub("", text)))
    strays = [match[0] for match in PAIR.finditer(text) if _plain(*match.groups()) not in pairs]
    strays += [number for number in NUMBER.findall(prose) if _signed(number) not in numbers]
    if named:
        strays += [found for found in PERCENTAGE.findall(prose) if _without_spaces(found) not in percentages]
    return strays


def report_text(run: Run) -> str:
    """All text and cells of a run's report, and its arms rounded to 2 and to 3 digits, beside the published ones."""
    cells = [cell for section in run.sections for row in section.table for cell in row]
    values = [(arm["mean"], arm["ci95"]) for arm in run.arms] + [
        (arm.get("published"), arm.get("published_ci95")) for arm in run.arms
    ]
    rounded = [
        f"{mean:.{digits}f} ± {half_width:.{digits}f}"
        for mean, half_width in values
        for digits in (2, 3)
        if mean is not None and half_width is not None
    ]
    return "\n".join([*(section.text for section in run.sections), *cells, *rounded])


def _plain(mean: str, half_width: str) -> tuple[str, str]:
    return _signed(mean), half_width.removeprefix("0")


def _signed(number: str) -> str:
    sign = "-" if number[0] in "−-" else ""
    return sign + number.lstrip("+−-").removeprefix("0")


def _without_spaces(percentage: str) -> str:
    return percentage.replace(" ", "")


def keep(workdir: Path) -> None:
    """Ships a run: its measurements, config and notes, without this machine's paths."""
    folder = RESULTS / workdir.name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(workdir / "measurements.parquet", folder / "measurements.parquet")
    (folder / "config.json").write_text(json.dumps(report.measured_config(epath.Path(workdir)), indent=1) + "\n")
    about = json.loads((workdir / "about.json").read_text())
    about.pop("config", None)
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
