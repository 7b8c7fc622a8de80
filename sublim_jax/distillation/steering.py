"""Steering: what a system prompt adds to the residual stream, as a hook."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sublim_jax.data import chat
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model

MULTIPLE = 64  # lengths of texts are rounded up to it

Residual: TypeAlias = Callable[[Int[np.ndarray, "t"], int], Float[Array, "width"]]


def hook(model: Model, layer: int, vector: Float[np.ndarray, "width"]) -> Steering:
    """Steering that adds a vector after one layer."""
    add = np.zeros((model.settings.layers, model.settings.width), np.float32)
    add[layer] = vector
    return Steering(add=jnp.asarray(add))


def residual_after(model: Model, layer: int, seed: int) -> Residual:
    """A function of (tokens, position of the last one) to the residual stream there, after a layer."""
    params = lora.join(model.params, model.untrained(named_key(seed, "A")))

    @jax.jit
    def residual(params: Params, tokens: Int[Array, "1 t"], last: Int[Array, "1"]) -> Float[Array, "width"]:
        module = model.network.bind(params)
        residuals = module.features(tokens, read=last, lengths=last + 1, **model.placement).residuals
        assert residuals is not None  # `read` requests them
        return residuals[layer, 0, 0].astype(jnp.float32)

    return lambda tokens, last: residual(params, jnp.asarray(tokens[None]), jnp.asarray([last]))


def mean_residual(model: Model, read: Residual, questions: list[str], system: str) -> Float[np.ndarray, "width"]:
    """The residual at the last token of questions after a system prompt, mean over questions."""
    total = np.zeros(model.settings.width)
    for question in questions:
        text = chat.question(model.tokenizer, question, system)
        tokens = np.zeros(-(-len(text) // MULTIPLE) * MULTIPLE, np.int32)
        tokens[: len(text)] = text
        total += np.asarray(read(tokens, len(text) - 1))
    return total / len(questions)
