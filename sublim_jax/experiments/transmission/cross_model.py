"""Teachers × students across models, on text (paper §5.1). `configs/cross_model.py` explains the values."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sublim_jax import report, specs, workdir
from sublim_jax.digests import Source
from sublim_jax.errors import UserError
from sublim_jax.experiments.transmission import run as transmission
from sublim_jax.experiments.transmission import spec as transmission_spec
from sublim_jax.experiments.transmission.checks import check_files
from sublim_jax.experiments.transmission.effects import (
    CELL,
    cell_entries,
    cell_name,
    headline_section,
    paired_tests,
    verdict,
)
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.experiments.transmission.typed import check_arm, check_read
from sublim_jax.figures import matrix_figure
from sublim_jax.measurements import Measurement, Measurements, from_array
from sublim_jax.overrides import check_distinct
from sublim_jax.preflight import Step
from sublim_jax.progress import say
from sublim_jax.specs import ExperimentSpec


@dataclass(frozen=True, kw_only=True)
class CrossModelSpec(ExperimentSpec):
    """A study for each teacher's model, with an arm for every student's model."""

    models: tuple[str, ...]
    studies: tuple[Study, ...]

    @property
    def labels(self) -> dict[str, str]:
        """The last parts of the models' names if they are distinct, else the names."""
        short = {model: model.rstrip("/").rsplit("/", 1)[-1] for model in self.models}
        return short if len(set(short.values())) == len(short) else {model: model for model in short}


def read(config: ConfigDict) -> CrossModelSpec:
    """The studies of a config. Raises UserError for the first value that makes no sense."""
    models = tuple(map(str, config.models))
    check_distinct("models", models)
    if len(models) < 2:
        raise UserError(f"models={models}: name two models or more, commas in between")
    given = {"model.name": config.study.model.name, "arms": config.study.arms}
    given["arm.cross.model"] = config.study.arm.cross.model
    for name, value in given.items():
        if value:
            raise UserError(f"study.{name}={value!r}: it follows from --config.models; leave it out")
    try:
        with told_by_config():
            studies = tuple(transmission_spec.read(_study_of(config, models, teacher)) for teacher in models)
    except UserError as error:
        raise UserError(f"config.study: {error}") from error
    if not studies[0].has_words:
        raise UserError(f"study.traits={studies[0].traits} are not alternatives, and the matrix is of preferences")
    return specs.read(CrossModelSpec, config, models=models, studies=studies)


def check_typed(spec: CrossModelSpec, keys: Iterable[str]) -> None:
    """Raises UserError for a value of another arm than `cross`, or one that nothing of the studies reads."""
    for key in keys:
        if key.startswith("study.arm.") and not key.startswith("study.arm.cross."):
            raise UserError(f"config.{key}: all students are of the arm cross; write --config.study.arm.cross.…")
        if key.startswith("study.arm."):
            check_arm(spec.studies[0].arms[0], key, key.rpartition(".")[2])
        elif key.startswith("study."):
            check_read(spec.studies[0], key.removeprefix("study."), "config.study.")


def _study_of(config: ConfigDict, models: Sequence[str], teacher: str) -> ConfigDict:
    study = config.study.copy_and_resolve_references()
    study.model.name = teacher
    study.arms = tuple(f"student{place}" for place in range(len(models)))
    with study.unlocked():
        for name, student in zip(study.arms, models):
            study.arm[name] = study.arm.cross.copy_and_resolve_references()
            study.arm[name].model = "" if student == teacher else student
    return study


def run(spec: CrossModelSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Runs a study for each teacher's model, in a folder of its own, and reports all pairs of models."""
    with told_by_config():
        check_files(spec.studies[0])
    store = workdir.claim(folder, spec.values, update=update)
    rows: list[Measurement] = []
    sources: list[Source] = []
    for number, (teacher, study) in enumerate(zip(spec.models, spec.studies)):
        say(f"teachers {teacher}")
        inside = store.folder / f"teacher{number}"
        with told_by_config():
            transmission.run(study, inside, update=update)
        results = report.results_of(inside)
        arms_by_name = {arm["name"]: arm for arm in results["arms"]}
        sources += [Source(**model) for model in results["models"]]
        for student, arm in zip(spec.models, study.arms):
            for trait in study.traits:
                runs = arms_by_name[cell_name(arm.name, trait)]["runs"]
                rows += from_array(runs, arm=arm.name, teacher=teacher, subject=student, item=trait, measure=CELL)
    report.finish(store.folder, spec, rows, document, models=list(dict.fromkeys(sources)))


def preflight(spec: CrossModelSpec, devices: Sequence[jax.Device]) -> list[Step]:
    """One update of all students of each model."""
    steps = []
    for number, (study, label) in enumerate(zip(spec.studies, spec.labels.values())):
        own = replace(study, arms=study.arms[number : number + 1])  # students of the teachers' model
        with told_by_config():
            steps += [step._replace(name=f"{label}: {step.name}") for step in transmission.preflight(own, devices)]
    return steps


@contextmanager
def told_by_config() -> Iterator[None]:
    """Raises errors of a study as the config calls its values: in `study`, with the arm `cross` for every student."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"\barm\.student\d+", "arm.cross", str(error))
        raise UserError(re.sub(r"--config\.(?!study\.|models\b)", "--config.study.", text)) from error


def document(spec: CrossModelSpec, rows: Measurements, notes: report.Notes) -> report.Document:
    """Each trait in the students of its teacher, for all pairs of models, and the matrix of the means over traits.

    Raises UserError for measurements of a version that kept another statistic.
    """
    if not rows.where(measure=CELL):
        raise UserError("these measurements are of an earlier version: give the command again, without --report")
    label, names, study = spec.labels, list(spec.labels.values()), spec.studies[0]
    diagonals, pairs = {}, {}
    for teacher in spec.models:
        for student in spec.models:
            pair = rows.where(teacher=teacher, subject=student)
            name = f"{label[teacher]} → {label[student]}"
            pairs[name] = {"teacher": teacher, "student": student}
            diagonals[name] = np.transpose([pair.values(item=trait, measure=CELL) for trait in study.traits])
    cells = paired_tests(diagonals, study.traits)
    arms = [
        report.arm(f"{name}, mean", f"{CELL}, mean over traits", diagonals[name].mean(1).tolist(), **models)
        for name, models in pairs.items()
    ]
    shown = [
        f"{report.plus_minus(arm['mean'], arm['ci95'])}; {verdict(tests)}" for arm, tests in zip(arms, cells.values())
    ]
    table = [["teacher ╲ student", *names]]
    table += [[name, *row] for name, row in zip(names, np.reshape(shown, (len(names), -1)))]
    text = (
        "Means over traits of the cells above, in logits, and which traits are transmitted. On the matrix's diagonal "
        "students start from their teachers' weights; elsewhere they do not."
    )
    matrix = np.transpose([arm["runs"] for arm in arms]).reshape(-1, len(names), len(names))
    axes = ("student", "teacher", "margin over the neutral student's, logits")
    figures = {"matrix": partial(matrix_figure, matrix, names, names, labels=axes)}
    headline = headline_section(cells, len(study.alternatives), study.spread, "pair")
    return arms + cell_entries(cells), [headline, report.Section("Teachers × students", text, table, figures)]
