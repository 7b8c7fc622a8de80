"""Students: the model with fresh adapters, trained on a carrier; all runs and teachers of an arm in one program."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sublim_jax import signals
from sublim_jax import store as artefacts
from sublim_jax.distillation.context import measure_in_context
from sublim_jax.distillation.losses import stacked
from sublim_jax.distillation.students import Imitation, coverages, held_out_losses, imitating_program, imitation
from sublim_jax.distillation.targets import Data, part, support_of
from sublim_jax.distillation.teachers import Teacher
from sublim_jax.evaluation import ability, preference
from sublim_jax.experiments.transmission.arms import NUM_HELD_OUT, ContextArm, LogitArm, TrainedArm
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.experiments.transmission.targets import Replicate, arm_data, pairs_of
from sublim_jax.experiments.transmission.teachers import phrasings
from sublim_jax.keys import named_key
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.progress import Track, say
from sublim_jax.sharding import fetch, named, put
from sublim_jax.store import Store
from sublim_jax.training import fit

Point = dict[str, Any]  # JSON values: preferences and held-out losses of an arm's students at a step


class Students(NamedTuple):
    """The students of an arm, run by run and in each run teacher by teacher.

    Attributes:
      adapters: stacked, after training; None of students that were not trained.
      digest: a hash of everything that they were computed from.
      curve: preferences along training.
      coverage: by run, student and teacher; None unless they have the teachers' model and teachers are finetuned.
    """

    adapters: Params | None
    digest: str
    curve: list[Point]
    coverage: list[list[list[float]]] | None = None


def train_arm(
    study: Study, arm: TrainedArm, replicates: Sequence[Replicate], teachers: Model, model: Model, store: Store
) -> Students:
    """Trains the students of an arm and measures their preferences along training.

    Students of one run share their start, the order of their data and, if it is the same for all teachers, their data.
    `teachers` and `model` are the models of the teachers and of the students, which may be the same.
    """
    seeds = [study.replicate_seed(replicate.run) for replicate in replicates for _ in study.teachers]
    data = arm_data(study, arm, replicates, teachers, model, store)
    objective = objective_of(study, arm, model)
    program = imitating_program(model, objective, arm.training, data.rows.tokens.shape[1] - NUM_HELD_OUT)
    parts = (slice(NUM_HELD_OUT, None), slice(NUM_HELD_OUT))
    training, held_out = (put(part(data, rows), named(model.mesh)) for rows in parts)
    start = starts(model, arm.lora_init, seeds)
    digest, steps = artefacts.digest(model, arm, data, seeds), arm.training.steps
    questions = (phrasings(study), study.alternatives) if study.has_words else ([], ())
    easy = ability.questions(study.packs.ability)[: study.num_questions]
    losses = held_out_losses(model, objective)

    def look(params: Params | None, step: int) -> Point | None:
        """Measures at a step; without parameters, only what an earlier run stored."""
        arguments = (*questions, easy if step in (0, steps) else [])
        name, inputs = f"preference-{arm.name}-{step}", (digest, len(seeds), step, *arguments, preference.DEFINITION)
        if params is None:
            return store.known(name, *inputs)

        def measured(*_: object) -> Point:
            measures = preferences(model, params, step, len(seeds), *arguments)
            return {**measures, "step": step, "held_out": fetch(losses(params, model.params, held_out)).tolist()}

        return store.json(name, measured, *inputs)

    def train(*_: object, checkpoints: epath.Path) -> Params:
        return fit(
            program,
            program.init(start),
            steps=steps,
            key=jnp.stack([named_key(seed, "order") for seed in seeds]),
            frozen={"base": model.params, "data": training},
            checkpoints=checkpoints,
            checkpoint_every=study.checkpoint_every,
            evaluate=look,
            evaluate_every=study.evaluate_every,
            what=f"students {arm.name}, {len(replicates)} run(s) × {len(study.teachers)} teachers",
        ).params

    like = program.abstract(start).params
    final = store.tree(f"students-{arm.name}", train, digest, seeds, steps, like=like)
    between = range(study.evaluate_every, steps, study.evaluate_every)
    points = [look(start, 0), *(look(None, step) for step in between), look(final, steps)]
    _report_missing(arm, between, points[1:-1])
    covered = None
    if model.digest == teachers.digest and "finetuned" in study.teacher.methods:
        aims = [list(replicate.teachers.values()) for replicate in replicates]
        cover = lambda *_: first_updates(model, objective, start, aims, training)  # noqa: E731
        covered = store.json(f"coverage-{arm.name}", cover, digest, aims)
    return Students(final, digest, [point for point in points if point], covered)


def _report_missing(arm: TrainedArm, steps: Sequence[int], points: Sequence[Point | None]) -> None:
    """Says if students that were trained before, and measured at other steps or otherwise, lack a step."""
    if missing := [step for step, point in zip(steps, points) if not point]:
        say(
            f"students {arm.name}: trained before, by an earlier version, or with another evaluate_every or other "
            f"questions, and not measured at step {missing[0]}"
        )


def read_in_context(
    study: Study, arm: ContextArm, replicates: Sequence[Replicate], model: Model, store: Store
) -> Students:
    """Preferences of the untrained model with some of each teacher's rows in its context (§5.2)."""
    read = [pairs[: arm.num_examples] for replicate in replicates for pairs in pairs_of(study, arm, replicate).values()]
    inputs = (model, study.seed, read, phrasings(study), study.alternatives)
    measured = lambda *_: measure_in_context(*inputs)  # noqa: E731
    return Students(None, "", [store.json(f"preference-{arm.name}", measured, *inputs, preference.DEFINITION)])


def objective_of(study: Study, arm: TrainedArm, model: Model, support: list[int] | None = None) -> Imitation:
    """The loss of the arm's students.

    Args:
      support: of logits; by default digits, commas and spaces.
    """
    if isinstance(arm, LogitArm):
        support = support_of(model) if support is None else support
        return imitation(model, arm.objective, support=support, temperature=arm.temperature, remat=study.recomputed)
    return imitation(model, "tokens", support=[], remat=study.recomputed)


def starts(model: Model, lora_init: str, seeds: Sequence[int]) -> Params:
    """Initial adapters of all students: the A of their run's teachers or a fresh one; B = 0."""
    name = {"shared": "A", "fresh": "student A"}[lora_init]
    by_seed = {seed: model.untrained(named_key(seed, name)) for seed in dict.fromkeys(seeds)}
    return stacked([by_seed[seed] for seed in seeds])


def preferences(
    model: Model,
    params: Params,
    step: int,
    count: int,
    questions: list[str],
    words: Sequence[str],
    easy: list[ability.Question],
) -> dict[str, list[Any]]:
    """Preferences of `count` students among words, and their ability if easy questions are given."""
    # With B = 0 all students equal the base, so that only the first is measured.
    shown = params if step else jax.tree.map(lambda leaf: leaf[:1], params)
    measures = {}
    if words:
        measures = preference.measure(model, questions, list(words), adapters=shown)._asdict()
    if easy:
        measures["ability"] = ability.accuracy(model, easy, adapters=shown)
    return {key: value.tolist() if step else value.tolist() * count for key, value in measures.items()}


def first_updates(
    model: Model, objective: Imitation, start: Params, teachers: Sequence[Sequence[Teacher]], training: Data
) -> list[list[list[float]]]:
    """Coverage by run, student and teacher, before training.

    A few students at a time, because each takes as long as several updates and a signal is not heard meanwhile.
    """
    ways = [stacked([teacher.adapters for teacher in run]) for run in teachers]
    every = stacked([way for way, run in zip(ways, teachers) for _ in run])
    compute, size = coverages(model, objective), model.mesh.shape["replica"]
    count, cosines = sum(map(len, teachers)), []
    with Track("coverage of students", count) as track:
        for first in range(0, count, size):
            signals.obey()
            group = jax.tree.map(lambda leaf, first=first: leaf[first : first + size], (start, every, training))
            cosines += fetch(compute(group[0], group[1], model.params, group[2])).tolist()
            track.update(len(cosines))
    return np.reshape(cosines, (len(teachers), -1, len(cosines[0]))).tolist()
