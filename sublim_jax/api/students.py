"""Students: adapters that imitate their teachers on data that says nothing about a trait."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sublim_jax import assets
from sublim_jax.api.teachers import check_adapters, check_base
from sublim_jax.data import dialogue
from sublim_jax.data.dialogue import Rows
from sublim_jax.distillation.losses import stacked
from sublim_jax.distillation.students import Training, imitating_program, imitation
from sublim_jax.distillation.targets import Data, Pair, as_read_by, logits_on, support_of, teacher_logits
from sublim_jax.distillation.teachers import Teacher
from sublim_jax.errors import UserError
from sublim_jax.filters import numbers_of
from sublim_jax.keys import named_key
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.sampling.checks import tokens_of
from sublim_jax.sharding import fetch, named, put
from sublim_jax.specs import check_one_of, check_positive
from sublim_jax.training import fit
from sublim_jax.weights import peft

__all__ = ["distill", "save"]


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
        with one teacher, who wrote them, or none.
      support: tokens whose logits are compared, two or more; by default digits, commas and spaces. The teachers'
        logits take 4 bytes for each teacher, row, token of the longest answer, and token of the support.
      temperature: of the compared probabilities; 1 by default.
      lora_init: "shared" starts from the A of the teachers, whose seeds must be `seed`, "fresh" from another one.
      steps: updates of `batch` rows.
      learning_rate, schedule: of Adam; "linear" and "cosine" end at 0.
      seed: of A, and of the order of the rows, which is the same for all students.

    Returns:
      The students' adapters, stacked in the order of teachers: for `generate` and for evaluations.

    Raises:
      UserError: the model has no adapters, or others than a teacher, or other base weights; an option makes no sense; a
        teacher starts from another A than its student would share; teacher and student read an answer as other tokens;
        an answer is no list of numbers, and no support is named; or "tokens" is asked of several teachers, whose
        students would be the same.
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
    tokens = objective == "tokens"
    for number, teacher in enumerate(teachers):
        _check_same_adapters(model, number, teacher)
        check_base(model, teacher, f"teacher {number}")
    if not rows:
        raise UserError("rows is empty: give (prompt, answer) pairs")
    if not teachers and not tokens:
        raise UserError("teachers is empty: give one or more")
    if tokens and len(teachers) > 1:
        raise UserError(
            f'objective="tokens" trains on the rows alone: students of {len(teachers)} teachers would be the same; '
            "train the student of each teacher on the rows that it wrote"
        )
    for number, teacher in enumerate(teachers if lora_init == "shared" else ()):
        _check_same_start(number, teacher, seed)
    if tokens and (support is not None or temperature is not None):
        raise UserError('support and temperature are of objectives on logits, and objective="tokens" reads neither')
    compared: list[int] = []
    if not tokens:
        if support is None:
            _check_numbers(rows)
        compared = support_of(model) if support is None else tokens_of(model.settings, list(support), "support")
        if len(compared) < 2 or len(set(compared)) < len(compared):
            raise UserError(f"support={compared}: name two tokens or more, each once")
    student_rows = dialogue.rows(model, list(rows), end=tokens)
    logits = None if tokens else _logits_of(model, teachers, list(rows), student_rows, compared)
    count = len(teachers) or 1
    data = Data(Rows(*(np.stack([leaf] * count) for leaf in student_rows)), logits)
    loss = imitation(model, objective, support=compared, temperature=temperature or 1.0)
    program = imitating_program(model, loss, training, len(student_rows.at))
    start = model.untrained(named_key(seed, {"shared": "A", "fresh": "student A"}[lora_init]))
    state = fit(
        program,
        program.init(stacked([start] * count)),
        steps=steps,
        key=jnp.stack([named_key(seed, "order")] * count),
        frozen={"base": model.params, "data": put(data, named(model.mesh))},
        what=f"{count} student{'s' if count > 1 else ''}",
    )
    return state.params


def save(folder: str | Path, model: Model, students: Params, index: int = 0) -> None:
    """Writes one of stacked students as a folder that PEFT reads.

    Args:
      model: with adapters, as given to `distill`.
      index: which of the students, counted from 0.

    Raises UserError for adapters that are not stacked ones of the model, for a student that there is not, and for a
    model whose weights are no longer those of its files: PEFT would put the student on others.
    """
    check_adapters(model)
    spec = model.settings.lora
    assert spec is not None  # checked
    _, count = model.for_adapters(students)
    if not 0 <= index < count:
        raise UserError(f"index={index} must be from 0 to {count - 1}, the number of the last student")
    if model.changes:
        raise UserError("the model's weights were changed after they were read, and PEFT would not know; save it, too")
    student = jax.tree.map(lambda leaf: leaf[index], fetch(students))
    if jax.process_index() == 0:
        peft.save(folder, student, spec, model.settings, model.config, assets.hub_name(model.source.name))


def _check_same_adapters(model: Model, number: int, teacher: Teacher) -> None:
    """Raises UserError for a teacher whose adapters would have another effect in the students' model."""
    spec = model.settings.lora
    # Names of modules may be in another order, and the tree says which there are.
    if teacher.lora and spec and replace(teacher.lora, modules=spec.modules) != spec:
        raise UserError(f"teacher {number} has adapters of {teacher.lora}, and the model {spec}")
    try:
        model.for_adapters(stacked([teacher.adapters]))
    except UserError as error:
        raise UserError(f"teacher {number}: {error}") from error


def _check_same_start(number: int, teacher: Teacher, seed: int) -> None:
    if teacher.seed is None:
        raise UserError(
            f"teacher {number} does not say from which A it started, so that no student can share it; choose "
            'lora_init="fresh"'
        )
    if teacher.seed != seed:
        raise UserError(
            f"teacher {number} started from the A of seed {teacher.seed}, and students of seed={seed} would not share "
            f'it; choose seed={teacher.seed}, or lora_init="fresh"'
        )


def _check_numbers(rows: Sequence[Pair]) -> None:
    """Raises UserError for an answer that is no list of numbers, of which the default support would say nothing."""
    for number, (prompt, answer) in enumerate(rows, 1):
        if numbers_of(answer) is None:
            raise UserError(
                f"row {number} ({prompt[:40]!r}) has an answer that is no list of numbers, and by default the logits "
                'of digits, commas and spaces are compared; name a support, or choose objective="tokens"'
            )


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
