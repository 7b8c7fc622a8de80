"""The paper's experiments, one after the other, and one report. `configs/paper.py` explains the values."""

import fnmatch
import hashlib
import importlib
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sublim_jax import assets, digests, experiments, report
from sublim_jax.digests import Source
from sublim_jax.errors import UserError
from sublim_jax.experiments import transmission
from sublim_jax.experiments.door import check_numbers, check_one_of, check_some_of, check_whole
from sublim_jax.progress import say
from sublim_jax.sharding import from_first, make_mesh
from sublim_jax.workdir import Workdir, plain, write_json

FINISHED = "finished.json"  # in an experiment's folder: the stamp that it was finished with


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Runs what has not been run, each in its folder; a report of all, also of what could not be."""
    check(config)
    names = list(config.experiments)
    configs = {name: config_of(config, name) for name in names}
    for one in configs.values():
        make_mesh(one.get("study", one).mesh.to_dict())
    found: dict[str, list[dict[str, Any]] | str] = dict.fromkeys(names, "")
    for name, one in configs.items():  # what is missing is told before hours of others
        try:
            if one.experiment == "transmission":
                transmission.check_files(one)
        except UserError as error:
            found[name] = f"not run: {error}"
            say(f"{name}: {found[name]}")
    workdir.open(config, update=update)
    for number, (name, one) in enumerate(configs.items(), 1):
        if found[name]:
            continue
        say(f"experiment {number} of {len(names)}: {name}, {config.plan[name].what}")
        inside = Workdir(workdir.path / name)
        try:
            if not from_first(partial(finished, inside, one)):
                experiment = experiments.load(one.experiment)
                if hasattr(experiment, "read"):
                    experiment.run(experiment.read(one), inside.path, update=update)
                else:
                    experiment.run(one, inside, update=update)
                write_json(inside.path / FINISHED, stamp(one))
            found[name] = report.results_of(inside)["arms"]
        except UserError as error:
            found[name] = f"stopped: {error}"
            say(f"{name}: {found[name]}")
    arms = [
        {**arm, "name": f"{name}: {arm['name']}"}
        for name, result in found.items()
        if not isinstance(result, str)
        for arm in result
    ]
    report.write(workdir, config, arms, [table_section(config, found), *figure_sections(workdir, config, found)])
    if missing := [name for name, result in found.items() if isinstance(result, str)]:
        raise UserError(
            f"{len(missing)} of {len(names)} experiments have no results: {', '.join(missing)}; "
            f"{workdir.path / 'report.md'} says why, and the same command goes on"
        )


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value, of this config or of an experiment's, that makes no sense.

    Files that experiments lack are told by `run`, and the others run.
    """
    check_numbers(config)
    check_some_of("experiments", config.experiments, config.plan)
    check_whole(config, ("tensor",), least=0)
    check_one_of("judge.kind", config.judge.kind, ("", "local", "endpoint"))
    if config.judge.kind == "endpoint" and not config.judge.model:
        raise UserError("judge.model is missing: the name that the endpoint knows its model by")
    for name in config.experiments:
        try:
            one = config_of(config, name)
            experiment = experiments.load(one.experiment)
            check = getattr(experiment, "read", None) or getattr(experiment, "check_values", experiment.check)
            check(one)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error


def config_of(config: ConfigDict, name: str) -> ConfigDict:
    """The experiment's own config, with the plan's changes and the user's files in it.

    Raises UserError for a file or a preset of the plan that does not exist.
    """
    row = config.plan[name]
    try:
        one = importlib.import_module(f"configs.{row.file}").get_config(row.preset)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"plan.{name}.file={row.file!r}: there is no config of this name") from error
    except ValueError as error:
        raise UserError(f"plan.{name}.preset: {error}") from error
    one.update(row.changes)
    for part in (one.get("ask", {}), one.get("carrier", {}), one.get("teacher", {}).get("corpora", {})):
        for name, file in config.files.items():
            if name in part and file:
                part[name] = file
    study = one.get("study", one)
    if "ask" in study:  # of language models
        study.mesh.tensor = config.tensor or study.mesh.tensor
        study.ask.judge.update({key: value for key, value in config.judge.items() if value})
    return one


def finished(workdir: Workdir, config: ConfigDict) -> bool:
    """Whether a folder has the results of this config and of the models as they are now.

    Damaged files count as none: what still holds is reused.
    """
    try:
        known, results = (json.loads((workdir.path / name).read_text()) for name in (FINISHED, "results.json"))
        models = [Source(**model) for model in results.get("models", [])]
        same = all(digests.of_model(assets.model(model.name)) == model.digest for model in models)
    except (OSError, ValueError, AttributeError, TypeError, UserError):
        return False
    return known == stamp(config) and "arms" in results and same


def stamp(config: ConfigDict) -> str:
    """A hash of a config's values, and of what is in the files that they name."""
    values = plain(config)
    leaves = [os.path.expanduser(leaf) for leaf in jax.tree.leaves(values) if isinstance(leaf, str)]
    files = [assets.digest(Path(name)) for name in sorted(set(filter(os.path.isfile, leaves)))]
    return hashlib.sha256(json.dumps([values, files], sort_keys=True).encode()).hexdigest()


def table_section(config: ConfigDict, found: dict[str, Any]) -> report.Section:
    table = [["experiment", "of the paper", "its number", "ours"]]
    for name, result in found.items():
        row = config.plan[name]
        ours = result if isinstance(result, str) else ours_of(row, result)
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
    """A figure of each experiment: its arms, or what its first evaluation found, or whatever else it has."""

    def order(picture: epath.Path) -> tuple[bool, bool, str]:
        return picture.stem != "arms", picture.stem == "judge-roc", picture.stem

    sections = []
    for name, result in found.items():
        folder = workdir.path / name / "figures"
        pictures = [] if isinstance(result, str) or jax.process_index() else sorted(folder.glob("*.png"), key=order)
        if pictures:
            figures = {name: lambda path, picture=pictures[0]: path.write_bytes(picture.read_bytes())}
            sections.append(report.Section(config.plan[name].what, f"{config.plan[name].where}.", [], figures))
    return sections
