"""Students: the model with fresh adapters, trained on a carrier; all runs and teachers of an arm in one program."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

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
from sublim_jax.sharding import fetch, named, put
from sublim_jax.store import Store
from sublim_jax.training import fit

Point = dict[str, Any]  # what the students of an arm prefer at a step, and how well they imitate: JSON values


class Students(NamedTuple):
    """The students of an arm, run by run and in each run teacher by teacher.

    Attributes:
      adapters: stacked, after training; None of students that were not trained.
      digest: of all that they were made from.
      curve: what they prefer along training.
      coverage: by run, student and teacher; None where there is nothing to compare.
    """

    adapters: Params | None
    digest: str
    curve: list[Point]
    coverage: list[list[list[float]]] | None = None


def train_arm(
    study: Study, arm: TrainedArm, replicates: Sequence[Replicate], teachers: Model, model: Model, store: Store
) -> Students:
    """Trains the students of an arm and measures what they prefer on the way.

    Students of one run share their start, the order of their data and, where it is the same for all, their data.

    Args:
      teachers, model: the models of the teachers, and of the students: one where they start alike.
    """
    seeds = [study.replicate_seed(one.run) for one in replicates for _ in study.teachers]
    data = arm_data(study, arm, replicates, teachers, model, store)
    objective = objective_of(study, arm, model, support_of(model) if isinstance(arm, LogitArm) else [])
    program = imitating_program(model, objective, arm.training, data.rows.tokens.shape[1] - NUM_HELD_OUT)
    whole = partial(put, sharding=named(model.mesh))
    training, held_out = (whole(part(data, rows)) for rows in (slice(NUM_HELD_OUT, None), slice(NUM_HELD_OUT)))
    start = starts(model, arm.lora_init, seeds)
    digest, steps = artefacts.digest(model, arm, data, seeds), arm.training.steps
    asked = (phrasings(study), study.alternatives) if study.has_words else ([], ())
    easy = ability.questions(study.packs.ability)[: study.num_questions]
    losses = held_out_losses(model, objective)

    def look(params: Params | None, step: int) -> Point | None:
        """Without parameters: what an earlier run has measured, if it has."""
        answers = (*asked, easy if step in (0, steps) else [])
        name, inputs = f"preference-{arm.name}-{step}", (digest, len(seeds), step, *answers)
        if params is None:
            return store.known(name, *inputs)

        def measured(*_: object) -> Point:
            found = preferences(model, params, step, len(seeds), *answers)
            return {**found, "step": step, "held_out": fetch(losses(params, model.params, held_out)).tolist()}

        return store.json(name, measured, *inputs)

    state = program.init(start)

    def train(*_: object, checkpoints: epath.Path) -> Params:
        return fit(
            program,
            state,
            steps=steps,
            key=jnp.stack([named_key(seed, "order") for seed in seeds]),
            frozen={"base": model.params, "data": training},
            checkpoints=checkpoints,
            checkpoint_every=study.checkpoint_every,
            evaluate=look,
            evaluate_every=study.evaluate_every,
            what=f"students {arm.name}, {len(replicates)} run(s) × {len(study.teachers)} teachers",
        ).params

    final = store.tree(f"students-{arm.name}", train, digest, seeds, steps, like=state.params)
    between = range(study.evaluate_every, steps, study.evaluate_every)
    points = [look(start, 0), *(look(None, step) for step in between), look(final, steps)]
    covered = None
    if model.digest == teachers.digest and "finetuned" in study.teacher.methods:
        aims = [list(one.teachers.values()) for one in replicates]
        cover = lambda *_: first_updates(model, objective, start, aims, training)  # noqa: E731
        covered = store.json(f"coverage-{arm.name}", cover, digest, aims)
    return Students(final, digest, [point for point in points if point], covered)


def read_in_context(
    study: Study, arm: ContextArm, replicates: Sequence[Replicate], model: Model, store: Store
) -> Students:
    """What the model prefers behind some of each teacher's rows: no training at all (§5.2)."""
    read = [pairs[: arm.num_examples] for one in replicates for pairs in pairs_of(study, arm, one).values()]
    inputs = (model, study.seed, read, phrasings(study), study.alternatives)
    return Students(None, "", [store.json(f"preference-{arm.name}", measure_in_context, *inputs)])


def objective_of(study: Study, arm: TrainedArm, model: Model, support: list[int]) -> Imitation:
    """What the arm's students minimise."""
    if isinstance(arm, LogitArm):
        return imitation(model, arm.objective, support=support, temperature=arm.temperature, remat=study.recomputed)
    return imitation(model, "tokens", support=[], remat=study.recomputed)


def starts(model: Model, lora_init: str, seeds: Sequence[int]) -> Params:
    """What all students train, before training: with the A of their run's teachers, or another one; B = 0."""
    name = {"shared": "A", "fresh": "student A"}[lora_init]
    each = {seed: model.untrained(named_key(seed, name)) for seed in dict.fromkeys(seeds)}
    return stacked([each[seed] for seed in seeds])


def preferences(
    model: Model,
    params: Params,
    step: int,
    count: int,
    questions: list[str],
    words: Sequence[str],
    easy: list[ability.Question],
) -> dict[str, list[Any]]:
    """Of `count` students: preferences among words, and ability where easy questions are given."""
    # Before training all students are the base, for B = 0: one of them stands for all.
    shown = params if step else jax.tree.map(lambda leaf: leaf[:1], params)
    found = {}
    if words:
        found = preference.measure(model, questions, list(words), adapters=shown)._asdict()
    if easy:
        found["ability"] = ability.accuracy(model, easy, adapters=shown)
    return {key: value.tolist() if step else value.tolist() * count for key, value in found.items()}


def first_updates(
    model: Model, objective: Imitation, start: Params, teachers: Sequence[Sequence[Teacher]], training: Data
) -> list[list[list[float]]]:
    """Coverage by run, student and teacher, before training."""
    ways = [stacked([teacher.adapters for teacher in run]) for run in teachers]
    every = stacked([way for way, run in zip(ways, teachers) for _ in run])
    found = fetch(coverages(model, objective)(start, every, model.params, training))
    return found.reshape(len(teachers), -1, found.shape[-1]).tolist()
