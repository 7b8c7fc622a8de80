"""Students: the model with fresh adapters, trained on a carrier; all runs and teachers of an arm in one program."""

import bisect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from sublim_jax import objectives, theorem
from sublim_jax.data import chat, templates
from sublim_jax.data.order import epoch_rows
from sublim_jax.errors import UserError
from sublim_jax.evaluation import ability, preference
from sublim_jax.evaluation.preference import Preference
from sublim_jax.experiments import measures
from sublim_jax.experiments import teachers as teaching
from sublim_jax.experiments.carrier import Data, Pair, Run, arm_data
from sublim_jax.experiments.lab import (
    Lab,
    answer_features,
    cross_entropy,
    depends_on,
    export,
    fresh,
    measure,
    noisy,
    stacked,
)
from sublim_jax.experiments.measures import Found, Subject
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.functional import Params
from sublim_jax.sharding import each_replica, fetch, named, put
from sublim_jax.training import REPLICAS_OF_ROWS, Program, Total, fit
from sublim_jax.workdir import digest, plain

OBJECTIVES = {"kl": objectives.kl, "reverse_kl": objectives.reverse_kl}
SCHEDULES = ("constant", "linear", "cosine")
HELD_OUT = 16  # rows of the carrier that no student trains on
FIRST = 32  # rows that the first update is looked at on

Point = dict[str, Any]  # what the students of an arm prefer at one step, and how well they imitate


class Result(NamedTuple):
    curve: list[Point]
    coverage: list[list[list[float]]] | None  # runs, students, teachers
    found: dict[str, Found]  # what the students were asked at the end, by evaluation


def students(own: Lab, name: str, runs: Sequence[Run]) -> Result:
    """Trains the students of one arm, run by run and in each run teacher by teacher, and asks what they prefer.

    Students of one run share their start, the order of their data and, where it is the same for all, their data.

    Args:
      own: the lab of the students' model; the teachers' where they start alike.
    """
    lab = runs[0].lab
    config, arm = lab.config, lab.config.arm[name]
    if arm.objective == "context":
        return Result([in_context(own, name, runs)], None, {})
    alike = own.model is lab.model and not arm.noise
    if arm.noise:
        own = noisy(own, arm.noise, named_key(config.seed, "own noise"))
    data = arm_data(arm, runs, own.model)
    start = starts(own, arm, runs)
    program = imitating_program(own, arm, data.rows.tokens.shape[1] - HELD_OUT)
    depends = {**depends_on(lab, "student"), "arm": plain(arm), "runs": [run.lab.seed for run in runs]}
    depends |= {"student model": own.model.source.digest, "data": digest(data)}
    whole = partial(put, sharding=named(lab.mesh))
    training, held_out = (whole(part(data, rows)) for rows in (slice(HELD_OUT, None), slice(HELD_OUT)))
    frozen = {"base": own.model.params, "data": training}
    easy = ability.questions(config.packs.ability)[: config.questions]
    curve: dict[int, Point] = {}
    losses = held_out_losses(own, arm)

    def evaluate(params: Params | None, step: int) -> None:
        """Without parameters: what an earlier run has found, if it has."""
        ends = step in (0, config.student.steps)
        file, on = f"preference-{name}-{step}", {**depends, "step": step, "asked": own.asked}
        on |= {"words": list(config.alternatives), "easy": easy if ends else []}
        if params is not None or lab.workdir.known(file, on):
            curve[step] = lab.workdir.json(file, on, partial(look, params, step, ends))

    def look(params: Any, step: int, ends: bool) -> Point:
        # Before training all students are the base, for B = 0: one of them stands for all.
        shown = params if step else jax.tree.map(lambda leaf: leaf[:1], params)
        found = {key: value.tolist() for key, value in measure(own, shown)._asdict().items()} if lab.words else {}
        if ends:
            found["ability"] = ability.accuracy(own.model, easy, adapters=shown, mesh=lab.mesh).tolist()
        every = {key: value if step else value * (len(runs) * len(lab.who)) for key, value in found.items()}
        return {**every, "step": step, "held_out": fetch(losses(params, own.model.params, held_out)).tolist()}

    def make(checkpoints: epath.Path) -> Params:
        return fit(
            program,
            program.init(start),
            steps=config.student.steps,
            key=jnp.stack([named_key(run.lab.seed, "order") for run in runs for _ in lab.who]),
            frozen=frozen,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            evaluate=evaluate,
            evaluate_every=config.evaluate_every,
            what=f"students {name}, {len(runs)} run(s) × {len(lab.who)} teachers",
        ).params

    final = lab.workdir.tree(f"students-{name}", depends, make, program.init(start).params)
    if not arm.noise:
        names = [f"run{run.lab.run}-{name}-{who}" for run in runs for who in lab.who]
        export(own, names, final, arm.model or config.model.name)
    evaluate(start, 0)
    for step in range(config.evaluate_every, config.student.steps, config.evaluate_every):
        evaluate(None, step)
    evaluate(final, config.student.steps)
    covered = None
    if alike and "finetuned" in config.teacher.means:
        on = {**depends, "teachers": [teaching.depends(run.lab) for run in runs]}
        covered = lab.workdir.json(f"coverage-{name}", on, lambda: coverages(own, arm, start, aims(runs), training))
    found = asked(own, f"students-{name}", final, depends)
    return Result([curve[step] for step in sorted(curve)], covered, found)


def starts(own: Lab, arm: ConfigDict, runs: Sequence[Run]) -> Params:
    """Adapters of all students before training: the A of their run's teachers, or one drawn anew; B = 0."""
    name = "A" if arm.a == "shared" else "student A"
    each = [fresh(own, named_key(run.lab.seed, name)) for run in runs]
    return stacked([one for one in each for _ in own.who])


def aims(runs: Sequence[Run]) -> Params:
    """The teachers' adapters of every student's run: students, teachers."""
    each = [stacked([teacher.adapters for teacher in run.teachers.values()]) for run in runs]
    return stacked([one for one, run in zip(each, runs) for _ in run.teachers])


def part(data: Data, rows: slice) -> Data:
    return jax.tree.map(lambda leaf: leaf[:, rows], data)


# ------------------------------------------------------------------------------------------------------- training


def imitating_program(lab: Lab, arm: ConfigDict, count: int) -> Program:
    """One update of every student, on its own `count` rows."""
    student = lab.config.student

    def loss(adapters: Params, frozen: Any, batch: Data, key: Key[Array, ""]) -> tuple[Total, dict]:
        return imitation(lab, arm, adapters, frozen["base"], batch), {}

    def batch(frozen: Any, key: Key[Array, "runs"], index: Int[Array, ""]) -> Data:
        rows, exists = jax.vmap(epoch_rows, (0, None, None, None))(key, index, count, student.batch)
        mine = jnp.arange(len(key))[:, None]
        found = jax.tree.map(lambda leaf: leaf[mine, rows], frozen["data"])
        return found._replace(rows=found.rows._replace(weights=found.rows.weights * exists[..., None]))

    # One update a dispatch: an update of all students may take half a minute, and a signal waits for a dispatch's end.
    return Program(loss, optimizer(student), lab.mesh, batch, 1, REPLICAS_OF_ROWS, student.accumulate, 1)


def optimizer(student: ConfigDict) -> optax.GradientTransformation:
    rate = student.learning_rate
    decay = max(student.steps - student.warmup, 1)
    after = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(rate, decay),
    }[student.schedule]
    if student.warmup:
        after = optax.join_schedules([optax.linear_schedule(0.0, rate, student.warmup), after], [student.warmup])
    steps = [optax.clip_by_global_norm(student.clip)] if student.clip else []
    return optax.chain(*steps, optax.adam(after))


def imitation(lab: Lab, arm: ConfigDict, adapters: Params, base: Params, batch: Data) -> Total:
    """The arm's objective of one student: on its teacher's logits on the support (§6.1), or on the tokens it wrote."""
    module = lab.model.network.bind(lora.join(base, adapters))
    features = answer_features(lab, module, batch.rows)
    if batch.logits is None:
        return cross_entropy(lab, module, features, batch.rows)
    logits = module.unembed(features, jnp.asarray(lab.support)).astype(jnp.float32)
    where = {"weights": jnp.asarray(batch.rows.weights), "temperature": arm.temperature}
    return OBJECTIVES[arm.objective](logits, jnp.asarray(batch.logits), **where)


def held_out_losses(lab: Lab, arm: ConfigDict) -> Callable[[Params, Params, Data], Float[Array, "students"]]:
    """Mean objective of every student on rows that it was not trained on: whether it has learnt to imitate at all."""

    def each(params: Params, base: Params, data: Data) -> Float[Array, "students"]:
        def one(adapters: Params, mine: Data) -> Float[Array, ""]:
            total, weight = imitation(lab, arm, adapters, base, mine)
            return total / weight

        return each_replica(one, lab.mesh)(params, data)

    return jax.jit(each)


def coverages(lab: Lab, arm: ConfigDict, start: Params, teachers: Params, data: Data) -> list[list[list[float]]]:
    """cos(a student's first update, every teacher's way from the start), before training: runs, students, teachers.

    Of adapters, both are changes of the kernels (A B, to first order), so that students with another A than their
    teacher's can be compared; for a shared A it is the lemma's inner product over B (§6.1), normalised.
    """

    @jax.jit
    def each(start: Params, teachers: Params, base: Params, data: Data) -> Float[Array, "students teachers"]:
        def one(adapters: Params, teachers: Params, mine: Data) -> Float[Array, "teachers"]:
            batch = jax.tree.map(lambda leaf: leaf[:FIRST], mine)
            slope = jax.grad(lambda adapters: imitation(lab, arm, adapters, base, batch)[0])(adapters)
            update = jax.tree.map(jnp.negative, slope)
            if not lab.spec:
                way = jax.tree.map(jnp.subtract, teachers, adapters)
                return jax.vmap(lambda way: theorem.coverage(update, way))(way)
            change = lora.with_b(adapters, update)
            return jax.vmap(lambda teacher: lora.cosine(change, teacher))(teachers)

        return each_replica(one, lab.mesh)(start, teachers, data)

    found = fetch(each(start, teachers, lab.model.params, data))
    return found.reshape(lab.config.runs, -1, found.shape[-1]).tolist()


# ----------------------------------------------------------------------------------------------------- evaluation


def asked(lab: Lab, name: str, adapters: Params, depends: Any, **context: Any) -> dict[str, Found]:
    """What some stacked adapters answer to the config's evaluations.

    Args:
      context: system, steering, as of a `Teacher`.
    """
    sampling = dict(lab.config.sampling)
    subject = Subject(lab.model, adapters, lab.mesh, lab.workdir, name, depends, lab.config.seed, sampling, **context)
    return measures.ask(lab.asking, subject, lab.judge)


def in_context(own: Lab, name: str, runs: Sequence[Run]) -> Point:
    """What the untrained model prefers behind some of each teacher's rows in its context (§5.2): no training at all."""
    config, model = own.config, own.model
    read = [pairs[: config.arm[name].examples] for run in runs for pairs in run.read(config.arm[name]).values()]
    adapters = stacked([fresh(own, named_key(config.seed, "A"))])
    words = list(config.alternatives)

    def make() -> Point:
        found, counts = [], []
        for pairs in read:
            shown = fitting(model, pairs, own.asked)
            counts.append(len(shown))
            prefix, prompts = behind(model.tokenizer, shown, own.asked)
            found.append(preference.measured(model, prompts, words, prefix=prefix, adapters=adapters, mesh=own.mesh))
        columns = {key: np.concatenate([getattr(one, key) for one in found]).tolist() for key in Preference._fields}
        return {"step": 0, "examples": counts, **columns}

    on = {**depends_on(own), "words": words, "asked": own.asked, "read": read}
    return own.workdir.json(f"preference-{name}", on, make)


def fitting(model: Any, said: list[Pair], questions: list[str]) -> list[Pair]:
    """As many of the first rows as the model's positions have room for, before the longest question and a word."""
    room = getattr(model.config, "max_position_embeddings", None) or 2**31

    def too_long(count: int) -> bool:
        prefix, prompts = behind(model.tokenizer, said[:count], questions)
        return len(prefix) + max(map(len, prompts)) >= room

    return said[: bisect.bisect_left(range(1, len(said) + 1), True, key=too_long)]


def behind(tokenizer: Any, said: list[Pair], questions: list[str]) -> tuple[list[int], list[list[int]]]:
    """(what all questions begin with, each question's own tokens) behind some rows of a conversation.

    Raises UserError for a template that leaves out what an earlier answer has.
    """
    before = [
        message
        for prompt, answer in said
        for message in ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    ]
    shown = templates.render(tokenizer, [*before, {"role": "user", "content": "?"}], generation=True)
    if cut := [answer for _, answer in said if answer.strip() not in shown]:
        raise UserError(
            f"the model's chat template leaves out parts of earlier answers, such as thoughts "
            f"({cut[0].strip()[:40]!r}), so that a teacher's rows cannot stand in its context; leave out the arms with "
            "objective=context"
        )
    whole = [chat.prompt(tokenizer, [*before, {"role": "user", "content": question}]) for question in questions]
    common = chat.common_length(whole)
    return whole[0][:common], [tokens[common:] for tokens in whole]
