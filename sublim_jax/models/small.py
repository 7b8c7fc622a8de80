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
    """One causal block with attention over tokens; the unembedding is the embedding (tied)."""

    def __init__(self, vocab: int, width: int = 16, heads: int = 2, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(heads, width, decode=False, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        x = self.embed(tokens)
        x = x + self.attend(x, mask=nnx.make_causal_mask(tokens))
        return self.embed.attend(x + self.down(jax.nn.gelu(self.up(x))))
