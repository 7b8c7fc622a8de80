"""What students of an arm read: rows of answers, and the teacher's logits on them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from sublim_jax import selection
from sublim_jax.data import chat, dialogue
from sublim_jax.data.carriers import numbers
from sublim_jax.data.dialogue import Rows
from sublim_jax.errors import UserError
from sublim_jax.experiments.transmission.carriers import Pair, Written, random_pairs, shuffled
from sublim_jax.experiments.transmission.losses import answer_features
from sublim_jax.experiments.transmission.spec import NEUTRAL, Arm, Selection, Study, TokenArm, TrainedArm
from sublim_jax.experiments.transmission.teachers import Teacher
from sublim_jax.models import lora
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.progress import Track
from sublim_jax.sharding import fetch, named, put
from sublim_jax.store import Store

CHUNK = 16  # rows whose teacher's logits are computed together, for each device

Logits = Float[np.ndarray, "n a support"]


class Replicate(NamedTuple):
    """One run's teachers, and what they wrote, once an arm needs it."""

    run: int
    teachers: dict[str, Teacher]
    written: dict[str, Written]


class Data(NamedTuple):
    """What students read: rows, and the teacher's logits on the support where they are imitated."""

    rows: Rows
    logits: Float[Array, "*students n a support"] | Float[np.ndarray, "*students n a support"] | None


def support_of(model: Model) -> list[int]:
    """The tokens whose logits are compared: digits, commas and spaces."""
    return numbers.support(chat.pieces(model.tokenizer, model.settings.vocab))


def pairs_of(study: Study, arm: Arm, replicate: Replicate) -> dict[str, list[Pair]]:
    """What each teacher's student reads."""
    seed = study.replicate_seed(replicate.run)
    if arm.data == "random":
        return dict.fromkeys(study.teachers, random_pairs(study, seed))
    pairs = {name: one.pairs for name, one in replicate.written.items()}
    return {name: shuffled(some, arm.shuffle, seed) for name, some in pairs.items()} if arm.shuffle else pairs


def arm_data(
    study: Study, arm: TrainedArm, replicates: Sequence[Replicate], teachers: Model, students: Model, store: Store
) -> Data:
    """The rows of all students of an arm, replicate by replicate and teacher by teacher.

    Args:
      teachers, students: the models of either.
    """
    each = [(one, name, pairs) for one in replicates for name, pairs in pairs_of(study, arm, one).items()]
    tokens = isinstance(arm, TokenArm)
    rows = [dialogue.rows(students, pairs, end=tokens) for _, _, pairs in each]
    length, longest = max(some.tokens.shape[1] for some in rows), max(some.at.shape[1] for some in rows)
    rows = [some.padded(length, longest) for some in rows]
    if tokens and not arm.selection:
        return Data(Rows(*(np.stack(leaves) for leaves in zip(*rows))), None)
    support = support_of(teachers)

    def logits_of(one: Replicate, name: str, pairs: list[Pair], some: Rows) -> Logits:
        teacher, label = one.teachers[name], f"run {one.run}, logits of teacher {name}"
        read = as_read_by(teacher, name, teachers, pairs, some, end=tokens)
        like = put(np.zeros((*some.at.shape, len(support)), np.float32), named(teachers.mesh))
        inputs = (teacher, read, support)
        how = {"model": teachers, "remat": study.remat, "label": label}
        return fetch(store.tree(f"logits-{name}", teacher_logits, *inputs, like=like, **how))

    logits = [logits_of(one, name, pairs, some) for (one, name, pairs), some in zip(each, rows)]
    if arm.selection:
        for index, (one, _, pairs) in enumerate(each):
            reference = logits_of(one, NEUTRAL, pairs, rows[index])
            seed = study.replicate_seed(one.run)
            rows[index], logits[index] = selected(arm.selection, rows[index], logits[index], reference, support, seed)
    return Data(Rows(*(np.stack(leaves) for leaves in zip(*rows))), None if tokens else np.stack(logits))


def as_read_by(teacher: Teacher, name: str, model: Model, pairs: list[Pair], rows: Rows, *, end: bool) -> Rows:
    """A student's rows behind the teacher's own system prompt.

    Raises UserError where teacher and student read an answer as other tokens.
    """
    if not teacher.system:
        return rows
    mine = dialogue.rows(model, pairs, end=end, system=teacher.system).padded(0, rows.at.shape[1])
    if not np.array_equal(mine.targets * mine.weights, rows.targets * rows.weights):
        raise UserError(
            f"teacher {name} and its students have different tokens for one answer: their chat templates differ; "
            "choose objective=tokens, or students of the teacher's model"
        )
    return mine


def teacher_logits(
    teacher: Teacher,
    rows: Rows,
    support: list[int],
    *,
    checkpoints: epath.Path,
    model: Model,
    remat: bool,
    label: str,
) -> Float[Array, "n a support"]:
    """A teacher's logits on the support where the answers' tokens are predicted: computed once, shared by students."""
    mesh = model.mesh
    count = CHUNK * mesh.shape["fsdp"]

    @jax.jit
    def logits(base: Params, adapters: Params, steering: Steering | None, rows: Rows) -> Float[Array, "n a support"]:
        module = model.network.bind(lora.join(base, adapters))
        features = answer_features(model, module, rows, remat=remat, steering=steering)
        found = module.unembed(features, jnp.asarray(support)).astype(jnp.float32)
        return jax.lax.with_sharding_constraint(found, named(mesh))

    parts, total = [], len(rows.at)
    with Track(label, total) as track:
        for start in range(0, total, count):
            chunk = rows.take(np.minimum(np.arange(start, start + count), total - 1))
            part = logits(model.params, teacher.adapters, teacher.steering, put(chunk, named(mesh, "fsdp")))
            parts.append(fetch(part))
            track.update(min(start + count, total))
    return put(np.concatenate(parts)[:total], named(mesh))


def selected(
    chosen: Selection, rows: Rows, teacher: Logits, reference: Logits, support: list[int], seed: int
) -> tuple[Rows, Logits]:
    """Rows and teacher's logits with some positions kept, masked, or answered by the reference instead."""
    place = np.full(max(int(np.max(rows.targets)), *support) + 1, -1)
    place[support] = np.arange(len(support))
    targets = place[rows.targets]
    scores = selection.SCORES[chosen.score](teacher, reference, targets)
    # Of the token that ends an answer, which is outside the support, these logits say nothing.
    known = np.asarray(rows.weights) * (targets >= 0)
    picked = selection.select(scores, known, chosen.positions, chosen.fraction, seed)
    if chosen.action == "replace":
        best = np.asarray(support, np.int32)[reference.argmax(-1)]
        targets = np.where(picked, best, rows.targets)
        return rows._replace(targets=targets), np.where(picked[..., None], reference, teacher)
    left = picked if chosen.action == "keep" else ~picked
    return rows._replace(weights=rows.weights * left), teacher


def part(data: Data, rows: slice) -> Data:
    """Some rows of every student."""
    return jax.tree.map(lambda leaf: leaf[:, rows], data)
