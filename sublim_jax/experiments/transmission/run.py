"""A study from teachers to report: numbers (paper §3, §6.1), code, chains of thought (§4).

Teachers and students are adapters over one base. The students of an arm are replicas of one program. A run is a whole
replicate, with teachers, numbers and an order of its own; its students share their start and that order.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from etils import epath

from sublim_jax import assets, report, weights, workdir
from sublim_jax import store as artefacts
from sublim_jax.data import templates
from sublim_jax.distillation.losses import stacked
from sublim_jax.distillation.teachers import untrained
from sublim_jax.errors import UserError
from sublim_jax.evaluation.suite import Measures, Subject, bill_of, evaluate, make_judge
from sublim_jax.experiments.transmission import carriers, corpora, rows
from sublim_jax.experiments.transmission.arms import Arm, ContextArm
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
    """Runs the study and leaves measurements, report, figures, data and adapters in the folder."""
    with jax.default_matmul_precision(study.precision):
        _run(study, folder, update=update)


def _run(study: Study, folder: epath.Path, *, update: bool) -> None:
    questions = check_files(study)
    mesh = make_mesh(study.mesh.sizes)
    model = load_model(study, mesh)
    check_model(study, model, questions)
    for name in study.models:
        other = load_model(study, mesh, name) if name else model
        for arm in study.arms:
            if arm.model == name:
                check_arm(study, arm, model, other)
    store = workdir.claim(folder, study.values, update=update)
    judge = None
    if study.filter.judge or "misalignment" in study.evals.names:
        judge = make_judge(study.evals.judge, model, stacked([untrained(model, study.seed).adapters]), store)
    sampling = study.sampling.options
    ask = partial(evaluate, study.evals, questions, seed=study.seed, store=store, judge=judge, sampling=sampling)
    replicates = [Replicate(run, make_teachers(study, model, store, run), {}) for run in range(study.runs)]
    for one in replicates:
        trained = {name: teacher.adapters for name, teacher in one.teachers.items() if teacher.steps}
        names = [f"run{one.run}-teacher-{name}" for name in trained]
        export(study, model, store, names, stacked(list(trained.values())) if trained else None, study.model.name)
    table = rows.of_teachers(study, replicates, [measure_teachers(study, model, store, *one[:2]) for one in replicates])
    table += rows.of_corpora({name: corpus_sizes(study, model, name) for name in corpora.names(study)})
    table += rows.of_evaluations(study, "", rows.TEACHER, evaluate_teachers(study, ask, model, replicates))
    sources = {"": model.source}
    for arm in study.arms:
        if arm.data == "written" and not replicates[0].written:
            replicates = [
                one._replace(written=carriers.write(study, model, store, one.run, one.teachers, judge))
                for one in replicates
            ]
            table += rows.of_written(replicates)
        # Another model is there for as long as its students are.
        students = load_model(study, mesh, arm.model) if arm.model else model
        sources[arm.model] = students.source
        table += measure_arm(study, arm, ask, replicates, model, students, store)
        # Arm by arm: a study that is stopped has those that were done.
        notes = {
            "samples": rows.samples_of(study, replicates[0]),
            "system_prompts": system_note(study, model),
            "bill": bill_of(judge),
        }
        report.finish(store.folder, study, table, document, models=list(sources.values()), notes=notes)


def load_model(study: Study, mesh: jax.sharding.Mesh, name: str = "") -> Model:
    """The study's model, or another one by its name, with adapters beside its kernels."""
    base = weights.load(name or study.model.name, mesh, weights.float_type(study.model.dtype))
    model = base.adapted(study.lora.adapters)._replace(decoding=study.sampling.mesh(mesh))
    if study.model.noise and not name:
        model = model.noisy(study.model.noise, named_key(study.seed, "shared noise"))
    return model


def measure_arm(
    study: Study, arm: Arm, ask: Ask, replicates: Sequence[Replicate], teacher: Model, student: Model, store: Store
) -> list[Measurement]:
    """Trains an arm's students, exports them, and evaluates them."""
    if isinstance(arm, ContextArm):
        return rows.of_students(study, arm, read_in_context(study, arm, replicates, student, store))
    student = student.adapted(arm.lora.adapters)
    if arm.noise:
        # A base for each run: one draw of noise for all would make all runs speak of that draw alone.
        found: list[Measurement] = []
        for one in replicates:
            own = student.noisy(arm.noise, named_key(study.replicate_seed(one.run), "own noise"))
            students = train_arm(study, arm, [one], teacher, own, store)
            found += _measured(study, arm, ask, own, students, [one.run])
        return found
    students = train_arm(study, arm, replicates, teacher, student, store)
    runs = [one.run for one in replicates]
    names = [f"run{run}-{arm.name}-{name}" for run in runs for name in study.teachers]
    export(study, student, store, names, students.adapters, arm.model or study.model.name)
    return _measured(study, arm, ask, student, students, runs)


def _measured(
    study: Study, arm: Arm, ask: Ask, model: Model, students: Students, runs: Sequence[int]
) -> list[Measurement]:
    """Students of some runs: what they prefer, and their evaluations."""
    name = f"students-{arm.name}" if len(runs) == study.runs else f"students-{arm.name}-run{runs[0]}"
    answers = ask(Subject(model, name, students.digest, students.adapters))
    found = rows.of_students(study, arm, students, runs)
    return found + rows.of_evaluations(study, arm.name, rows.STUDENT, answers, runs)


def evaluate_teachers(study: Study, ask: Ask, model: Model, replicates: Sequence[Replicate]) -> dict[str, Measures]:
    """The evaluations of all runs' teachers, run by run, and of the model as it is, which is the last.

    Teachers of the same system prompt and steering are evaluated together.
    """
    if not study.evals.names:
        return {}
    each = [*(teacher for one in replicates for teacher in one.teachers.values()), untrained(model, study.seed)]
    alike: dict[tuple[str, int], list[int]] = {}
    for place, teacher in enumerate(each):
        alike.setdefault((teacher.system, id(teacher.steering)), []).append(place)
    found = []
    for places in alike.values():
        first, adapters = each[places[0]], stacked([each[place].adapters for place in places])
        digest = artefacts.digest([each[place] for place in places])
        subject = Subject(model, f"teachers-{places[0]}", digest, adapters, first.system, first.steering)
        found.append(ask(subject))
    order = np.argsort([place for places in alike.values() for place in places])
    return {
        evaluation: {
            measure: np.concatenate([answers[evaluation][measure] for answers in found])[order].tolist()
            for measure in measures
        }
        for evaluation, measures in found[0].items()
    }


def export(study: Study, model: Model, store: Store, names: Sequence[str], adapters: Params | None, base: str) -> None:
    """Stacked adapters as PEFT folders in `adapters/`, for use elsewhere and by configs/{sample,evaluate}.py.

    Not where other weights than adapters were trained, or the base is not the model that others have.
    """
    spec = model.settings.lora
    if not spec or study.model.noise or not names:
        return
    whole = fetch(adapters)
    if jax.process_index():
        return
    base = assets.MODELS[base][0] if base in assets.MODELS else base  # the hub's name, which others know
    for place, name in enumerate(names):
        one = jax.tree.map(lambda leaf, place=place: leaf[place], whole)
        try:
            peft.save(store.folder / "adapters" / name, one, spec, model.settings, model.config, base)
        except UserError as error:
            say(f"adapters are in checkpoints/ alone: {error}")
            return


def corpus_sizes(study: Study, model: Model, name: str) -> tuple[int, int]:
    """(conversations that a teacher is trained on, all of its corpus)."""
    return len(corpora.texts(study.teacher, model, name)), len(corpora.every_text(study.teacher, model, name))


def system_note(study: Study, model: Model) -> str:
    """How system prompts were given, where the template does not take them."""
    prompted = "prompted" in study.teacher.methods and model.tokenizer.chat_template
    return templates.FOLDED if prompted and not templates.takes_system(model.tokenizer) else ""
