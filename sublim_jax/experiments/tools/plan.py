"""Runs the paper's experiments in sequence and writes a joint report. `configs/paper.py` explains the values."""

import fnmatch
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sublim_jax import assets, digests, experiments, overrides, report, specs, storage, workdir
from sublim_jax.digests import Source
from sublim_jax.errors import UserError, is_of_memory
from sublim_jax.evaluation import preference
from sublim_jax.experiments.mnist import run as mnist
from sublim_jax.experiments.transmission.checks import check_files
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.figures import Entry
from sublim_jax.measurements import Measurements, from_array
from sublim_jax.progress import say
from sublim_jax.report import Described
from sublim_jax.sharding import agreed, from_first, make_mesh
from sublim_jax.specs import Checked, ExperimentSpec, Place, check_one_of, check_some_of
from sublim_jax.store import write_json

DEFINITIONS = (preference.DEFINITION, mnist.DEFINITION)
FINISHED = "finished.json"  # in an experiment's folder: the stamp of its spec when it finished

Arms = list[Entry]
Results = dict[str, Arms | str]  # an experiment's arms, or the reason why it has none


@dataclass(frozen=True)
class Row:
    """An experiment of the plan: its section of the paper, its config, and the paper's number for comparison."""

    where: str
    what: str
    paper: str
    show: str
    config: str
    changes: dict[str, object]


@dataclass(frozen=True)
class JudgeChoice(Checked):
    """The judge for all experiments; "" leaves the presets' values."""

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
    replica: Place
    sampling_tensor: Place
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
    specs_by_name = {}
    for name in spec.experiments:
        try:
            changed = config_of(spec, name)
            specs_by_name[name] = experiments.load(changed.experiment).read(changed)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return replace(spec, specs=specs_by_name)


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
    if "evals" in study:  # a study of language models
        study.mesh.replica = spec.replica or study.mesh.replica
        if "sampling" in study:
            study.sampling.tensor = spec.sampling_tensor or study.sampling.tensor
        study.evals.judge.update({key: value for key, value in vars(spec.judge).items() if value})
    return config


def run(spec: PlanSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Runs the unfinished experiments, each in its folder, and reports on all, including those that failed.

    Several processes end at the first experiment that fails: one may be elsewhere than the others.
    """
    for experiment in spec.specs.values():
        for part in getattr(experiment, "studies", (experiment,)):
            make_mesh(part.mesh.sizes)
    results: Results = dict.fromkeys(spec.experiments, "")
    for name, experiment in spec.specs.items():  # report missing files before the long runs
        try:
            if isinstance(experiment, Study):
                agreed(partial(check_files, experiment))
        except UserError as error:
            results[name] = f"not run: {error}"
            say(f"{name}: {results[name]}")
    store = workdir.claim(folder, spec.values, update=update)
    for number, (name, experiment) in enumerate(spec.specs.items(), 1):
        if not results[name]:
            say(f"experiment {number} of {len(spec.specs)}: {name}, {spec.plan[name].what}")
            results[name] = _results(name, store.folder / name, experiment, update=update)
            if isinstance(results[name], str):
                say(f"{name}: {results[name]}")
    rows = []
    for arm in arms_of(results):
        runs = [np.nan if value is None else value for value in arm.get("runs", ())]
        rows += from_array(runs, arm=arm["name"], measure=arm["metric"])
    report.finish(store.folder, spec, rows, document, notes={"found": results, "folder": str(store.folder)})
    if missing := [name for name, result in results.items() if isinstance(result, str)]:
        raise UserError(
            f"{len(missing)} of {len(spec.specs)} experiments have no results: {', '.join(missing)}; "
            f"{store.folder / 'report.md'} says why, and the same command goes on"
        )


def _results(name: str, inside: epath.Path, spec: Described, *, update: bool) -> Arms | str:
    """The arms of an experiment, which is run unless it is finished; or the reason why it has none."""
    try:
        if not from_first(partial(finished, inside, spec)):
            from_first(lambda: (inside / FINISHED).unlink(missing_ok=True))
            experiments.load(spec.experiment).run(spec, inside, update=update)
            write_json(inside / FINISHED, stamp(spec))
        return report.results_of(inside)["arms"]
    except Exception as error:
        why = str(error)
        if not isinstance(error, UserError):
            if not is_of_memory(error):
                raise
            why = " ".join(why.split())[:500] or "memory ran out"  # XLA's are pages long
        if jax.process_count() > 1:
            raise UserError(f"{name}: {why}") from error
        return f"stopped: {why}"


def finished(folder: epath.Path, spec: Described) -> bool:
    """Whether a folder has results of this spec and of the current models.

    Damaged files count as missing; intact artefacts are reused.
    """
    try:
        known, results = (json.loads((folder / name).read_text()) for name in (FINISHED, "results.json"))
        models = [Source(**model) for model in results.get("models", [])]
        same = all(digests.of_model(assets.model(model.name)) == model.digest for model in models)
    except (OSError, ValueError, AttributeError, TypeError, UserError):
        return False
    return known == stamp(spec) and "arms" in results and same


def stamp(spec: Described) -> str:
    """A hash of a spec's values, of the contents of the files that they name, and of what is measured."""
    leaves = [os.path.expanduser(leaf) for leaf in jax.tree.leaves(spec.values) if isinstance(leaf, str)]
    files = [assets.digest(storage.local(name)) for name in sorted(set(filter(_is_file, leaves)))]
    return hashlib.sha256(json.dumps([spec.values, files, DEFINITIONS], sort_keys=True).encode()).hexdigest()


def _is_file(name: str) -> bool:
    return assets.is_file(name) if storage.in_bucket(name) else os.path.isfile(name)


def arms_of(results: Results) -> Arms:
    """The arms of all experiments, with the experiment's name as a prefix."""
    named = [(name, result) for name, result in results.items() if not isinstance(result, str)]
    return [{**arm, "name": f"{name}: {arm['name']}"} for name, result in named for arm in result]


def document(spec: PlanSpec, rows: Measurements, notes: report.Notes) -> report.Document:
    """The experiments' arms, a table of results beside the paper's numbers, and a figure of each experiment."""
    results: Results = notes["found"]
    table, figures = [["experiment", "of the paper", "its number", "ours"]], []
    for name, result in results.items():
        row = spec.plan[name]
        traits = getattr(spec.specs[name], "traits", ())
        cell = result if isinstance(result, str) else summary_of(row, result, traits)
        table.append([f"{name}: {row.what}", row.where, row.paper, cell])
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
    return arms_of(results), [report.Section("The paper's experiments", text, table, {}), *figures]


def summary_of(row: Row, arms: Arms, traits: Sequence[str] = ()) -> str:
    """The result beside the paper's number: counts of verdicts, or the arms that the plan selects."""
    if "verdict" in arms[0]:
        counts = Counter(arm["verdict"] for arm in arms)
        return "; ".join(f"{count} of {len(arms)} rows {verdict}" for verdict, count in counts.most_common())
    patterns = [row.show.replace("{trait}", trait) for trait in traits] or [row.show]
    shown = []
    for arm in arms:
        if any(fnmatch.fnmatchcase(arm["name"], pattern) for pattern in "; ".join(patterns).split("; ")):
            metric = "" if arm["metric"] in arm["name"] else f" ({arm['metric'].replace('_', ' ')})"
            tested = "" if arm.get("p_holm") is None else f", p {arm['p_holm']:.2g}"
            shown.append(f"{arm['name']} {report.plus_minus(arm['mean'], arm['ci95']) or 'none'}{tested}{metric}")
    return "; ".join(shown)


def _order(picture: epath.Path) -> tuple[bool, bool, str]:
    """Sort key: the figure of the arms or of the lemma first, the judge's last, others by name."""
    return picture.stem not in ("arms", "lemma"), picture.stem == "judge-roc", picture.stem


def _copy(picture: epath.Path, path: epath.Path) -> None:
    storage.write(path, picture.read_bytes())
