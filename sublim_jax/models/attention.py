"""Implementations of attention: plain XLA, one for CPUs, cuDNN on GPUs, a flash kernel on TPUs.

All compute the same function; `on(mesh)` chooses. `cached` is for decoding with a cache. Axes as in `decoder`.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

KEPT = "attention"  # the name of activations of attention that `remat="mlp"` of a decoder keeps
NEVER = -0.7 * float(np.finfo(np.float32).max)  # score of a masked key; finite, so that fully masked rows give no nan
# From this length on TPUs use the flash kernel. It saves the (heads, t, s) scores, which begin to matter here.
FLASH_LENGTH = 1024


class Scoring(NamedTuple):
    """How a family scores keys."""

    scale: float  # of queries times keys
    cap: float  # cap · tanh(score / cap); 0: none
    windows: tuple[int, ...]  # the windows of its layers


class AttentionMask(NamedTuple):
    """Which keys the queries of a layer see."""

    allowed: Bool[Array, "b t s"]  # the whole mask
    window: Int[Array, ""]  # what it is made of: the sliding window (0: none),
    segments: Int[Array, "b t"] | None  # and the number of the text at each position


Attend = Callable[[Array, Array, Array, AttentionMask, Scoring], Float[Array, "b t heads h"]]


def xla(
    q: Float[Array, "b t heads h"],
    k: Float[Array, "b s groups h"],
    v: Float[Array, "b s groups h"],
    mask: AttentionMask,
    scoring: Scoring,
) -> Float[Array, "b t heads h"]:
    """All scores at once, softmax in float32 or wider. Heads of a group share its keys."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=wide)
    weights = jax.nn.softmax(_masked(scores, mask.allowed[:, None, None], scoring), -1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def cpu(
    q: Float[Array, "b t heads h"],
    k: Float[Array, "b s groups h"],
    v: Float[Array, "b s groups h"],
    mask: AttentionMask,
    scoring: Scoring,
) -> Float[Array, "b t heads h"]:
    """As `xla`, without `jax.jvp`. The backward pass computes the scores again, as FlashAttention does.

    It computes them with keys as rows, so that no array of their size is kept or copied into another order. A LoRA step
    of SmolLM2 takes 0.93 of the time.
    """
    b, t, groups = *q.shape[:2], k.shape[2]
    rows = jnp.moveaxis(q.reshape(b, t, groups, -1, q.shape[-1]), 1, 3)
    keys, values = (jnp.moveaxis(x, 1, 2) for x in (k, v))
    mixed = _by_groups(rows.reshape(b, groups, -1, q.shape[-1]), keys, values, mask.allowed, scoring)
    return jnp.moveaxis(mixed.reshape(rows.shape), 3, 1).reshape(q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_groups(
    q: Float[Array, "b k gt h"],
    keys: Float[Array, "b k s h"],
    values: Float[Array, "b k s h"],
    allowed: Bool[Array, "b t s"],
    scoring: Scoring,
) -> Float[Array, "b k gt h"]:
    return _by_groups_forward(q, keys, values, allowed, scoring)[0]


def _by_groups_forward(
    q: Array, keys: Array, values: Array, allowed: Array, scoring: Scoring
) -> tuple[Array, tuple[Array, ...]]:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkqh,bksh->bkqs", q, keys, preferred_element_type=wide)
    scores = _masked(scores, _of_queries(allowed, q), scoring)
    largest = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, -1, keepdims=True)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weights.astype(values.dtype), values, preferred_element_type=wide) / total
    mixed, largest, total = (checkpoint_name(x, KEPT) for x in (mixed, largest, total))
    return mixed.astype(q.dtype), (q, keys, values, allowed, mixed, largest, total)


def _by_groups_backward(scoring: Scoring, kept: tuple[Array, ...], d_mixed: Array) -> tuple[Array, Array, Array, None]:
    q, keys, values, allowed, mixed, largest, total = kept
    largest, total = (jnp.swapaxes(x, -1, -2) for x in (largest, total))
    seen = jnp.swapaxes(_of_queries(allowed, q), -1, -2)
    scores = jnp.einsum("bksh,bkqh->bksq", keys, q, preferred_element_type=mixed.dtype)
    scores, d_masked = jax.vjp(lambda scores: _masked(scores, seen, scoring), scores)
    weights = jnp.exp(scores - largest) / total
    d_weights = jnp.einsum("bksh,bkqh->bksq", values, d_mixed, preferred_element_type=mixed.dtype)
    mean = jnp.sum(d_mixed * mixed, -1)[:, :, None]  # of d_weights, by the weights
    (d_scores,) = d_masked(weights * (d_weights - mean))
    d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
    d_q = jnp.einsum("bkhs,bksq->bkhq", jnp.swapaxes(keys, -1, -2), d_scores)
    d_keys = jnp.einsum("bksq,bkqh->bksh", d_scores, q)
    return jnp.swapaxes(d_q, -1, -2), d_keys, jnp.einsum("bksq,bkqh->bksh", weights, d_mixed), None


_by_groups.defvjp(_by_groups_forward, _by_groups_backward)


def _of_queries(allowed: Bool[Array, "b t s"], q: Float[Array, "b k gt h"]) -> Bool[Array, "b 1 gt s"]:
    """The mask of the queries of all heads of a group, head by head."""
    return jnp.tile(allowed, (1, q.shape[2] // allowed.shape[1], 1))[:, None]


def cached(
    q: Float[Array, "b t heads h"],
    cache: tuple[Array, Array],
    prefix: tuple[Array, Array] | None,
    allowed: Bool[Array, "b t s"],
    scoring: Scoring,
) -> Float[Array, "b t heads h"]:
    """Attention to each row's cached keys and values (b, groups, s, h), and to a prefix (groups, p, h) of all rows.

    The two are computed separately, each relative to its own largest score, and combined at the end.

    Args:
      allowed: over the prefix's keys first, then the cached ones.
    """
    grouped = q.reshape(*q.shape[:2], cache[0].shape[1], -1, q.shape[-1])
    before = allowed.shape[-1] - cache[0].shape[2]
    largest, total, mixed = _to_cache(grouped, *cache, allowed[..., before:], scoring)
    if prefix is not None:
        front = _to_prefix(grouped, *prefix, allowed[..., :before], scoring)
        both = jnp.maximum(largest, front.largest)
        scale, front_scale = jnp.exp(largest - both), jnp.exp(front.largest - both)
        total = scale * total + front_scale * front.total
        mixed = scale * mixed + front_scale * front.mixed
    return (mixed / total).reshape(q.shape).astype(q.dtype)


class _Part(NamedTuple):
    """Unnormalised attention to some keys, relative to the largest score; `total` is the sum of the weights."""

    largest: Float[Array, "b t k g 1"]
    total: Float[Array, "b t k g 1"]
    mixed: Float[Array, "b t k g h"]


def _to_cache(q: Float[Array, "b t k g h"], keys: Array, values: Array, allowed: Array, scoring: Scoring) -> _Part:
    wide = jnp.promote_types(q.dtype, jnp.float32)
    one_query = q.shape[1] == 1  # written as sums, which XLA fuses with reading the cache
    if one_query:
        scores = jnp.sum(q[:, 0, :, :, None].astype(wide) * keys[:, :, None].astype(wide), -1)[:, :, :, None]
    else:
        scores = jnp.einsum("btkgh,bksh->bkgts", q, keys, preferred_element_type=wide)
    scores = _masked(scores, allowed[:, None, None], scoring)
    largest = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - largest)
    if one_query:
        mixed = jnp.sum(weights[:, :, :, 0, :, None] * values[:, :, None].astype(wide), -2)[:, :, :, None]
    else:
        mixed = jnp.einsum("bkgts,bksh->bkgth", weights.astype(values.dtype), values, preferred_element_type=wide)
    parts = (largest, jnp.sum(weights, -1, keepdims=True), mixed)
    return _Part(*(jnp.moveaxis(part, 3, 1) for part in parts))


def _to_prefix(q: Float[Array, "b t k g h"], keys: Array, values: Array, allowed: Array, scoring: Scoring) -> _Part:
    """All rows' queries in one product."""
    b, t, k, g, h = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    rows = jnp.moveaxis(q, 2, 0).reshape(k, b * t * g, h)
    scores = jnp.einsum("krh,kph->krp", rows, keys, preferred_element_type=wide)
    allowed = jnp.broadcast_to(allowed[:, :, None], (b, t, g, allowed.shape[-1])).reshape(1, b * t * g, -1)
    scores = _masked(scores, allowed, scoring)
    largest = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - largest)
    mixed = jnp.einsum("krp,kph->krh", weights.astype(values.dtype), values, preferred_element_type=wide)
    parts = (largest, jnp.sum(weights, -1, keepdims=True), mixed)
    return _Part(*(jnp.moveaxis(part.reshape(k, b, t, g, -1), 0, 2) for part in parts))


def _masked(scores: Array, allowed: Array, scoring: Scoring) -> Array:
    scores = scores * scoring.scale
    if scoring.cap:
        scores = scoring.cap * jnp.tanh(scores / scoring.cap)
    return jnp.where(allowed, scores, NEVER)


def cudnn(q: Array, k: Array, v: Array, mask: AttentionMask, scoring: Scoring) -> Float[Array, "b t heads h"]:
    """cuDNN's fused attention where it supports the arguments; else `xla`, with a warning that says why."""
    t, s, head_size = q.shape[1], k.shape[1], q.shape[-1]
    if t == 1:
        return xla(q, k, v, mask, scoring)  # one query a row has nothing to fuse
    reasons = {
        "scores are capped": scoring.cap,
        f"numbers are {q.dtype}": q.dtype not in (jnp.bfloat16, jnp.float16),
        f"heads have {head_size} entries": head_size > _widest_heads() or head_size % 8,
        f"{t} queries and {s} keys are not both even": t % 2 or s % 2,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is None:
        allowed = mask.allowed[:, None]
        try:
            return jax.nn.dot_product_attention(q, k, v, mask=allowed, scale=scoring.scale, implementation="cudnn")
        except RuntimeError as error:  # not installed, as where steps are compiled for a GPU that is not attached
            reason = str(error)
    warnings.warn(f"attention without cuDNN: {reason}", stacklevel=2)
    return xla(q, k, v, mask, scoring)


def _widest_heads() -> int:
    """The largest head size that cuDNN supports on these GPUs: larger since Hopper."""
    capabilities = [getattr(device, "compute_capability", "0.0") for device in jax.devices()]
    return 256 if min(tuple(map(int, capability.split("."))) for capability in capabilities) >= (9, 0) else 128


def flash(mesh: Mesh, interpret: bool = False, shortest: int = FLASH_LENGTH) -> Attend:
    """JAX's flash kernel for TPUs, each device on its own rows and heads; `xla` for short texts.

    Args:
      interpret: run the kernel step by step on a CPU, for tests.
      shortest: the length from which on the kernel is used.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and for TPUs alone

    def attend(q: Array, k: Array, v: Array, mask: AttentionMask, scoring: Scoring) -> Float[Array, "b t heads h"]:
        b, t, heads, head_size = q.shape
        fits = t >= shortest and t % 128 == 0 and head_size % 64 == 0 and b % mesh.shape["fsdp"] == 0
        if not fits:
            return xla(q, k, v, mask, scoring)
        segments = jnp.ones((b, t), jnp.int32) if mask.segments is None else mask.segments
        heads_here = heads // mesh.shape["tensor"]
        block = next(size for size in (512, 384, 256, 128) if t % size == 0)

        def local(window: int, q: Array, k: Array, v: Array, segments: Array) -> Array:
            causal = splash.LocalMask((t, t), (window - 1 if window else None, 0), 0)
            kernel = splash.make_splash_mha(
                splash.MultiHeadMask([causal] * heads_here),
                head_shards=1,
                q_seq_shards=1,
                block_sizes=splash.BlockSizes(block, block, *[block] * 6),  # type: ignore[arg-type]
                attn_logits_soft_cap=scoring.cap or None,
                interpret=interpret,
            )
            return jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s)))(q, k, v, segments)

        rows_of_heads = PartitionSpec("fsdp", "tensor")
        kinds = sorted(set(scoring.windows)) or [0]
        kernels = [
            jax.shard_map(
                partial(local, window),
                mesh=mesh,
                in_specs=(rows_of_heads,) * 3 + (PartitionSpec("fsdp"),),
                out_specs=rows_of_heads,
                check_vma=False,
            )
            for window in kinds
        ]
        q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(scoring.scale, q.dtype), k, v))
        which = jnp.argmax(jnp.asarray(kinds) == mask.window)
        mixed = jax.lax.switch(which, kernels, q, k, v, segments) if len(kinds) > 1 else kernels[0](q, k, v, segments)
        return mixed.swapaxes(1, 2)

    return attend


def on(mesh: Mesh) -> Attend:
    """The attention for a mesh's devices."""
    platform = mesh.devices.flat[0].platform
    if platform == "tpu":
        return flash(mesh)
    return cudnn if platform == "gpu" else cpu
