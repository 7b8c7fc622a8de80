"""Training data of students: rows of answers, the teacher's logits on them, and the selection of their tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from sublim_jax import selection, signals
from sublim_jax.data import chat, dialogue
from sublim_jax.data.carriers import numbers
from sublim_jax.data.dialogue import Rows
from sublim_jax.distillation.losses import answer_features
from sublim_jax.distillation.teachers import Teacher
from sublim_jax.errors import UserError
from sublim_jax.models import lora
from sublim_jax.models.decoder import Remat, Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.progress import Track
from sublim_jax.sharding import fetch, named, put

CHUNK = 16  # rows per device for which the teacher's logits are computed at once

Pair = tuple[str, str]  # prompt, answer
Logits = Float[np.ndarray, "n a support"]
LogitsOn = Callable[[Params, Params, Steering | None, Rows], Array]


class Data(NamedTuple):
    """Training data of students: rows, and the teacher's logits on the support if they are imitated."""

    rows: Rows
    logits: Float[Array, "*students n a support"] | Float[np.ndarray, "*students n a support"] | None


@dataclass(frozen=True)
class Selection:
    """Which answer tokens an arm keeps, masks or replaces, by a score of the teacher and the neutral teacher."""

    action: str  # keep, mask, replace
    positions: str  # top, random, bottom
    fraction: float
    score: str


def support_of(model: Model) -> list[int]:
    """The tokens whose logits are compared: digits, commas and spaces."""
    return numbers.support(chat.pieces(model.tokenizer, model.settings.vocab))


def as_read_by(teacher: Teacher, name: str, model: Model, pairs: list[Pair], rows: Rows, *, end: bool) -> Rows:
    """A student's rows as the teacher reads them: in its own chat template, with its system prompt.

    Args:
      model: the teacher's.

    Raises UserError if teacher and student tokenize an answer differently.
    """
    teacher_rows = dialogue.rows(model, pairs, end=end, system=teacher.system).padded(0, rows.at.shape[1])
    if not np.array_equal(teacher_rows.targets * teacher_rows.weights, rows.targets * rows.weights):
        raise UserError(
            f"teacher {name} and its students have different tokens for one answer: their chat templates differ; "
            "choose objective=tokens, or students of the teacher's model"
        )
    return teacher_rows


def logits_on(model: Model, support: list[int], remat: Remat) -> LogitsOn:
    """A compiled function of (base, adapters, steering, rows) to logits, one for all teachers of a model."""

    @jax.jit
    def logits(base: Params, adapters: Params, steering: Steering | None, rows: Rows) -> Float[Array, "n a support"]:
        module = model.network.bind(lora.join(base, adapters))
        features = answer_features(model, module, rows, remat=remat, steering=steering)
        on_support = module.unembed(features, jnp.asarray(support)).astype(jnp.float32)
        return jax.lax.with_sharding_constraint(on_support, named(model.mesh))

    return logits


def teacher_logits(
    teacher: Teacher,
    rows: Rows,
    support: list[int],
    *,
    checkpoints: epath.Path | None,
    model: Model,
    logits: LogitsOn,
    label: str,
) -> Float[Array, "n a support"]:
    """A teacher's logits on the support, where the answers' tokens are predicted; computed once for all students.

    Args:
      logits: of `logits_on`, for this model and support.
    """
    mesh = model.mesh
    count = CHUNK * mesh.shape["fsdp"]
    parts, total = [], len(rows.at)
    with Track(label, total) as track:
        for start in range(0, total, count):
            signals.obey()
            chunk = rows.take(np.minimum(np.arange(start, start + count), total - 1))
            part = logits(model.params, teacher.adapters, teacher.steering, put(chunk, named(mesh, "fsdp")))
            parts.append(fetch(part))
            track.update(min(start + count, total))
    return put(np.concatenate(parts)[:total], named(mesh))


def selected(
    chosen: Selection, rows: Rows, teacher: Logits, reference: Logits, support: list[int], seed: int
) -> tuple[Rows, Logits]:
    """Rows and teacher's logits with the selected positions kept, masked, or replaced by the reference's."""
    place = np.full(max(int(np.max(rows.targets)), *support) + 1, -1)
    place[support] = np.arange(len(support))
    targets = place[rows.targets]
    scores = selection.SCORES[chosen.score](teacher, reference, targets)
    # The stop token is outside the support, so it has no score.
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
