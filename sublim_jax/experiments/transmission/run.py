"""Runs a study from teachers to report: numbers (paper §3, §6.1), code, chains of thought (§4).

Teachers and students are adapters on a shared base. The students of an arm are trained as replicas of one program. A
run is a full replicate, with its own teachers, data and data order; its students share their start and that order.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from sublim_jax import assets, report, weights, workdir
from sublim_jax import store as artefacts
from sublim_jax.data import templates
from sublim_jax.digests import Source
from sublim_jax.distillation.losses import stacked
from sublim_jax.distillation.teachers import untrained
from sublim_jax.errors import UserError
from sublim_jax.evaluation.suite import Measures, Subject, bill_of, evaluate, make_judge
from sublim_jax.experiments.transmission import carriers, corpora, rows
from sublim_jax.experiments.transmission.arms import WRITTEN, Arm, ContextArm, TrainedArm
from sublim_jax.experiments.transmission.checks import check_arm, check_files, check_model
from sublim_jax.experiments.transmission.preflight import preflight
from sublim_jax.experiments.transmission.report import document
from sublim_jax.experiments.transmission.spec import Study, read
from sublim_jax.experiments.transmission.students import Students, read_in_context, train_arm
from sublim_jax.experiments.transmission.targets import Replicate
from sublim_jax.experiments.transmission.teachers import make_teachers, measure_teachers
from sublim_jax.experiments.transmission.typed import check_typed
from sublim_jax.keys import named_key
from sublim_jax.measurements import Measurement
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.progress import say
from sublim_jax.sharding import fetch, make_mesh
from sublim_jax.store import Store
from sublim_jax.weights import peft

__all__ = ["check_typed", "document", "preflight", "read", "run"]

Ask = Callable[[Subject], dict[str, Measures]]  # the study's evaluations


def run(study: Study, folder: epath.Path, *, update: bool = False) -> None:
    """Runs the study and writes measurements, report, figures, data and adapters to the folder."""
    with jax.default_matmul_precision(study.precision):
        _run(study, folder, update=update)


def _run(study: Study, folder: epath.Path, *, update: bool) -> None:
    questions = check_files(study)
    mesh = make_mesh(study.mesh.sizes)
    model = load_model(study, mesh)
    check_model(study, model, questions)
    check_arms(study, mesh, model)
    store = workdir.claim(folder, study.values, update=update)
    if update and jax.process_index() == 0:  # the same names may be of other values; this run writes its own again
        (store.folder / "adapters").rmtree(missing_ok=True)
    judge = None
    if study.filter.judge or "misalignment" in study.evals.names:
        judge = make_judge(study.evals.judge, model, stacked([untrained(model, study.seed).adapters]), store)
    sampling = study.sampling.options
    ask = partial(evaluate, study.evals, questions, seed=study.seed, store=store, judge=judge, sampling=sampling)
    teachers = make_teachers(study, model, store, range(study.runs))
    replicates = [Replicate(run, of_run, {}) for run, of_run in enumerate(teachers)]
    for replicate in replicates:
        trained = {name: teacher.adapters for name, teacher in replicate.teachers.items() if teacher.steps}
        names = [f"run{replicate.run}-teacher-{name}" for name in trained]
        export(study, model, store, names, stacked(list(trained.values())) if trained else None, study.model.name)
    measured = [measure_teachers(study, model, store, *replicate[:2]) for replicate in replicates]
    table = rows.of_teachers(study, replicates, measured)
    table += rows.of_corpora({name: corpus_sizes(study, model, name) for name in corpora.names(study)})
    table += rows.of_evaluations(study, "", rows.TEACHER, evaluate_teachers(study, ask, model, replicates))
    sources = {"": model.source}
    reported = 0
    for arm in study.arms:
        if arm.data in WRITTEN and not replicates[0].written:
            replicates = [
                Replicate(run, teachers, carriers.write(study, model, store, run, teachers, judge))
                for run, teachers, _ in replicates
            ]
            table += rows.of_written(replicates)
        measurements, sources[arm.model] = measure_arm(study, arm, ask, replicates, model, store)
        table += measurements
        # A report after every arm, so that an interrupted study has the finished ones. Arms that were there already
        # are in an earlier report, which may have more arms than have been read by now.
        if store.made == reported and arm is not study.arms[-1]:
            continue
        reported = store.made
        notes = {
            "samples": rows.samples_of(study, replicates[0]),
            "system_prompts": system_note(study, model),
            "bill": bill_of(judge),
            "draws": "by run",  # of sampled answers; earlier versions took the same for all runs
        }
        report.finish(store.folder, study, table, document, models=list(sources.values()), notes=notes)


def load_model(study: Study, mesh: Mesh, name: str = "") -> Model:
    """The study's model with its LoRA adapters, or another one by its name, which arms adapt."""
    base = weights.load(name or study.model.name, mesh, weights.float_type(study.model.dtype))
    model = base._replace(decoding=study.sampling.mesh(mesh), precision=study.precision)
    if name:
        return model
    model = model.adapted(study.lora.adapters)
    if study.model.noise:
        model = model.noisy(study.model.noise, named_key(study.seed, "shared noise"))
    return model


def check_arms(study: Study, mesh: Mesh, model: Model) -> None:
    """Raises UserError for an arm that is impossible with its students' model. Another model is in memory only here."""
    for name in study.models:
        students = load_model(study, mesh, name) if name else model
        for arm in study.arms:
            if arm.model == name:
                check_arm(study, arm, model, students)


def measure_arm(
    study: Study, arm: Arm, ask: Ask, replicates: Sequence[Replicate], teacher: Model, store: Store
) -> tuple[list[Measurement], Source]:
    """Trains an arm's students, exports them and evaluates them; returns the files of their model, too.

    A model of their own is in memory only here.
    """
    student = load_model(study, teacher.mesh, arm.model) if arm.model else teacher
    if isinstance(arm, ContextArm):
        measurements = rows.of_students(study, arm, read_in_context(study, arm, replicates, student, store))
    else:
        measurements = _measure_trained(study, arm, ask, replicates, teacher, student, store)
    return measurements, student.source


def _measure_trained(
    study: Study,
    arm: TrainedArm,
    ask: Ask,
    replicates: Sequence[Replicate],
    teacher: Model,
    student: Model,
    store: Store,
) -> list[Measurement]:
    student = student.adapted(arm.lora.adapters)
    if arm.noise:
        # A noisy base per run: with shared noise, results would hold for that draw only.
        measurements: list[Measurement] = []
        for replicate in replicates:
            noisy_student = student.noisy(arm.noise, named_key(study.replicate_seed(replicate.run), "own noise"))
            students = train_arm(study, arm, [replicate], teacher, noisy_student, store)
            measurements += _measured(study, arm, ask, noisy_student, students, [replicate.run])
        return measurements
    students = train_arm(study, arm, replicates, teacher, student, store)
    runs = [replicate.run for replicate in replicates]
    names = [f"run{run}-{arm.name}-{name}" for run in runs for name in study.teachers]
    export(study, student, store, names, students.adapters, arm.model or study.model.name)
    return _measured(study, arm, ask, student, students, runs)


def _measured(
    study: Study, arm: Arm, ask: Ask, model: Model, students: Students, runs: Sequence[int]
) -> list[Measurement]:
    """Preferences and evaluations of the students of some runs."""
    name = f"students-{arm.name}" if len(runs) == study.runs else f"students-{arm.name}-run{runs[0]}"
    run_of = tuple(run for run in runs for _ in study.teachers)
    answers = ask(Subject(model, name, students.digest, students.adapters, run_of))
    measurements = rows.of_students(study, arm, students, runs)
    steps = 0 if isinstance(arm, ContextArm) else arm.training.steps
    return measurements + rows.of_evaluations(study, arm.name, rows.STUDENT, answers, runs, steps)


def evaluate_teachers(study: Study, ask: Ask, model: Model, replicates: Sequence[Replicate]) -> dict[str, Measures]:
    """The evaluations of all runs' teachers, run by run, and of the untrained model, which is last.

    Teachers with the same system prompt and steering are evaluated together.
    """
    if not study.evals.names:
        return {}
    teachers = [teacher for replicate in replicates for teacher in replicate.teachers.values()]
    runs = [replicate.run for replicate in replicates for _ in replicate.teachers]
    teachers, runs = [*teachers, untrained(model, study.seed)], [*runs, 0]
    alike: dict[tuple[str, int], list[int]] = {}
    for place, teacher in enumerate(teachers):
        alike.setdefault((teacher.system, id(teacher.steering)), []).append(place)
    evaluations = []
    for places in alike.values():
        first, adapters = teachers[places[0]], stacked([teachers[place].adapters for place in places])
        digest = artefacts.digest([teachers[place] for place in places])
        name, run_of = f"teachers-{places[0]}", tuple(runs[place] for place in places)
        evaluations.append(ask(Subject(model, name, digest, adapters, run_of, first.system, first.steering)))
    order = np.argsort([place for places in alike.values() for place in places])
    return {
        evaluation: {
            measure: np.concatenate([answers[evaluation][measure] for answers in evaluations])[order].tolist()
            for measure in measures
        }
        for evaluation, measures in evaluations[0].items()
    }


def export(study: Study, model: Model, store: Store, names: Sequence[str], adapters: Params | None, base: str) -> None:
    """Stacked adapters as PEFT folders in `adapters/`, for use elsewhere and by configs/{sample,evaluate}.py.

    Skipped if other weights than adapters were trained, or if noise was added to the base.
    """
    spec = model.settings.lora
    if not spec or study.model.noise or not names:
        return
    whole = fetch(adapters)
    if jax.process_index():
        return
    base = assets.hub_name(base)
    for place, name in enumerate(names):
        adapter = jax.tree.map(lambda leaf, place=place: leaf[place], whole)
        try:
            peft.save(store.folder / "adapters" / name, adapter, spec, model.settings, model.config, base)
        except UserError as error:
            say(f"adapters are in checkpoints/ alone: {error}")
            return


def corpus_sizes(study: Study, model: Model, name: str) -> tuple[int, int]:
    """(number of conversations that a teacher is trained on, number in its corpus)."""
    return len(corpora.texts(study.teacher, model, name)), len(corpora.every_text(study.teacher, model, name))


def system_note(study: Study, model: Model) -> str:
    """A note on how system prompts are given if the template does not take them; else ""."""
    prompted = "prompted" in study.teacher.methods and model.tokenizer.chat_template
    return templates.FOLDED if prompted and not templates.takes_system(model.tokenizer) else ""
