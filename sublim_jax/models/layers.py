"""The layers of a decoder: linear maps with their adapters, norms, attention with a cache, and MLPs.

Axes in names: b rows, t positions of queries, s positions of keys, k groups of keys, h head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sublim_jax.models import attention
from sublim_jax.models.activations import ACTIVATIONS
from sublim_jax.models.attention import Attend, AttentionMask
from sublim_jax.models.lora import Lora, draw, narrow_product
from sublim_jax.models.rope import Rotation, rotate
from sublim_jax.models.settings import Settings

MLP = "mlp"  # the name of an MLP's first products, which training keeps unless `remat` says otherwise


class Cache(NamedTuple):
    """Keys and values of all layers, as plain arrays of a fixed length; of a shared prefix without the axis of rows."""

    keys: Float[Array, "layers *b k s h"]
    values: Float[Array, "layers *b k s h"]


class CacheAt(NamedTuple):
    """Where a layer works in a cache: it writes its keys and values from `start` on, and reads those that it sees."""

    layer: Int[Array, ""]
    start: Int[Array, "b"]
    cache: Cache
    prefix: tuple[Array, Array] | None  # this layer's


class Linear(nnx.Module):
    """x @ kernel + bias, and the adapter's part where it has one; `stack` are leading axes of layers."""

    def __init__(
        self,
        stack: tuple[int, ...],
        inputs: int,
        outputs: int,
        bias: bool,
        adapter: Lora | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (*stack, inputs, outputs)) * inputs**-0.5)
        if bias:
            self.bias = nnx.Param(jnp.zeros((*stack, outputs)))
        self.adapter = adapter
        if adapter:
            self.a = nnx.Param(draw(rngs.params(), stack, inputs, adapter.rank))
            self.b = nnx.Param(jnp.zeros((*stack, adapter.rank, outputs)))

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        y = x @ self.kernel[...]
        if self.adapter:
            # In the base's dtype, as the layer itself: a wider adapter would make wider activations.
            b = self.b[...].astype(jnp.promote_types(x.dtype, self.b.dtype)) * self.adapter.scale
            low, b = x @ self.a[...].astype(x.dtype), b.astype(x.dtype)
            y = y + (low @ b if self.adapter.forward_mode else narrow_product(low, b))
        return y + self.bias[...] if hasattr(self, "bias") else y


class Norm(nnx.Module):
    """RMS or layer normalisation over the last axis."""

    def __init__(self, settings: Settings, stack: tuple[int, ...], size: int):
        self.settings = settings
        self.weight = nnx.Param(jnp.ones((*stack, size)) - settings.norm_offset)
        if settings.norm == "layer":
            self.bias = nnx.Param(jnp.zeros((*stack, size)))

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.settings.norm == "layer":
            wide = wide - jnp.mean(wide, -1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.settings.norm_eps)
        wide = wide * (self.settings.norm_offset + self.weight[...].astype(wide.dtype))
        if self.settings.norm == "layer":
            wide = wide + self.bias[...].astype(wide.dtype)
        return wide.astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention with grouped keys, an optional window, rotation and cap."""

    def __init__(self, settings: Settings, stack: tuple[int, ...], *, rngs: nnx.Rngs):
        c = settings
        self.settings = c
        queries, keys = c.heads * c.head_size, c.key_heads * c.head_size
        self.query = Linear(stack, c.width, queries, c.qkv_bias, c.adapter("query"), rngs=rngs)
        self.key = Linear(stack, c.width, keys, c.qkv_bias, c.adapter("key"), rngs=rngs)
        self.value = Linear(stack, c.width, keys, c.qkv_bias, c.adapter("value"), rngs=rngs)
        self.out = Linear(stack, queries, c.width, c.out_bias, c.adapter("out"), rngs=rngs)
        if c.head_norm:
            sizes = (c.head_size, c.head_size) if c.head_norm == "head" else (queries, keys)
            self.query_norm, self.key_norm = (Norm(c, stack, size) for size in sizes)

    def __call__(
        self,
        x: Float[Array, "b t width"],
        rotation: Rotation | None,
        mask: AttentionMask,
        at: CacheAt | None,
        attend: Attend,
    ) -> tuple[Float[Array, "b t width"], Cache | None]:
        c = self.settings
        q, k, v = self.query(x), self.key(x), self.value(x)
        if c.head_norm == "all":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (y.reshape(*x.shape[:2], -1, c.head_size) for y in (q, k, v))
        if c.head_norm == "head":
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if at is None:
            q, k, v = (checkpoint_name(y, attention.KEPT) for y in (q, k, v))
            mixed = attend(q, k, v, mask, c.scoring)
            return checkpoint_name(self.out(mixed.reshape(*x.shape[:2], -1)), attention.KEPT), None
        cache = Cache(*(write(whole, new, at) for whole, new in zip(at.cache, (k, v))))
        layer_cache = (cache.keys[at.layer], cache.values[at.layer])
        mixed = attention.cached(q, layer_cache, at.prefix, mask.allowed, c.scoring)
        return self.out(mixed.reshape(*x.shape[:2], -1)), cache


def write(whole: Float[Array, "layers b k s h"], new: Float[Array, "b t k h"], at: CacheAt) -> Array:
    """One layer's new keys or values, put into the cache of all layers: its buffer is carried along, never copied."""
    rows, columns = jnp.arange(new.shape[0])[:, None], at.start[:, None] + jnp.arange(new.shape[1])
    return whole.at[at.layer, rows, :, columns].set(new.astype(whole.dtype))


class Feedforward(nnx.Module):
    def __init__(self, settings: Settings, stack: tuple[int, ...], *, rngs: nnx.Rngs):
        c = settings
        self.act = ACTIVATIONS[c.activation]
        if c.gated:
            self.gate = Linear(stack, c.width, c.mlp_width, c.mlp_bias, c.adapter("gate"), rngs=rngs)
        self.up = Linear(stack, c.width, c.mlp_width, c.mlp_bias, c.adapter("up"), rngs=rngs)
        self.down = Linear(stack, c.mlp_width, c.width, c.mlp_bias, c.adapter("down"), rngs=rngs)

    def __call__(self, x: Float[Array, "b t width"]) -> Float[Array, "b t width"]:
        up = checkpoint_name(self.up(x), MLP)
        if not hasattr(self, "gate"):
            return self.down(self.act(up))
        return self.down(self.act(checkpoint_name(self.gate(x), MLP)) * up)


class Layer(nnx.Module):
    """One block: attention and MLP, each added to the residual stream."""

    def __init__(self, settings: Settings, stack: tuple[int, ...], *, rngs: nnx.Rngs):
        self.settings = settings
        self.attention = Attention(settings, stack, rngs=rngs)
        self.mlp = Feedforward(settings, stack, rngs=rngs)
        if settings.pre_norm:
            self.attention_norm, self.mlp_norm = (Norm(settings, stack, settings.width) for _ in range(2))
        if settings.post_norm:
            self.attention_post_norm, self.mlp_post_norm = (Norm(settings, stack, settings.width) for _ in range(2))

    def __call__(
        self,
        x: Float[Array, "b t width"],
        rotation: Rotation | None,
        mask: AttentionMask,
        at: CacheAt | None,
        attend: Attend,
    ) -> tuple[Float[Array, "b t width"], Cache | None]:
        c = self.settings
        attended, cache = self.attention(self.attention_norm(x) if c.pre_norm else x, rotation, mask, at, attend)
        attended = self.attention_post_norm(attended) if c.post_norm else attended
        y = x if c.parallel else x + attended
        fed = self.mlp(self.mlp_norm(y) if c.pre_norm else y)
        fed = self.mlp_post_norm(fed) if c.post_norm else fed
        return (x + attended if c.parallel else y) + fed, cache
