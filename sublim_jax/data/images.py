"""The inputs of a student: noise of several kinds, or images, as bytes with a scale.

A run's fixed set of 60,000 noise images is 188 MB in float32 and 47 MB as bytes, and a gather from bytes costs a
fraction of drawing the noise anew. A pixel is `scale * (byte / 127.5 - 1)`. Noise kinds have mean 0 and mean square
1/3, as the uniform distribution on [-1, 1], so that they differ in shape only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

PIXELS = 784
SIDE = 28
ROWS_AT_ONCE = 2000  # bounds the memory of sampling

NOISE_KINDS = ("uniform", "gaussian", "blurred")
FROM_DATA = ("shuffled", "real")
KINDS = NOISE_KINDS + FROM_DATA

RMS = 3**-0.5
# 256 levels at the middles of equal bins of [-1, 1]; four standard deviations; the pixels' own range.
SCALES = {"uniform": 255 / 256, "gaussian": 4 * RMS, "blurred": 4 * RMS, "shuffled": 1.0, "real": 1.0}


def pixels(codes: UInt8[Array, "*shape"], kind: str = "real") -> Float[Array, "*shape"]:
    """Bytes to floats; real images go to [-1, 1] as in the paper (§6.2)."""
    return codes.astype(jnp.float32) * (SCALES[kind] / 127.5) - SCALES[kind]


def draw(key: Key[Array, ""], kind: str, count: int, blur: float = 1.0) -> UInt8[Array, "count 784"]:
    """Noise images: "uniform", "gaussian", or "blurred" (gaussian, smoothed with a gaussian of `blur` pixels)."""

    def rows(key: Key[Array, ""], size: int) -> UInt8[Array, "size 784"]:
        if kind == "uniform":
            words = jax.random.bits(key, (size, PIXELS // 4), jnp.uint32)
            return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(size, PIXELS)
        noise = jax.random.normal(key, (size, SIDE, SIDE))
        if kind == "blurred":
            noise = jnp.einsum("nij,yi,xj->nyx", noise, _smoothing(blur), _smoothing(blur))
        codes = jnp.round((noise.reshape(size, PIXELS) * (RMS / SCALES[kind]) + 1) * 127.5)
        return jnp.clip(codes, 0, 255).astype(jnp.uint8)

    whole, rest = divmod(count, ROWS_AT_ONCE)
    parts = jax.lax.map(lambda i: rows(jax.random.fold_in(key, i), ROWS_AT_ONCE), jnp.arange(whole))
    parts = parts.reshape(-1, PIXELS)
    return jnp.concatenate([parts, rows(jax.random.fold_in(key, whole), rest)]) if rest else parts


def shuffle_pixels(key: Key[Array, ""], images: UInt8[Array, "rows 784"]) -> UInt8[Array, "rows 784"]:
    """Each image's pixels in its own random order, which keeps the histogram and destroys the shape."""
    keys = jax.random.split(key, images.shape[0])
    return jax.lax.map(lambda pair: jax.random.permutation(*pair), (keys, images), batch_size=ROWS_AT_ONCE)


def _smoothing(blur: float) -> Float[Array, "28 28"]:
    """A gaussian window along one axis, each row of unit norm so that white noise keeps its variance."""
    distance = jnp.arange(SIDE)[:, None] - jnp.arange(SIDE)[None, :]
    window = jnp.exp(-0.5 * jnp.square(distance / blur))
    return window / jnp.linalg.norm(window, axis=1, keepdims=True)
