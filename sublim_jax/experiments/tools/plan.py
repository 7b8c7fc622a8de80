"""The paper's experiments, one after the other, and one report. `configs/paper.py` explains the values."""

import fnmatch
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sublim_jax import assets, digests, experiments, overrides, report, specs, storage, workdir
from sublim_jax.digests import Source
from sublim_jax.errors import UserError
from sublim_jax.experiments.transmission.checks import check_files
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.figures import Arm
from sublim_jax.measurements import Measurements, from_array
from sublim_jax.progress import say
from sublim_jax.report import Described
from sublim_jax.sharding import from_first, make_mesh
from sublim_jax.specs import Checked, ExperimentSpec, Place, check_one_of, check_some_of
from sublim_jax.store import write_json

FINISHED = "finished.json"  # in an experiment's folder: the stamp that it was finished with

Arms = list[Arm]
Results = dict[str, Arms | str]  # of each experiment: its arms, or why there are none


@dataclass(frozen=True)
class Row:
    """An experiment of the plan: of which part of the paper it is, by which config, and what stands beside it."""

    where: str
    what: str
    paper: str
    show: str
    config: str
    changes: dict[str, object]


@dataclass(frozen=True)
class JudgeChoice(Checked):
    """Of all experiments; empty: as their presets say."""

    where = "judge."
    kind: Annotated[str, partial(check_one_of, choices=("", "local", "endpoint"))]
    model: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "endpoint" and not self.model:
            raise UserError("judge.model is missing: the name that the endpoint knows its model by")


@dataclass(frozen=True, kw_only=True)
class PlanSpec(ExperimentSpec):
    files: dict[str, str]
    tensor: Place
    judge: JudgeChoice
    plan: dict[str, Row]
    experiments: tuple[str, ...]
    specs: dict[str, Any] = field(default_factory=dict, compare=False)  # of the experiments

    def __post_init__(self) -> None:
        super().__post_init__()
        check_some_of("experiments", self.experiments, self.plan)


def read(config: ConfigDict) -> PlanSpec:
    """The plan of a config, with the specs of its experiments.

    Raises UserError for the first value, of this config or of an experiment's, that makes no sense.
    """
    spec = specs.read(PlanSpec, config)
    found = {}
    for name in spec.experiments:
        try:
            changed = config_of(spec, name)
            found[name] = experiments.load(changed.experiment).read(changed)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return replace(spec, specs=found)


def config_of(spec: PlanSpec, name: str) -> ConfigDict:
    """An experiment's config, with the plan's changes and the user's files in it.

    Raises UserError for a config or a preset of the plan that does not exist.
    """
    try:
        config = overrides.load(spec.plan[name].config)
    except UserError as error:
        raise UserError(f"plan.{name}.config: {error}") from error
    config.update(spec.plan[name].changes)
    for part in (config.get("evals", {}), config.get("carrier", {}), config.get("teacher", {}).get("corpora", {})):
        for value, file in spec.files.items():
            if value in part and file:
                part[value] = file
    study = config.get("study", config)
    if "evals" in study:  # of language models
        study.mesh.tensor = spec.tensor or study.mesh.tensor
        study.evals.judge.update({key: value for key, value in vars(spec.judge).items() if value})
    return config


def run(spec: PlanSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Runs what has not been run, each in its folder; a report of all, also of what could not be."""
    for one in spec.specs.values():
        for part in getattr(one, "studies", (one,)):
            make_mesh(part.mesh.sizes)
    found: Results = dict.fromkeys(spec.experiments, "")
    for name, one in spec.specs.items():  # what is missing is told before hours of others
        try:
            if isinstance(one, Study):
                check_files(one)
        except UserError as error:
            found[name] = f"not run: {error}"
            say(f"{name}: {found[name]}")
    store = workdir.claim(folder, spec.values, update=update)
    for number, (name, one) in enumerate(spec.specs.items(), 1):
        if not found[name]:
            say(f"experiment {number} of {len(spec.specs)}: {name}, {spec.plan[name].what}")
            found[name] = _results(store.folder / name, one, update=update)
            if isinstance(found[name], str):
                say(f"{name}: {found[name]}")
    rows = []
    for arm in arms_of(found):
        runs = [value for value in arm.get("runs", ()) if value is not None]
        rows += from_array(runs, arm=arm["name"], measure=arm["metric"])
    report.finish(store.folder, spec, rows, document, notes={"found": found, "folder": str(store.folder)})
    if missing := [name for name, result in found.items() if isinstance(result, str)]:
        raise UserError(
            f"{len(missing)} of {len(spec.specs)} experiments have no results: {', '.join(missing)}; "
            f"{store.folder / 'report.md'} says why, and the same command goes on"
        )


def _results(inside: epath.Path, one: Described, *, update: bool) -> Arms | str:
    """An experiment's arms, by an earlier run or by this one; or why there are none."""
    try:
        if not from_first(partial(finished, inside, one)):
            experiments.load(one.experiment).run(one, inside, update=update)
            write_json(inside / FINISHED, stamp(one))
        return report.results_of(inside)["arms"]
    except UserError as error:
        return f"stopped: {error}"


def finished(folder: epath.Path, spec: Described) -> bool:
    """Whether a folder has the results of this spec and of the models as they are now.

    Damaged files count as none: what still holds is reused.
    """
    try:
        known, results = (json.loads((folder / name).read_text()) for name in (FINISHED, "results.json"))
        models = [Source(**model) for model in results.get("models", [])]
        same = all(digests.of_model(assets.model(model.name)) == model.digest for model in models)
    except (OSError, ValueError, AttributeError, TypeError, UserError):
        return False
    return known == stamp(spec) and "arms" in results and same


def stamp(spec: Described) -> str:
    """A hash of a spec's values, and of what is in the files that they name."""
    leaves = [os.path.expanduser(leaf) for leaf in jax.tree.leaves(spec.values) if isinstance(leaf, str)]
    files = [assets.digest(storage.local(name)) for name in sorted(set(filter(_is_file, leaves)))]
    return hashlib.sha256(json.dumps([spec.values, files], sort_keys=True).encode()).hexdigest()


def _is_file(name: str) -> bool:
    return assets.is_file(name) if storage.in_bucket(name) else os.path.isfile(name)


def arms_of(found: Results) -> Arms:
    """All experiments' arms, each under its experiment's name."""
    named = [(name, result) for name, result in found.items() if not isinstance(result, str)]
    return [{**arm, "name": f"{name}: {arm['name']}"} for name, result in named for arm in result]


def document(spec: PlanSpec, rows: Measurements, notes: report.Notes) -> report.Document:
    """The experiments' arms, a table of ours beside the paper's number, a figure of each experiment."""
    found: Results = notes["found"]
    table, figures = [["experiment", "of the paper", "its number", "ours"]], []
    for name, result in found.items():
        row = spec.plan[name]
        ours = result if isinstance(result, str) else ours_of(row, result)
        table.append([f"{name}: {row.what}", row.where, row.paper, ours])
        folder = epath.Path(notes["folder"]) / name / "figures"
        pictures = [] if isinstance(result, str) else sorted(folder.glob("*.png"), key=_order)
        if pictures:
            copy = partial(_copy, pictures[0])
            figures.append(report.Section(row.what, f"{row.where}.", [], {name: copy}))
    text = (
        f"Preset {spec.preset}. Ours are of its models and sizes, which are not the paper's: the paper's numbers stand "
        "beside them for their direction. ± is the 95 % interval over runs, where there are several. Each experiment's "
        "whole report is in its folder."
    )
    return arms_of(found), [report.Section("The paper's experiments", text, table, {}), *figures]


def ours_of(row: Row, arms: Arms) -> str:
    """What stands beside the paper's number: verdicts counted, or the arms that the plan names."""
    if "verdict" in arms[0]:
        counts = Counter(arm["verdict"] for arm in arms)
        return "; ".join(f"{count} of {len(arms)} rows {verdict}" for verdict, count in counts.most_common())
    shown = []
    for arm in arms:
        if any(fnmatch.fnmatchcase(arm["name"], pattern) for pattern in row.show.split("; ")):
            metric = "" if arm["metric"] in arm["name"] else f" ({arm['metric'].replace('_', ' ')})"
            shown.append(f"{arm['name']} {report.plus_minus(arm['mean'], arm['ci95']) or 'none'}{metric}")
    return "; ".join(shown)


def _order(picture: epath.Path) -> tuple[bool, bool, str]:
    """An experiment's arms first, or its first evaluation, or whatever else it has."""
    return picture.stem != "arms", picture.stem == "judge-roc", picture.stem


def _copy(picture: epath.Path, path: epath.Path) -> None:
    storage.write(path, picture.read_bytes())
