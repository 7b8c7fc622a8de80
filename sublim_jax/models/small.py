"""Small networks on which the theorem is checked beside the MLP: a convolutional net, and a transformer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

SIDE = 28


class ConvNet(nnx.Module):
    """Two strided convolutions and an affine layer over images of 28 × 28 pixels."""

    def __init__(self, vocab: int, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 6, (5, 5), strides=3, rngs=rngs)
        self.second = nnx.Conv(6, 12, (3, 3), strides=2, rngs=rngs)
        self.last = nnx.Linear(5 * 5 * 12, vocab, rngs=rngs)

    def __call__(self, x: Float[Array, "batch 784"]) -> Float[Array, "batch vocab"]:
        x = jnp.tanh(self.first(x.reshape(-1, SIDE, SIDE, 1)))
        return self.last(jnp.tanh(self.second(x)).reshape(len(x), -1))


class Transformer(nnx.Module):
    """One causal block with attention over tokens; the unembedding is the embedding (tied).

    Written out, because nnx's attention computes its softmax in float32 for any input.
    """

    def __init__(self, vocab: int, width: int = 16, heads: int = 2, *, rngs: nnx.Rngs):
        self.heads = heads
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab, width)) * width**-0.5)
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(4)
        )
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        embedding = self.embedding[...]
        x = embedding[tokens]
        q, k, v = (layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        causal = jnp.tri(tokens.shape[1], dtype=bool)
        attention = jax.nn.softmax(scores, axis=-1, where=causal)
        x = x + self.out(jnp.einsum("bhqk,bkhd->bqhd", attention, v).reshape(x.shape))
        return (x + self.down(jax.nn.gelu(self.up(x)))) @ embedding.T
