"""Fits an engine to its devices: the layout of the weights, and the number of slots that memory allows."""

import dataclasses
from functools import lru_cache

import jax
from jax.sharding import Mesh

from sublim_jax.chips import CHIPS, memory_of
from sublim_jax.models.decoder import Decoder, decoder
from sublim_jax.models.functional import Functions, Params
from sublim_jax.sampling.engine import Engine, row_weights
from sublim_jax.sharding import abstract, bytes_of, from_first, parameter_shardings

ROOM = 0.7  # of a device's memory, for weights and cache; by default XLA takes 0.75 of it
MAX_ROWS = 512  # of all adapters, on an accelerator
SMALL = 4 << 30  # bytes of a model that a CPU's memory is assumed to hold twice


@lru_cache(maxsize=8)
def _shapes(network: Functions[Decoder]) -> Params:
    """Shapes of a network's parameters, cached: for an unstacked network they take seconds."""
    return jax.eval_shape(network.init, jax.random.key(0))


def weights(engine: Engine) -> Params:
    """Shapes of the weights that an engine decodes with, on its mesh."""
    params = _shapes(engine.network)
    return abstract(params, row_weights(params, engine.mesh), engine.dtype)


def beside(engine: Engine) -> int:
    """Bytes that a device holds of the loaded weights, where decoding uses a copy in another layout."""
    params = _shapes(decoder(engine.settings))
    loaded = abstract(params, parameter_shardings(params, engine.mesh), engine.dtype)
    same = lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim)  # noqa: E731
    copied = jax.tree.map(lambda *args: not same(*args), loaded, row_weights(params, engine.mesh))
    if engine.unstacked:
        copied |= {"layers": jax.tree.map(lambda _: True, loaded["layers"])}
    return bytes_of([leaf for leaf, is_copied in zip(jax.tree.leaves(loaded), jax.tree.leaves(copied)) if is_copied])


def suited(engine: Engine) -> Engine:
    """The engine for its devices: unstacked on GPUs with room for the layers twice, and on CPUs if the model is small.

    There XLA would copy each layer's kernels out of the stack at every step, and on CPUs also its cache; on TPUs it
    does not. The choice depends only on the model and the kind of device, so that the rounding is always the same.
    """
    platform = engine.mesh.devices.flat[0].platform
    other = unstacked_engine(engine)
    if platform == "gpu":
        room = has_room(other, _memory(engine.mesh))
    else:
        room = platform == "cpu" and bytes_of(weights(engine)) < SMALL
    return other if room else engine


def unstacked_engine(engine: Engine) -> Engine:
    """The engine with its layers unstacked."""
    return dataclasses.replace(engine, network=decoder(engine.settings, unstacked=True), unstacked=True)


def fitted(engine: Engine) -> Engine:
    """The engine with the slots that suit its devices: 64 on CPUs, elsewhere as many as there is room for.

    A step of an accelerator takes about as long for a few hundred rows as for a few: it reads all weights in any case.
    The number depends on the kind of device, the model, and the longest text and the adapters of the call.
    """
    device = engine.mesh.devices.flat[0]
    return engine.with_slots(64 if device.platform == "cpu" else chosen_slots(engine, _memory(engine.mesh)))


def chosen_slots(engine: Engine, memory: int | None) -> int:
    """The largest number of slots for which there is room on an accelerator of `memory` bytes."""
    counts = (count for count in (256, 128, 64, 32, 16) if count * engine.adapters <= MAX_ROWS)
    return next((count for count in counts if has_room(engine.with_slots(count), memory)), 8)


def _memory(mesh: Mesh) -> int | None:
    """Memory of a device in bytes, the same on all processes, which must choose the same programs."""
    device = mesh.devices.flat[0]
    if device.device_kind in CHIPS:
        return memory_of(device)
    return from_first(lambda: memory_of(device))  # only its own process can query it


def has_room(engine: Engine, memory: int | None) -> bool:
    """Whether the weights, in both layouts, and the cache fit on a device; True where its memory is not known."""
    return memory is None or bytes_of(weights(engine)) + beside(engine) + engine.cache_bytes < ROOM * memory
