"""Random keys of JAX, folded from the config's seed and a name. On the host, numpy's generators are seeded by both."""

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def named_key(seed: int, name: str) -> Key[Array, ""]:
    """The key of one named purpose under a seed; the same on every machine and device count."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return jax.random.fold_in(jax.random.key(seed), word)


def run_keys(seed: int, name: str, runs: Sequence[int]) -> Key[Array, "runs"]:
    """One key a run. A run's key depends only on its own number, not on the number of runs."""
    return jax.vmap(jax.random.fold_in, (None, 0))(named_key(seed, name), jnp.asarray(runs, jnp.uint32))


def fold_all(keys: Key[Array, "*replicas"], data: Int[Array, ""] | int) -> Key[Array, "*replicas"]:
    """`jax.random.fold_in` of one number into every key of an array of keys."""
    fold = jax.random.fold_in
    for _ in range(keys.ndim):
        fold = jax.vmap(fold, (0, None))
    return fold(keys, data)


def fold_elementwise(keys: Key[Array, "*shape"], data: Int[Array, "*shape"]) -> Key[Array, "*shape"]:
    """`jax.random.fold_in` of each key and its own number."""
    fold = jax.random.fold_in
    for _ in range(keys.ndim):
        fold = jax.vmap(fold)
    return fold(keys, data)
