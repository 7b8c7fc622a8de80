"""Many LoRA students of one base, trained one after another and all in one program."""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from sublim_jax import objectives
from sublim_jax.models import lora
from sublim_jax.models.decoder import decoder, on_mesh
from sublim_jax.models.functional import Params
from sublim_jax.models.settings import Settings
from sublim_jax.sharding import one_device
from sublim_jax.training import Metrics, Program, Total

SPEC = lora.Lora(8, 8)
SUPPORT = jnp.arange(40)  # as many tokens as SmolLM2 has of digits, commas and spaces
STUDENTS, ROWS, LENGTH, ANSWER = 8, 4, 128, 64


def programs(settings: Settings, mesh: Mesh, *, remat: bool = False) -> tuple[Program, Program]:
    """An update of one student, and of all on the replica axis: KL on the support, on the last half of each row."""
    network = decoder(dataclasses.replace(settings, lora=SPEC))
    placement = on_mesh(settings, mesh)

    def loss(params: Params, frozen: Params, batch: Array, key: Key[Array, ""]) -> tuple[Total, Metrics]:
        module = network.bind(lora.join(frozen, params))
        features = module.features(batch[:, :-1], remat=remat, **placement)
        logits = module.unembed(features.output[:, -ANSWER:], SUPPORT)
        return objectives.kl(logits.astype(jnp.float32), jnp.zeros(logits.shape)), {}

    def rows(key: Key[Array, ""], index: Array) -> Array:
        return jax.random.randint(jax.random.fold_in(key, index), (ROWS, LENGTH + 1), 0, 40_000)

    alone = Program(loss, optax.adam(2e-4), mesh, lambda frozen, key, index: rows(key, index))
    together = dataclasses.replace(
        alone,
        batch=lambda frozen, key, index: jax.vmap(rows, (0, None))(key, index),
        replica_axes=1,
    )
    return alone, together


def in_turn_and_at_once(settings: Settings, base: Params) -> tuple[float, float]:
    """Seconds an update of all students takes, either way."""

    def seconds(program: Program, params: Params, key: Key[Array, "..."]) -> float:
        state, times = program.init(params), []
        for step in range(4):
            began = time.perf_counter()
            state, history = program.dispatch(state, base, None, key, jnp.int32(step + 1))
            jax.block_until_ready(history)
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    adapters = lora.init(jax.random.key(0), base, SPEC)
    alone, together = programs(settings, one_device())
    keys = jax.random.split(jax.random.key(0), STUDENTS)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * STUDENTS), adapters)
    return STUDENTS * seconds(alone, adapters, keys[0]), seconds(together, stacked, keys)
