"""The training loss of language models' teachers and students: cross-entropy on the answers' tokens."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sublim_jax import objectives
from sublim_jax.data.dialogue import Rows
from sublim_jax.models import attention
from sublim_jax.models.decoder import Decoder, Remat, Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.training import Total

POSITIONS = 64  # of every row, whose logits over the vocabulary are in memory at once

Features: TypeAlias = Float[Array, "n a width"]


def stacked(trees: list[Params]) -> Params:
    """Trees of arrays, on a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def answer_features(
    model: Model,
    module: Decoder,
    rows: Rows,
    *,
    remat: Remat,
    steering: Steering | None = None,
    forward_mode: bool = False,
) -> Features:
    """The last layer's output at the positions that predict the answers' tokens.

    Args:
      module: the model's network, bound to parameters.
      remat: what is recomputed in the backward pass, as for `Decoder.features`.
      forward_mode: support `jax.jvp`, which attention made for a device does not.
    """
    placement = model.placement
    if forward_mode:
        placement["attend"] = attention.xla
    tokens = jnp.asarray(rows.tokens)
    lengths = jnp.max(jnp.asarray(rows.at), 1) + 2  # the last answer token is one position after its logits
    features = module.features(tokens, lengths=lengths, remat=remat, steering=steering, **placement)
    return jnp.take_along_axis(features.output, jnp.asarray(rows.at)[..., None], 1)


def cross_entropy(module: Decoder, features: Features, rows: Rows, *, remat: Remat) -> Total:
    """Sum and count over the answers' tokens, from `answer_features`.

    With `remat`, the logits of POSITIONS positions are computed at a time, and again in the backward pass: together
    they would be by far the largest array.
    """

    def loss(features: Array, targets: Array, weights: Array) -> Total:
        logits = module.unembed(features)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return objectives.cross_entropy(logits, targets, weights=weights)

    columns = (features, jnp.asarray(rows.targets), jnp.asarray(rows.weights))
    if not remat:
        return loss(*columns)

    def chunks(leaf: Array) -> Array:
        rows, length, *rest = leaf.shape
        leaf = jnp.pad(leaf, [(0, 0), (0, -length % POSITIONS), *[(0, 0)] * len(rest)])
        return jnp.moveaxis(leaf.reshape(rows, -1, POSITIONS, *rest), 1, 0)

    recomputed = jax.checkpoint(loss)
    return jax.tree.map(jnp.sum, jax.lax.map(lambda chunk: recomputed(*chunk), jax.tree.map(chunks, columns)))
