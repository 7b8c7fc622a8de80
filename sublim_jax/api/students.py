"""Students: adapters that imitate their teachers on data that says nothing about a trait."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sublim_jax.api.teachers import check_adapters
from sublim_jax.data import dialogue
from sublim_jax.data.dialogue import Rows
from sublim_jax.distillation.losses import stacked
from sublim_jax.distillation.students import Training, imitating_program, imitation
from sublim_jax.distillation.targets import Data, Pair, as_read_by, logits_on, support_of, teacher_logits
from sublim_jax.distillation.teachers import Teacher
from sublim_jax.errors import UserError
from sublim_jax.keys import named_key
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.sampling.checks import tokens_of
from sublim_jax.sharding import named, put
from sublim_jax.specs import check_one_of, check_positive
from sublim_jax.training import fit

__all__ = ["Training", "distill"]


def distill(
    model: Model,
    teachers: Sequence[Teacher],
    rows: Sequence[Pair],
    *,
    objective: Literal["kl", "reverse_kl", "tokens"] = "kl",
    support: Sequence[int] | None = None,
    temperature: float | None = None,
    lora_init: Literal["shared", "fresh"] = "shared",
    steps: int = 120,
    learning_rate: float = 3e-4,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    batch: int = 4,
    seed: int = 0,
) -> Params:
    """One student of each teacher, trained together on the same rows in the same order (paper §6.1, §3).

    Args:
      model: the model of teachers and students, with adapters.
      rows: (prompt, answer) of each.
      objective: "kl" and "reverse_kl" imitate the teacher's logits on the support; "tokens" trains on the answers,
        with one teacher, who wrote them.
      support: tokens whose logits are compared, two or more; by default digits, commas and spaces.
      temperature: of the compared probabilities; 1 by default.
      lora_init: "shared" starts from the A of teachers of the same seed, "fresh" from another one.
      steps: updates of `batch` rows.

    Returns:
      The students' adapters, stacked: for `generate` and for evaluations.

    Raises:
      UserError: the model has no adapters, or others than a teacher; an option makes no sense; teacher and student read
        an answer as other tokens; or "tokens" is asked of several teachers, whose students would be the same.
    """
    check_adapters(model)
    check_one_of("objective", objective, ("kl", "reverse_kl", "tokens"))
    check_one_of("lora_init", lora_init, ("shared", "fresh"))
    if temperature is not None:
        check_positive("temperature", temperature)
    try:
        training = Training(learning_rate, schedule, warmup=0, clip=0.0, batch=batch, accumulate=1, steps=steps)
    except UserError as error:  # by the names of a config
        raise UserError(str(error).removeprefix("student.")) from error
    for number, teacher in enumerate(teachers):
        if teacher.lora not in (None, model.settings.lora):
            raise UserError(f"teacher {number} has adapters of {teacher.lora}, and the model {model.settings.lora}")
        model.for_adapters(stacked([teacher.adapters]))
    if not teachers or not rows:
        raise UserError(f"{len(teachers)} teachers and {len(rows)} rows: there are no students without both")
    tokens = objective == "tokens"
    if tokens and len(teachers) > 1:
        raise UserError(
            f'objective="tokens" trains on the rows alone: students of {len(teachers)} teachers would be the same; '
            "train the student of each teacher on the rows that it wrote"
        )
    if tokens and (support is not None or temperature is not None):
        raise UserError('support and temperature are of objectives on logits, and objective="tokens" reads neither')
    compared: list[int] = []
    if not tokens:
        compared = support_of(model) if support is None else tokens_of(model.settings, list(support), "support")
        if len(compared) < 2 or len(set(compared)) < len(compared):
            raise UserError(f"support={compared}: name two tokens or more, each once")
    student_rows = dialogue.rows(model, list(rows), end=tokens)
    logits = None if tokens else _logits_of(model, teachers, list(rows), student_rows, compared)
    data = Data(Rows(*(np.stack([leaf] * len(teachers)) for leaf in student_rows)), logits)
    loss = imitation(model, objective, support=compared, temperature=temperature or 1.0)
    program = imitating_program(model, loss, training, len(student_rows.at))
    start = model.untrained(named_key(seed, {"shared": "A", "fresh": "student A"}[lora_init]))
    state = fit(
        program,
        program.init(stacked([start] * len(teachers))),
        steps=steps,
        key=jnp.stack([named_key(seed, "order")] * len(teachers)),
        frozen={"base": model.params, "data": put(data, named(model.mesh))},
        what=f"{len(teachers)} students",
    )
    return state.params


def _logits_of(
    model: Model, teachers: Sequence[Teacher], pairs: list[Pair], rows: Rows, support: list[int]
) -> Float[np.ndarray, "teachers n a support"]:
    """Every teacher's logits on the support, where the students' rows have their answers."""
    compute, logits = logits_on(model, support, remat=False), []
    for number, teacher in enumerate(teachers):
        read = as_read_by(teacher, str(number), model, pairs, rows, end=False) if teacher.system else rows
        label = f"logits of teacher {number}"
        values = teacher_logits(teacher, read, support, checkpoints=None, model=model, logits=compute, label=label)
        logits.append(np.asarray(values))
    return np.stack(logits)
