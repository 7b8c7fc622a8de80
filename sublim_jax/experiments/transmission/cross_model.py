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
from sublim_jax.experiments.transmission.effects import EFFECT
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.experiments.transmission.typed import check_arm, check_read
from sublim_jax.figures import arms_figure, matrix_figure
from sublim_jax.measurements import Measurement, Measurements, from_array
from sublim_jax.overrides import check_distinct
from sublim_jax.preflight import Step
from sublim_jax.progress import say
from sublim_jax.specs import ExperimentSpec

P = "permutation_p"


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
        raise UserError(f"study.traits={studies[0].traits} are no alternatives, and the matrix is of preferences")
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
    """Runs a study for each teacher's model, in a folder of its own, and reports the effects as a matrix."""
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
            about = {"arm": arm.name, "teacher": teacher, "item": student}
            rows += from_array(arms_by_name[arm.name]["runs"], measure=EFFECT, **about)
            rows += from_array([arms_by_name[arm.name]["permutation_p"]], measure=P, **about)
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
    """Effects of all pairs of models, and their matrix."""
    label, names = spec.labels, list(spec.labels.values())
    arms, table = [], [["teacher ╲ student", *names]]
    for teacher in spec.models:
        for student in spec.models:
            pair = rows.where(teacher=teacher, item=student)
            more = {P: pair.values(measure=P)[0], "teacher": teacher, "student": student}
            arms.append(report.arm(f"{label[teacher]} → {label[student]}", EFFECT, pair.values(measure=EFFECT), **more))
        teacher_arms = arms[-len(names) :]
        table.append([label[teacher], *(report.plus_minus(arm["mean"], arm["ci95"]) for arm in teacher_arms)])
    cells = np.asarray([arm["mean"] for arm in arms]).reshape(len(names), len(names))
    text = (
        "Each cell is the diagonal effect, in logits: the margin of a trait in the students of its teacher, minus its "
        f"margin in the other teachers' students; ± is the 95 % t-interval over {spec.studies[0].runs} run(s). On the "
        "matrix's diagonal students start from their teachers' weights; elsewhere they do not."
    )
    figures = {
        "matrix": partial(matrix_figure, cells, names, names, labels=("student", "teacher", "diagonal effect, logits")),
        "arms": partial(arms_figure, arms, xlabel=EFFECT, chance=None),
    }
    return arms, [report.Section("Teachers × students", text, table, figures)]
