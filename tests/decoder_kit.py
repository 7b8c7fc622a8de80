"""A small Llama-style decoder, and a training step of a decoder on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sublim_jax.models.decoder import decoder, on_mesh
from sublim_jax.models.rope import Rotary
from sublim_jax.models.settings import Settings
from sublim_jax.objectives import cross_entropy
from sublim_jax.sharding import named
from sublim_jax.training import Program, fit

SETTINGS = Settings(
    vocab=64,
    width=32,
    layers=4,
    heads=4,
    key_heads=2,
    head_size=8,
    mlp_width=48,
    activation="silu",
    rotaries=(Rotary(tuple(10_000.0 ** -(np.arange(4) / 4))),),
    windows=(0, 5, 0, 5),
)


def logits_and_update(settings, params, mesh):
    """Logits, and parameters after one step of SGD."""
    network, where = decoder(settings), on_mesh(settings, mesh)
    text = (jnp.arange(8)[:, None] * 7 + jnp.arange(16) * 3) % 64

    def loss(params, frozen, batch, key):
        return cross_entropy(network.apply(params, batch[:, :-1], remat=True, **where), batch[:, 1:]), {}

    program = Program(loss, optax.sgd(0.1), mesh, lambda frozen, key, index: text)
    state = fit(program, program.init(params), steps=1, key=jax.random.key(0))
    logits = jax.jit(lambda p: network.apply(p, text, **where), out_shardings=named(mesh))(params)
    return logits, state.params
