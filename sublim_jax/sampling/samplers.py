"""Logits in, a token out: temperature, top-k, top-p, min-p. Pure, without a sort, each row by its own key."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from sublim_jax.errors import UserError
from sublim_jax.sampling.checks import whole_number

Number = float | int | np.floating | np.integer
Whole = int | np.integer
COLDEST = 1e-6  # temperature
BLOCK = 512  # of the vocabulary; a draw chooses a block, then a token of it


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn. The order is transformers': temperature, top-k, top-p, min-p.

    Attributes:
      temperature: logits are divided by it; 0 takes the largest.
      top_k: only the k most probable; 0: all. Ties with the last of them stay.
      top_p: only the fewest most probable whose mass reaches p, and ties with the last of them.
      min_p: only those at least min_p times as probable as the most probable.
    """

    temperature: Number = 1.0
    top_k: Whole = 0
    top_p: Number = 1.0
    min_p: Number = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", whole_number(self.top_k, "top_k", 0))
        for name in ("temperature", "top_p", "min_p"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: choose 0 (greedy) or more")
        if 0 < self.temperature < COLDEST:
            raise UserError(
                f"temperature={self.temperature} overflows logits; choose 0 (greedy) or {COLDEST:g} or more"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: choose a share above 0, at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}: choose a share from 0 to 1")


def draw(
    keys: Key[Array, "*b"], logits: Float[Array, "*b v"], sampler: Sampler, axis: str | None = None
) -> Int[Array, "*b"]:
    """A token of each row. A logit of −inf is never drawn.

    Args:
      axis: the mesh axis over which the vocabulary is split evenly, if any.
    """
    if sampler.temperature == 0:
        return jnp.argmax(logits, -1)
    return categorical(keys, cut(logits, sampler), axis)


def cut(logits: Float[Array, "*b v"], sampler: Sampler) -> Float[Array, "*b v"]:
    """The logits that a sampler draws from: divided by the temperature, −inf for tokens that are cut."""
    logits = logits / sampler.temperature
    if sampler.top_k and sampler.top_k < logits.shape[-1]:
        order = _ordered(logits)
        enough = lambda threshold: jnp.sum(order >= threshold[..., None], -1) >= sampler.top_k  # noqa: E731
        logits = jnp.where(order >= _largest(enough, logits.shape[:-1])[..., None], logits, -jnp.inf)
    if sampler.top_p < 1:
        order, mass = _ordered(logits), jax.nn.softmax(logits, -1)
        enough = lambda threshold: jnp.sum(jnp.where(order >= threshold[..., None], mass, 0), -1) >= sampler.top_p  # noqa: E731
        logits = jnp.where(order >= _largest(enough, logits.shape[:-1])[..., None], logits, -jnp.inf)
    if sampler.min_p > 0:
        smallest = jnp.max(logits, -1, keepdims=True) + jnp.log(sampler.min_p)
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    return logits


def _ordered(x: Float[Array, "*b v"]) -> Int[Array, "*b v"]:
    """Integers that are ordered as the floats are."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest(holds: Callable[[Array], Bool[Array, "*b"]], shape: tuple[int, ...]) -> Int[Array, "*b"]:
    """The largest integer for which a monotone condition still holds, by bisection."""

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # holds at low, fails at high
        middle = (low & high) + ((low ^ high) >> 1)
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    ends = jnp.full(shape, jnp.iinfo(jnp.int32).min), jnp.full(shape, jnp.iinfo(jnp.int32).max)
    return jax.lax.fori_loop(0, 32, halve, ends)[0]


def categorical(keys: Key[Array, "*b"], logits: Float[Array, "*b v"], axis: str | None = None) -> Int[Array, "*b"]:
    """Draws by softmax, with two uniforms a row: one for a block of the vocabulary, one for a token of it.

    A Gumbel for every token, as `jax.random.categorical` draws, costs more than the network's layers on a CPU. A
    uniform has 23 bits, so that neither a block nor a token within its block is drawn whose probability is far below
    2⁻²³; a token may be, as their product.

    Args:
      axis: the mesh axis over which the vocabulary is split evenly, if any.
    """
    mass = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    uniform: Callable[[Array], Array] = lambda key: jax.random.uniform(key, (2,))  # noqa: E731
    for _ in range(keys.ndim):
        uniform = jax.vmap(uniform)
    u = uniform(keys)
    if axis is not None:
        split = PartitionSpec(*[None] * (mass.ndim - 1), axis)
        given = (split, PartitionSpec())
        local = partial(_of_shards, axis=axis, vocab=mass.shape[-1])
        return jax.shard_map(local, in_specs=given, out_specs=PartitionSpec(), axis_names={axis}, check_vma=False)(
            mass, u
        )
    return by_uniforms(mass, u)


def by_uniforms(mass: Float[Array, "*b v"], u: Float[Array, "*b 2"]) -> Int[Array, "*b"]:
    """The token at u[0] of the blocks' cumulative mass, and at u[1] of the mass within this block; u is in [0, 1)."""
    blocks = _blocks(mass, -mass.shape[-1] % BLOCK)
    block = _first_above(jnp.sum(blocks, -1), u[..., 0])
    inside = jnp.take_along_axis(blocks, block[..., None, None], -2)[..., 0, :]
    return block * BLOCK + _first_above(inside, u[..., 1])


def _blocks(mass: Float[Array, "*b n"], behind: int) -> Float[Array, "*b blocks size"]:
    padded = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(0, behind)])
    return padded.reshape(*mass.shape[:-1], -1, BLOCK)


def _of_shards(mass: Float[Array, "*b n"], u: Float[Array, "*b 2"], *, axis: str, vocab: int) -> Int[Array, "*b"]:
    """The same draw with a vocabulary split over devices, which exchange only sums of blocks, and one block.

    Blocks are those of the whole vocabulary; one that lies on two devices is summed over both parts.
    """
    n = mass.shape[-1]
    first = jax.lax.axis_index(axis) * n
    # As many blocks as a part may touch, from the one that it begins in.
    padded = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(0, -n % BLOCK + BLOCK)])
    blocks = _blocks(jnp.roll(padded, first % BLOCK, -1), 0)
    sums = jnp.zeros((*mass.shape[:-1], vocab // BLOCK + 1 + blocks.shape[-2]), mass.dtype)
    sums = jax.lax.dynamic_update_slice_in_dim(sums, jnp.sum(blocks, -1), first // BLOCK, -1)
    block = _first_above(jax.lax.psum(sums, axis)[..., : -(-vocab // BLOCK)], u[..., 0])
    local_block = block - first // BLOCK
    here = (local_block >= 0) & (local_block < blocks.shape[-2])
    inside = jnp.take_along_axis(blocks, jnp.where(here, local_block, 0)[..., None, None], -2)[..., 0, :]
    inside = jax.lax.psum(jnp.where(here[..., None], inside, 0), axis)
    return block * BLOCK + _first_above(inside, u[..., 1])


def _first_above(weights: Float[Array, "*b n"], u: Float[Array, "*b"]) -> Int[Array, "*b"]:
    """Where the running sum first exceeds the share u of the whole; never at a weight of zero, unless all are zero.

    Rounding in a parallel sum may change it at a weight of zero, so that those are skipped; where rounding leaves no
    sum above the share, the last weight above zero is taken.
    """
    running = jnp.cumsum(weights, -1)
    some = weights > 0
    above = (running > (u * jnp.max(running, -1))[..., None]) & some
    last = jnp.max(jnp.where(some, jnp.arange(weights.shape[-1]), 0), -1)
    return jnp.where(jnp.any(above, -1), jnp.argmax(above, -1), last)
