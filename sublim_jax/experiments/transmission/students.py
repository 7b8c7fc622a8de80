"""Students: the model with fresh adapters, trained on a carrier; all runs and teachers of an arm in one program."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array

from sublim_jax import store as artefacts
from sublim_jax.distillation.losses import stacked
from sublim_jax.distillation.students import Imitation, coverages, held_out_losses, imitating_program, imitation
from sublim_jax.distillation.targets import part, support_of
from sublim_jax.evaluation import ability, preference
from sublim_jax.experiments.transmission.arms import NUM_HELD_OUT, LogitArm, TrainedArm
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.experiments.transmission.targets import Replicate, arm_data
from sublim_jax.experiments.transmission.teachers import phrasings
from sublim_jax.keys import named_key
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.sharding import fetch, named, put
from sublim_jax.store import Store
from sublim_jax.training import Program, TrainState, fit

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
        inputs = (digest, len(seeds), step, *asked, easy if step in (0, steps) else [])
        name = f"preference-{arm.name}-{step}"
        if params is None:
            return store.known(name, *inputs)
        options = {"params": params, "model": model, "losses": lambda: losses(params, model.params, held_out)}
        return store.json(name, measure_students, *inputs, **options)

    state = program.init(start)
    how = {"program": program, "state": state, "frozen": {"base": model.params, "data": training}, "evaluate": look}
    how |= {"evaluate_every": study.evaluate_every, "checkpoint_every": study.checkpoint_every}
    how["label"] = f"students {arm.name}, {len(replicates)} run(s) × {len(study.teachers)} teachers"
    final = store.tree(f"students-{arm.name}", train, digest, seeds, steps, like=state.params, **how)
    between = range(study.evaluate_every, steps, study.evaluate_every)
    points = [look(start, 0), *(look(None, step) for step in between), look(final, steps)]
    covered = None
    if model.digest == teachers.digest and "finetuned" in study.teacher.methods:
        aims = [stacked([teacher.adapters for teacher in one.teachers.values()]) for one in replicates]
        arrays = (start, stacked([aim for aim in aims for _ in study.teachers]), model.params, training)
        on = [list(one.teachers.values()) for one in replicates]
        how = {"compute": coverages(model, objective), "arrays": arrays}
        covered = store.json(f"coverage-{arm.name}", _coverage, digest, on, **how)
    return Students(final, digest, [point for point in points if point], covered)


def objective_of(study: Study, arm: TrainedArm, model: Model, support: list[int]) -> Imitation:
    """What the arm's students minimise."""
    if isinstance(arm, LogitArm):
        return imitation(model, arm.objective, support=support, temperature=arm.temperature, remat=study.remat)
    return imitation(model, "tokens", support=[], remat=study.remat)


def starts(model: Model, lora_init: str, seeds: Sequence[int]) -> Params:
    """What all students train, before training: with the A of their run's teachers, or another one; B = 0."""
    name = {"shared": "A", "fresh": "student A"}[lora_init]
    each = {seed: model.untrained(named_key(seed, name)) for seed in dict.fromkeys(seeds)}
    return stacked([each[seed] for seed in seeds])


def measure_students(
    digest: str,
    count: int,
    step: int,
    questions: list[str],
    words: tuple[str, ...],
    easy: list[ability.Question],
    *,
    params: Params,
    model: Model,
    losses: Callable[[], Array],
) -> Point:
    """Preferences among words, ability where easy questions are given, and the objective on held-out rows."""
    # Before training all students are the base, for B = 0: one of them stands for all.
    shown = params if step else jax.tree.map(lambda leaf: leaf[:1], params)
    found = {}
    if words:
        found = preference.measure(model, questions, list(words), adapters=shown)._asdict()
    if easy:
        found["ability"] = ability.accuracy(model, easy, adapters=shown)
    every = {key: value.tolist() if step else value.tolist() * count for key, value in found.items()}
    return {**every, "step": step, "held_out": fetch(losses()).tolist()}


# ------------------------------------------------------------------------------------------------------- training


def train(
    digest: str,
    seeds: Sequence[int],
    steps: int,
    *,
    checkpoints: epath.Path,
    program: Program,
    state: TrainState,
    frozen: dict[str, Any],
    evaluate: Callable[[Params, int], Any],
    evaluate_every: int,
    checkpoint_every: int,
    label: str,
) -> Params:
    """All students' adapters after training."""
    return fit(
        program,
        state,
        steps=steps,
        key=jnp.stack([named_key(seed, "order") for seed in seeds]),
        frozen=frozen,
        checkpoints=checkpoints,
        checkpoint_every=checkpoint_every,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        what=label,
    ).params


# ----------------------------------------------------------------------------------------------------- measurements


def _coverage(
    digest: str, teachers: list[list[Any]], *, compute: Callable[..., Array], arrays: tuple[Any, ...]
) -> list[list[list[float]]]:
    """By run, student and teacher, before training."""
    found = fetch(compute(*arrays))
    return found.reshape(len(teachers), -1, found.shape[-1]).tolist()
