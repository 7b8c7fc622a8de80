"""Rotary positions: tables from transformers' `rope_parameters`, and the rotation of queries and keys by them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sublim_jax.errors import UserError


@dataclass(frozen=True)
class Rotary:
    """One table of rotary frequencies, in radians a position, for the first 2 × len(frequencies) of a head.

    All zero where a layer does not rotate. `scale` multiplies cosines and sines (yarn, longrope). Texts of more than
    `until` positions (0: no limit) use other frequencies: `beyond` (longrope), or, where that is empty, those of a base
    that `growth` scales with the text's length (dynamic).
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    until: int = 0
    beyond: tuple[float, ...] = ()
    growth: float = 1.0


class Rotation(NamedTuple):
    cos: Float[Array, "*rows half"]
    sin: Float[Array, "*rows half"]


def rotations(
    tables: tuple[Rotary, ...], positions: Int[Array, "b t"], lengths: Int[Array, "b #t"] | None
) -> Rotation | None:
    """Cosines and sines of every table, stacked; None where nothing rotates.

    Args:
      lengths: of the text that each position belongs to; needed only where a table depends on it.
    """
    if not tables:
        return None
    wide = jnp.promote_types(jnp.float32, jnp.result_type(float))
    angles = jnp.stack([positions[..., None] * _frequencies(table, lengths, wide) for table in tables])
    scales = jnp.asarray([table.scale for table in tables], wide)[:, None, None, None]
    return Rotation(jnp.cos(angles) * scales, jnp.sin(angles) * scales)


def _frequencies(table: Rotary, lengths: Int[Array, "b #t"] | None, dtype: DTypeLike) -> Float[Array, "*rows half"]:
    frequencies = jnp.asarray(table.frequencies, dtype)
    if not table.until or lengths is None:
        return frequencies
    if table.beyond:
        return jnp.where((lengths > table.until)[..., None], jnp.asarray(table.beyond, dtype), frequencies)
    stretch = table.growth * jnp.maximum(lengths, table.until).astype(dtype) / table.until - (table.growth - 1)
    half = len(table.frequencies)
    return frequencies * stretch[..., None] ** jnp.asarray(-np.arange(half) / (half - 1), dtype)


def rotate(x: Float[Array, "b t heads h"], rotation: Rotation | None) -> Float[Array, "b t heads h"]:
    """Rotates the pairs (i, i + half) of the first 2 × half entries of every head."""
    if rotation is None:
        return x
    cos, sin = rotation.cos[:, :, None], rotation.sin[:, :, None]
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)


# ------------------------------------------------------------------------------------------------------- tables

Parameters = Mapping[str, Any]


class Shape(NamedTuple):
    """What a table depends on besides its own parameters."""

    head_size: int
    positions: int  # max_position_embeddings
    partial: bool  # whether the family can rotate a part of each head
    truncate: bool = True  # of yarn: whether the ends of its ramp are whole numbers


def rotary(parameters: Parameters, shape: Shape) -> Rotary:
    """The table of `rope_parameters`, in transformers' terms.

    Raises UserError for a kind or a key that is not known, and where the values give no frequencies.
    """
    kind = parameters.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"rope_type={kind!r} is not known; known: {', '.join(KINDS)}")
    for name, value in parameters.items():
        if name not in KEYS and value not in (None, False):
            raise UserError(f"rope_parameters has {name}={value!r}, which is not supported")
    share = parameters.get("partial_rotary_factor")
    share = 1.0 if share is None else share
    if kind == "default" and not shape.partial:
        share = 1.0  # transformers' default table of these families does not read it; the others do
    if kind != "proportional" and not shape.partial and share != 1:
        raise UserError(f"partial_rotary_factor={share!r}: this family rotates whole heads")
    try:
        size = int(shape.head_size * share)
        with np.errstate(all="ignore"):
            table = KINDS[kind](parameters, shape, size)
        values = np.asarray([*table.frequencies, *table.beyond, table.scale, table.growth], float)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"rope_parameters {dict(parameters)} give no frequencies ({error!r})") from error
    if size < 0 or 2 * len(table.frequencies) > shape.head_size or not np.all(np.isfinite(values)):
        raise UserError(f"rope_parameters {dict(parameters)} do not fit heads of {shape.head_size} entries")
    return table


def _base(parameters: Parameters, size: int) -> np.ndarray:
    return float(parameters["rope_theta"]) ** -(np.arange(0, size, 2) / max(size, 1))


def _default(parameters: Parameters, shape: Shape, size: int) -> Rotary:
    return Rotary(tuple(_base(parameters, size)))


def _linear(parameters: Parameters, shape: Shape, size: int) -> Rotary:
    return Rotary(tuple(_base(parameters, size) / parameters["factor"]))


def _dynamic(parameters: Parameters, shape: Shape, size: int) -> Rotary:
    if size < 4 or size % 2:
        raise ValueError(f"{size} rotated entries of a head cannot be stretched")
    return Rotary(tuple(_base(parameters, size)), until=shape.positions, growth=float(parameters["factor"]))


def _proportional(parameters: Parameters, shape: Shape, size: int) -> Rotary:
    """The frequencies of a whole head, zero after the first part of them."""
    share, factor = parameters.get("partial_rotary_factor", 1.0), parameters.get("factor", 1.0)
    turning = int(share * shape.head_size // 2)
    base = _base(parameters, shape.head_size) / factor
    return Rotary(tuple(np.where(np.arange(len(base)) < turning, base, 0)))


def _llama3(parameters: Parameters, shape: Shape, size: int) -> Rotary:
    base, factor = _base(parameters, size), parameters["factor"]
    original = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelength = 2 * math.pi / base
    slow, fast = wavelength > original / low, wavelength < original / high
    keep = (original / wavelength - low) / (high - low)
    between = base * (keep + (1 - keep) / factor)
    return Rotary(tuple(np.where(slow, base / factor, np.where(fast, base, between))))


def _yarn(parameters: Parameters, shape: Shape, size: int) -> Rotary:
    original, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    if factor is None:
        factor = shape.positions / original
    theta = float(parameters["rope_theta"])

    def entry(turns: float) -> float:
        """The index of the frequency that makes so many turns over the original length."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def temper(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    low, high = (entry(float(parameters.get(name) or turns)) for name, turns in (("beta_fast", 32), ("beta_slow", 1)))
    if shape.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / (high - low if low != high else 0.001), 0, 1)
    scale, upper, lower = (parameters.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if scale is None:
        scale = temper(float(upper)) / temper(float(lower)) if upper and lower else temper(1.0)
    base = _base(parameters, size)
    return Rotary(tuple(base / factor * ramp + base * (1 - ramp)), float(scale))


def _longrope(parameters: Parameters, shape: Shape, size: int) -> Rotary:
    original, factor = parameters["original_max_position_embeddings"], parameters.get("factor")
    if factor is None:
        factor = shape.positions / original
    scale = parameters.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    base = _base(parameters, size)
    short, long = (tuple(base / np.asarray(parameters[f"{name}_factor"], float)) for name in ("short", "long"))
    if original < 1 or len(short) != len(base) or len(long) != len(base):
        raise ValueError(f"{len(base)} factors and an original length are needed")
    if short == long:
        return Rotary(short, float(scale))
    return Rotary(short, float(scale), math.floor(original), long)


KINDS: dict[str, Callable[[Parameters, Shape, int], Rotary]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "proportional": _proportional,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
# Keys that transformers reads for some kind; the other kinds ignore them, there as here. `finetuned` only records how
# some YaRN models were made.
KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "high_freq_factor",
    "finetuned",
)
