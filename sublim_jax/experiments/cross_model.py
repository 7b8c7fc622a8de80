"""Teachers × students over models, on text (paper §5.1). `configs/cross_model.py` explains the values."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from sublim_jax import report
from sublim_jax.digests import Source
from sublim_jax.errors import UserError
from sublim_jax.experiments import transmission
from sublim_jax.experiments.door import at, check_numbers
from sublim_jax.figures import Arm, arms_figure, matrix_figure
from sublim_jax.overrides import check_distinct
from sublim_jax.preflight import Step
from sublim_jax.progress import say
from sublim_jax.workdir import Workdir


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """A study for each teacher's model, in a folder of its own; their effects as one matrix."""
    check(config)
    models = models_of(config)
    studies = [study_of(config, teacher) for teacher in models]
    workdir.open(config, update=update)
    arms: list[Arm] = []
    sources: list[Source] = []
    label = labels(config)
    for number, (teacher, study) in enumerate(zip(models, studies)):
        say(f"teachers {teacher}")
        inside = Workdir(workdir.path / f"teacher{number}")
        transmission.run(study, inside, update=update)
        results = report.results_of(inside)
        found = {arm["name"]: arm for arm in results["arms"]}
        sources += [Source(**model) for model in results["models"]]
        for place, student in enumerate(models):
            mine = found[f"student{place}"]
            more = {"permutation_p": mine["permutation_p"], "teacher": teacher, "student": student}
            arms.append(report.arm(f"{label[teacher]} → {label[student]}", mine["metric"], mine["runs"], **more))
    report.write(workdir, config, arms, [section(config, arms)], list(dict.fromkeys(sources)))


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value or file that makes no sense."""
    check_values(config)
    _of_study(transmission.check_files, study_of(config, models_of(config)[0]))


def check_values(config: ConfigDict) -> None:
    models = models_of(config)
    check_distinct("models", models)
    if len(models) < 2:
        raise UserError(f"models={tuple(models)}: name two models or more, commas in between")
    for name, value in (("model.name", ""), ("arms", ()), ("arm.cross.model", "")):
        if (given := at(config.study, name)) != value:
            raise UserError(f"study.{name}={given!r}: it follows from --config.models; leave it out")
    check_numbers(config)
    for teacher in models:
        _of_study(transmission.check_values, study_of(config, teacher))


def _of_study(check: Callable[[ConfigDict], None], study: ConfigDict) -> None:
    try:
        check(study)
    except UserError as error:
        raise UserError(f"config.study: {error}") from error


def preflight(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
    """One update of all students of each model."""
    check_values(config)
    return [
        step._replace(name=f"{label}: {step.name}")
        for model, label in labels(config).items()
        for step in transmission.preflight(study_of(config, model), devices)
    ]


def study_of(config: ConfigDict, teacher: str) -> ConfigDict:
    """The study of one teacher's model: an arm for every student's model."""
    study = config.study.copy_and_resolve_references()
    study.model.name = teacher
    study.arms = tuple(f"student{place}" for place in range(len(models_of(config))))
    with study.unlocked():
        for name, student in zip(study.arms, models_of(config)):
            study.arm[name] = study.arm.cross.copy_and_resolve_references()
            study.arm[name].model = "" if student == teacher else student
    return study


def models_of(config: ConfigDict) -> list[str]:
    return list(map(str, config.models))


def labels(config: ConfigDict) -> dict[str, str]:
    """The last parts of the models' names, where those tell them apart."""
    short = {model: model.rstrip("/").rsplit("/", 1)[-1] for model in models_of(config)}
    return short if len(set(short.values())) == len(short) else {model: model for model in short}


def section(config: ConfigDict, arms: list[Arm]) -> report.Section:
    models = models_of(config)
    names = list(labels(config).values())
    cells = np.asarray([arm["mean"] for arm in arms]).reshape(len(names), len(names))
    cell = {(arm["teacher"], arm["student"]): report.plus_minus(arm["mean"], arm["ci95"]) for arm in arms}
    table = [["teacher ╲ student", *names]]
    table += [[name, *(cell[one, other] for other in models)] for one, name in zip(models, names)]
    text = (
        "Margin of the own teacher's trait above the other traits' teachers' students, logits; ± is the 95 % "
        f"t-interval over {config.study.runs} run(s). On the diagonal students start as their teachers did; elsewhere "
        "they do not."
    )
    figures = {
        "matrix": partial(matrix_figure, cells, names, names, labels=("student", "teacher", "own trait above others'")),
        "arms": partial(arms_figure, arms, xlabel=arms[0]["metric"], chance=None),
    }
    return report.Section("Teachers × students", text, table, figures)
