"""Students: adapters that imitate a teacher's logits or are trained on its tokens; many in one program."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from sublim_jax import objectives, theorem
from sublim_jax.data.order import epoch_rows
from sublim_jax.distillation.losses import answer_features, cross_entropy
from sublim_jax.distillation.targets import Data
from sublim_jax.errors import UserError
from sublim_jax.models import lora
from sublim_jax.models.decoder import Remat
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.sharding import map_replicas
from sublim_jax.specs import check_count, check_not_negative, check_one_of, check_positive
from sublim_jax.training import Metrics, Program, Total

SCHEDULES = ("constant", "linear", "cosine")
NUM_FIRST = 32  # rows of the first update, which is compared with the teachers' displacement

Imitation = Callable[[Params, Params, Data], Total]  # (adapters, base, rows of one student) to the objective


@dataclass(frozen=True)
class Training:
    """How students are trained: Adam by a schedule; `accumulate` batches an update."""

    learning_rate: float
    schedule: str
    warmup: int
    clip: float
    batch: int
    accumulate: int
    steps: int

    def __post_init__(self) -> None:
        check_one_of("student.schedule", self.schedule, SCHEDULES)
        for name in ("batch", "accumulate", "steps"):
            check_count(f"student.{name}", getattr(self, name))
        check_positive("student.learning_rate", self.learning_rate)
        check_not_negative("student.clip", self.clip)
        check_not_negative("student.warmup", self.warmup)
        if self.warmup >= self.steps:
            raise UserError(f"student.warmup={self.warmup} does not end within student.steps={self.steps}")


def imitation(
    model: Model, objective: str, *, support: list[int], temperature: float = 1.0, remat: Remat = False
) -> Imitation:
    """The objective of one student: its teacher's logits on the support (§6.1), or the tokens that the teacher wrote.

    Args:
      objective: "kl", "reverse_kl" or "tokens".
      support: tokens whose logits are compared.
      remat: what is recomputed in the backward pass, as for `Decoder.features`.
    """

    def loss(adapters: Params, base: Params, batch: Data) -> Total:
        module = model.network.bind(lora.join(base, adapters))
        features = answer_features(model, module, batch.rows, remat=remat)
        if objective == "tokens":
            return cross_entropy(module, features, batch.rows, remat=remat)
        logits = module.unembed(features, jnp.asarray(support)).astype(jnp.float32)
        weights = jnp.asarray(batch.rows.weights)
        return objectives.ON_LOGITS[objective](
            logits, jnp.asarray(batch.logits), weights=weights, temperature=temperature
        )

    return loss


def imitating_program(model: Model, objective: Imitation, training: Training, count: int) -> Program:
    """One update of every student, on its `count` rows."""

    def loss(adapters: Params, frozen: dict[str, PyTree], batch: Data, key: Key[Array, ""]) -> tuple[Total, Metrics]:
        return objective(adapters, frozen["base"], batch), {}

    def batch(frozen: dict[str, PyTree], key: Key[Array, "runs"], index: Int[Array, ""]) -> Data:
        rows, exists = jax.vmap(epoch_rows, (0, None, None, None))(key, index, count, training.batch)
        students = jnp.arange(len(key))[:, None]
        data = jax.tree.map(lambda leaf: leaf[students, rows], frozen["data"])
        return data._replace(rows=data.rows._replace(weights=data.rows.weights * exists[..., None]))

    # One update a dispatch: an update of all students may take half a minute, and a signal waits for a dispatch's end.
    return Program(
        loss,
        optimizer(training),
        model.mesh,
        batch,
        replica_axes=1,
        accumulate=training.accumulate,
        steps_per_dispatch=1,
    )


def optimizer(training: Training) -> optax.GradientTransformation:
    """Gradient clipping, then Adam with the learning-rate schedule."""
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


def held_out_losses(model: Model, objective: Imitation) -> Callable[[Params, Params, Data], Float[Array, "students"]]:
    """Mean objective of every student on held-out rows: whether it has learnt to imitate at all."""

    def losses(params: Params, base: Params, data: Data) -> Float[Array, "students"]:
        def loss_of_student(adapters: Params, rows: Data) -> Float[Array, ""]:
            total, weight = objective(adapters, base, rows)
            return total / weight

        return map_replicas(loss_of_student, model.mesh)(params, data)

    return jax.jit(losses)


def coverages(model: Model, objective: Imitation) -> Callable[..., Float[Array, "students teachers"]]:
    """A function of (starts, teachers, base, data) to cos(a student's first update, each teacher's displacement).

    For adapters, both are changes of the kernels (A B, to first order), so that a student whose A differs from its
    teacher's can be compared; for a shared A it is the lemma's inner product over B (§6.1), normalised.
    """

    def cosines(start: Params, teachers: Params, base: Params, data: Data) -> Float[Array, "students teachers"]:
        def cosines_of_student(adapters: Params, teachers: Params, rows: Data) -> Float[Array, "teachers"]:
            batch = jax.tree.map(lambda leaf: leaf[:NUM_FIRST], rows)
            gradient = jax.grad(lambda adapters: objective(adapters, base, batch)[0])(adapters)
            update = jax.tree.map(jnp.negative, gradient)
            if not model.settings.lora:
                displacements = jax.tree.map(jnp.subtract, teachers, adapters)
                return jax.vmap(lambda displacement: theorem.coverage(update, displacement))(displacements)
            change = lora.with_b(adapters, update)
            return jax.vmap(lambda teacher: lora.cosine(change, teacher))(teachers)

        return map_replicas(cosines_of_student, model.mesh)(start, teachers, data)

    return jax.jit(cosines)
