"""The paper's experiments, one after the other, and one report. `configs/paper.py` explains the values."""

import fnmatch
import importlib
import json
import shutil
from collections import Counter
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from sublim_jax import report
from sublim_jax.errors import UserError
from sublim_jax.progress import say
from sublim_jax.workdir import Workdir, plain


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Runs what has not been run, each in its folder; a report of all, also of what could not be."""
    names = list(config.experiments)
    if unknown := sorted(set(names) - set(config.plan)):
        raise UserError(f"experiments: {unknown[0]!r} is none of {', '.join(config.plan)}")
    configs = {name: config_of(config, name) for name in names}
    workdir.open(config, update=update)
    found: dict[str, list[dict[str, Any]] | str] = {}
    for number, (name, one) in enumerate(configs.items(), 1):
        say(f"experiment {number} of {len(names)}: {name}, {config.plan[name].what}")
        inside = Workdir(workdir.path / name)
        try:
            if not finished(inside, one):
                importlib.import_module(f"sublim_jax.experiments.{one.experiment}").run(one, inside, update=update)
            found[name] = json.loads((inside.path / "results.json").read_text())["arms"]
        except UserError as error:
            found[name] = str(error)
            say(f"not run: {error}")
    arms = [
        {**arm, "name": f"{name}: {arm['name']}"}
        for name, result in found.items()
        if not isinstance(result, str)
        for arm in result
    ]
    report.write(workdir, config, arms, [table_section(config, found), *figure_sections(workdir, config, found)])


def config_of(config: ConfigDict, name: str) -> ConfigDict:
    """The experiment's own config, with the plan's changes and the user's files in it."""
    row = config.plan[name]
    module = importlib.import_module(f"configs.{row.file}")
    one = module.get_config(row.preset)
    one.update(row.changes)
    for part in (one.get("ask", {}), one.get("teacher", {}).get("corpora", {})):
        for name, file in config.files.items():
            if name in part and file:
                part[name] = file
    return one


def finished(workdir: Workdir, config: ConfigDict) -> bool:
    known = workdir.path / "results.json"
    return known.exists() and json.loads(known.read_text())["config"] == plain(config)


def table_section(config: ConfigDict, found: dict[str, Any]) -> report.Section:
    table = [["experiment", "of the paper", "its number", "ours"]]
    for name, result in found.items():
        row = config.plan[name]
        ours = f"not run: {result}" if isinstance(result, str) else ours_of(row, result)
        table.append([f"{name}: {row.what}", row.where, row.paper, ours])
    text = (
        f"Preset {config.preset}. Ours are of its models and sizes, which are not the paper's: the paper's "
        "numbers stand beside them for their direction. ± is the 95 % interval over runs, where there are several. "
        "Each experiment's whole report is in its folder."
    )
    return report.Section("The paper's experiments", text, table, {})


def ours_of(row: ConfigDict, arms: list[dict[str, Any]]) -> str:
    """What stands beside the paper's number: verdicts counted, or the arms that the plan names."""
    if "verdict" in arms[0]:
        counts = Counter(arm["verdict"] for arm in arms)
        return "; ".join(f"{count} of {len(arms)} rows {verdict}" for verdict, count in counts.most_common())
    patterns = row.show.split("; ")
    return "; ".join(told(arm) for arm in arms if any(fnmatch.fnmatchcase(arm["name"], one) for one in patterns))


def told(arm: dict[str, Any]) -> str:
    metric = "" if arm["metric"] in arm["name"] else f" ({arm['metric'].replace('_', ' ')})"
    return f"{arm['name']} {report.plus_minus(arm['mean'], arm['ci95']) or 'none'}{metric}"


def figure_sections(workdir: Workdir, config: ConfigDict, found: dict[str, Any]) -> list[report.Section]:
    """Each experiment's first figure."""
    sections = []
    for name, result in found.items():
        folder = workdir.path / name / "figures"
        pictures = [] if isinstance(result, str) or jax.process_index() else sorted(folder.glob("*.png"))
        if pictures:
            figures = {name: partial(shutil.copyfile, pictures[0])}
            sections.append(report.Section(config.plan[name].what, f"{config.plan[name].where}.", [], figures))
    return sections
