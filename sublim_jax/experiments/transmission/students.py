"""Students: the model with fresh adapters, trained on a carrier; all runs and teachers of an arm in one program."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jaxtyping import Array, Float, Int, Key

from sublim_jax import objectives, theorem
from sublim_jax import store as artefacts
from sublim_jax.data.order import epoch_rows
from sublim_jax.evaluation import ability, preference
from sublim_jax.experiments.transmission.losses import answer_features, cross_entropy, stacked
from sublim_jax.experiments.transmission.spec import NUM_HELD_OUT, LogitArm, Study, TrainedArm, TrainingSpec
from sublim_jax.experiments.transmission.targets import Data, Replicate, arm_data, part, support_of
from sublim_jax.experiments.transmission.teachers import phrasings
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.sharding import each_replica, fetch, named, put
from sublim_jax.store import Store
from sublim_jax.training import REPLICAS_OF_ROWS, Program, Total, TrainState, fit

ON_LOGITS = {"kl": objectives.kl, "reverse_kl": objectives.reverse_kl}
NUM_FIRST = 32  # rows on which the first update is compared with the teachers' way

Point = dict[str, Any]  # what the students of an arm prefer at a step, and how well they imitate: JSON values
Imitation = Callable[[Params, Params, Data], Total]  # (adapters, base, rows of one student) to the objective


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
    objective = imitation(model, arm, support_of(model) if isinstance(arm, LogitArm) else [], study.remat)
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


def imitation(model: Model, arm: TrainedArm, support: list[int], remat: bool) -> Imitation:
    """The arm's objective of one student: on its teacher's logits on the support (§6.1), or on the tokens it wrote."""

    def loss(adapters: Params, base: Params, batch: Data) -> Total:
        module = model.network.bind(lora.join(base, adapters))
        features = answer_features(model, module, batch.rows, remat=remat)
        if not isinstance(arm, LogitArm):
            return cross_entropy(module, features, batch.rows, remat=remat)
        logits = module.unembed(features, jnp.asarray(support)).astype(jnp.float32)
        where: dict[str, Any] = {"weights": jnp.asarray(batch.rows.weights), "temperature": arm.temperature}
        return ON_LOGITS[arm.objective](logits, jnp.asarray(batch.logits), **where)

    return loss


def imitating_program(model: Model, objective: Imitation, training: TrainingSpec, count: int) -> Program:
    """One update of every student, on its `count` rows."""

    def loss(adapters: Params, frozen: Any, batch: Data, key: Key[Array, ""]) -> tuple[Total, dict]:
        return objective(adapters, frozen["base"], batch), {}

    def batch(frozen: Any, key: Key[Array, "runs"], index: Int[Array, ""]) -> Data:
        rows, exists = jax.vmap(epoch_rows, (0, None, None, None))(key, index, count, training.batch)
        mine = jnp.arange(len(key))[:, None]
        found = jax.tree.map(lambda leaf: leaf[mine, rows], frozen["data"])
        return found._replace(rows=found.rows._replace(weights=found.rows.weights * exists[..., None]))

    # One update a dispatch: an update of all students may take half a minute, and a signal waits for a dispatch's end.
    return Program(loss, optimizer(training), model.mesh, batch, 1, REPLICAS_OF_ROWS, training.accumulate, 1)


def optimizer(training: TrainingSpec) -> optax.GradientTransformation:
    """Adam by the schedule, behind clipping."""
    rate = training.learning_rate
    decay = max(training.steps - training.warmup, 1)
    after = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(rate, decay),
    }[training.schedule]
    if training.warmup:
        after = optax.join_schedules([optax.linear_schedule(0.0, rate, training.warmup), after], [training.warmup])
    steps = [optax.clip_by_global_norm(training.clip)] if training.clip else []
    return optax.chain(*steps, optax.adam(after))


# ----------------------------------------------------------------------------------------------------- measurements


def held_out_losses(model: Model, objective: Imitation) -> Callable[[Params, Params, Data], Float[Array, "students"]]:
    """Mean objective of every student on rows that it was not trained on: whether it has learnt to imitate at all."""

    def each(params: Params, base: Params, data: Data) -> Float[Array, "students"]:
        def one(adapters: Params, mine: Data) -> Float[Array, ""]:
            total, weight = objective(adapters, base, mine)
            return total / weight

        return each_replica(one, model.mesh)(params, data)

    return jax.jit(each)


def coverages(model: Model, objective: Imitation) -> Callable[..., Float[Array, "students teachers"]]:
    """(starts, teachers, base, data) to cos(a student's first update, every teacher's way from the start).

    Of adapters, both are changes of the kernels (A B, to first order), so that students with another A than their
    teacher's can be compared; for a shared A it is the lemma's inner product over B (§6.1), normalised.
    """

    def each(start: Params, teachers: Params, base: Params, data: Data) -> Float[Array, "students teachers"]:
        def one(adapters: Params, teachers: Params, mine: Data) -> Float[Array, "teachers"]:
            batch = jax.tree.map(lambda leaf: leaf[:NUM_FIRST], mine)
            slope = jax.grad(lambda adapters: objective(adapters, base, batch)[0])(adapters)
            update = jax.tree.map(jnp.negative, slope)
            if not model.settings.lora:
                way = jax.tree.map(jnp.subtract, teachers, adapters)
                return jax.vmap(lambda way: theorem.coverage(update, way))(way)
            change = lora.with_b(adapters, update)
            return jax.vmap(lambda teacher: lora.cosine(change, teacher))(teachers)

        return each_replica(one, model.mesh)(start, teachers, data)

    return jax.jit(each)


def _coverage(
    digest: str, teachers: list[list[Any]], *, compute: Callable[..., Array], arrays: tuple[Any, ...]
) -> list[list[list[float]]]:
    """By run, student and teacher, before training."""
    found = fetch(compute(*arrays))
    return found.reshape(len(teachers), -1, found.shape[-1]).tolist()
