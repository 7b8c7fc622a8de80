"""The order in which rows are read: a new permutation every epoch, as a pure function of the position."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, UInt32

ROUNDS = 48


def shuffled(key: Key[Array, ""], position: Int[Array, "*rows"], size: int) -> Int[Array, "*rows"]:
    """Where a pseudo-random permutation of range(size) takes each position.

    The swap-or-not shuffle (Hoang, Morris, Rogaway 2012): each round pairs every index with its mirror image about a
    random point and swaps the pair or not by a hash. Nothing is sorted or stored, so a batch may start anywhere.
    """
    keys = jax.random.bits(key, (ROUNDS, 2), jnp.uint32)
    index = position.astype(jnp.uint32)
    size_ = jnp.uint32(size)

    def swap(round: Int[Array, ""], index: UInt32[Array, "*rows"]) -> UInt32[Array, "*rows"]:
        mirrored = (keys[round, 0] % size_ + size_ - index) % size_
        pair = jnp.maximum(index, mirrored)
        return jnp.where(_hash(pair ^ keys[round, 1]) & 1 == 1, mirrored, index)

    return jax.lax.fori_loop(0, ROUNDS, swap, index).astype(jnp.int32)


def _hash(x: UInt32[Array, "*rows"]) -> UInt32[Array, "*rows"]:
    """The finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def steps_per_epoch(size: int, batch: int) -> int:
    """Batches an epoch, the last one short."""
    return -(-size // batch)


def epoch_rows(
    key: Key[Array, ""], index: Int[Array, ""], size: int, batch: int
) -> tuple[Int[Array, "batch"], Bool[Array, "batch"]]:
    """The rows of batch number `index`, and which of them exist: the last batch of an epoch is filled up."""
    steps = steps_per_epoch(size, batch)
    position = index % steps * batch + jnp.arange(batch)
    exists = position < size
    order = jax.random.fold_in(key, index // steps)
    return shuffled(order, jnp.where(exists, position, 0), size), exists
