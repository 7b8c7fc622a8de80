"""Training data of an arm's students: rows of answers, and the teacher's logits on them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sublim_jax.data import dialogue
from sublim_jax.data.dialogue import Rows
from sublim_jax.distillation.targets import (
    Data,
    Logits,
    Pair,
    as_read_by,
    logits_on,
    selected,
    support_of,
    teacher_logits,
)
from sublim_jax.distillation.teachers import Teacher
from sublim_jax.experiments.transmission.arms import Arm, TokenArm, TrainedArm
from sublim_jax.experiments.transmission.carriers import Written, random_pairs, shuffled
from sublim_jax.experiments.transmission.spec import NEUTRAL, Study
from sublim_jax.models.language import Model
from sublim_jax.sharding import fetch, named, put
from sublim_jax.store import Store


class Replicate(NamedTuple):
    """A run's teachers and their completions, which are empty until an arm needs them."""

    run: int
    teachers: dict[str, Teacher]
    written: dict[str, Written]


def pairs_of(study: Study, arm: Arm, replicate: Replicate) -> dict[str, list[Pair]]:
    """(prompt, answer) pairs for each teacher's student."""
    seed = study.replicate_seed(replicate.run)
    if arm.data == "random":
        return dict.fromkeys(study.teachers, random_pairs(study, seed))
    unfiltered = arm.data == "unfiltered"
    pairs = {name: written.unfiltered if unfiltered else written.pairs for name, written in replicate.written.items()}
    return {name: shuffled(some, arm.shuffle, seed) for name, some in pairs.items()} if arm.shuffle else pairs


def arm_data(
    study: Study, arm: TrainedArm, replicates: Sequence[Replicate], teachers: Model, students: Model, store: Store
) -> Data:
    """The rows of all students of an arm, replicate by replicate and teacher by teacher.

    Args:
      teachers, students: their models.
    """
    student_inputs = [
        (replicate, name, pairs) for replicate in replicates for name, pairs in pairs_of(study, arm, replicate).items()
    ]
    tokens = isinstance(arm, TokenArm)
    rows = [dialogue.rows(students, pairs, end=tokens) for _, _, pairs in student_inputs]
    length, longest = max(some.tokens.shape[1] for some in rows), max(some.at.shape[1] for some in rows)
    rows = [some.padded(length, longest) for some in rows]
    if tokens and not arm.selection:
        return Data(Rows(*(np.stack(leaves) for leaves in zip(*rows))), None)
    support = support_of(teachers)
    compute = logits_on(teachers, support, study.recomputed)
    same_template = students.tokenizer.chat_template == teachers.tokenizer.chat_template

    def logits_of(replicate: Replicate, name: str, pairs: list[Pair], some: Rows) -> Logits:
        teacher, label = replicate.teachers[name], f"run {replicate.run}, logits of teacher {name}"
        read = some
        if teacher.system or not same_template:
            read = as_read_by(teacher, name, teachers, pairs, some, end=tokens)
        like = put(np.zeros((*some.at.shape, len(support)), np.float32), named(teachers.mesh))
        inputs = (teacher, read, support)
        how = {"model": teachers, "logits": compute, "label": label}
        return fetch(store.tree(f"logits-{name}", teacher_logits, *inputs, like=like, **how))

    logits = [logits_of(replicate, name, pairs, some) for (replicate, name, pairs), some in zip(student_inputs, rows)]
    if arm.selection:
        for index, (replicate, _, pairs) in enumerate(student_inputs):
            reference = logits_of(replicate, NEUTRAL, pairs, rows[index])
            seed = study.replicate_seed(replicate.run)
            rows[index], logits[index] = selected(arm.selection, rows[index], logits[index], reference, support, seed)
    return Data(Rows(*(np.stack(leaves) for leaves in zip(*rows))), None if tokens else np.stack(logits))
