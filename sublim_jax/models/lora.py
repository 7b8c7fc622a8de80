"""Low-rank adapters: W + scale · A B for every matrix of a network."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from sublim_jax.models.functional import Params


def init(key: Key[Array, ""], params: Params, rank: int) -> Params:
    """Adapters {"a": N(0, 1/inputs), "b": 0} in the place of every two-dimensional kernel, and nothing elsewhere."""

    def make(path: jax.tree_util.KeyPath, leaf: Array) -> Params | None:
        if path[-1].key != "kernel" or leaf.ndim != 2:
            return None
        inputs, outputs = leaf.shape
        leaf_key = jax.random.fold_in(key, len(keys))
        keys.append(path)
        a = jax.random.normal(leaf_key, (inputs, rank), leaf.dtype) * inputs**-0.5
        return {"a": a, "b": jnp.zeros((rank, outputs), leaf.dtype)}

    keys: list[jax.tree_util.KeyPath] = []
    return jax.tree_util.tree_map_with_path(make, params)


def merge(params: Params, adapters: Params, scale: float) -> Params:
    """The network's parameters with its adapters added in."""

    def add(leaf: Array, adapter: Params | None) -> Array:
        return leaf if adapter is None else leaf + scale * (adapter["a"] @ adapter["b"])

    return jax.tree.map(add, params, adapters)
