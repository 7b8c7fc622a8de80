"""Low-rank adapters: beside a kernel W stand A and B, and the layer computes x W + scale · (x A) B.

An adapter tree has {"a", "b"} in the place of every adapted layer's {"kernel", …}, so that many trees share one base.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sublim_jax.errors import UserError
from sublim_jax.models.functional import Params

EVERY_LINEAR = ("query", "key", "value", "out", "gate", "up", "down")


@dataclass(frozen=True)
class Lora:
    """Which layers have adapters, and of what kind.

    Attributes:
      modules: names of the linear layers; () for all that there are.
      layers: numbers of the decoder's layers; () for all. Others have A and B of zeros, whose gradients are zero.
      rslora: scale by alpha / √rank instead of alpha / rank.
      forward_mode: support `jax.jvp`, which the theorem's predictions need; gradients are then slower on a CPU.
    """

    rank: int
    alpha: float | int
    rslora: bool = False
    modules: tuple[str, ...] = EVERY_LINEAR
    layers: tuple[int, ...] = ()
    forward_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("modules", "layers"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise UserError(f"lora.{name}={given!r}: give a list of them")
            object.__setattr__(self, name, tuple(given))

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@jax.custom_vjp
def narrow_product(x: Float[Array, "*rows rank"], w: Float[Array, "rank outputs"]) -> Float[Array, "*rows outputs"]:
    """x @ w for a narrow x.

    Its gradient for w is written as xᵀ dy. JAX's own is (dyᵀ x)ᵀ, for which XLA on CPU copies dy, which is wide, into
    another order: a LoRA step of SmolLM2 then takes 1.3 times as long.
    """
    return x @ w


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ w, (x, w)


def _backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = kept
    rows = tuple(range(x.ndim - 1))
    return dy @ w.T, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


narrow_product.defvjp(_forward, _backward)


def check(spec: Lora, params: Params, num_layers: int) -> None:
    """Raises UserError for a layer that this model does not have, which would otherwise be left out in silence.

    And for a rank below 1.
    """
    if spec.rank < 1:
        raise UserError(f"lora.rank={spec.rank}: choose 1 or more")
    for layer in spec.layers:
        if not 0 <= layer < num_layers:
            raise UserError(f"lora.layers: {layer} must be from 0 to {num_layers - 1}")
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params["layers"])]
    known = {jax.tree_util.keystr(path[-2:-1], simple=True) for path in paths if "kernel" in str(path[-1])}
    for module in spec.modules if spec.modules != EVERY_LINEAR else ():
        if module not in known:
            there = ", ".join(name for name in EVERY_LINEAR if name in known)
            raise UserError(f"lora.modules: this model has no {module!r}; it has {there}")


def draw(key: Key[Array, ""], stack: tuple[int, ...], inputs: int, rank: int) -> Float[Array, "*stack inputs rank"]:
    """A fresh A, uniform within ± 1/√inputs as PEFT draws it."""
    return jax.random.uniform(key, (*stack, inputs, rank), minval=-1, maxval=1) * inputs**-0.5


def init(key: Key[Array, ""], params: Params, lora: Lora) -> Params:
    """Fresh adapters for a network's parameters: A random, B zero, float32.

    A is part of the initialisation: students that share a key share it, and with it the tangent space.
    """
    count = 0

    def walk(node: Params, name: str | int) -> Params:
        nonlocal count
        if "kernel" in node:
            if lora.modules and name not in lora.modules:
                return {}
            *stack, inputs, outputs = node["kernel"].shape
            count += 1
            a = draw(jax.random.fold_in(key, count), tuple(stack), inputs, lora.rank)
            if lora.layers:
                chosen = jnp.zeros(stack, a.dtype).at[jnp.asarray(lora.layers)].set(1)
                a = a * chosen[..., None, None]
            return {"a": a, "b": jnp.zeros((*stack, lora.rank, outputs), a.dtype)}
        children = {child: walk(node[child], child) for child in sorted(node, key=str) if isinstance(node[child], dict)}
        return {child: value for child, value in children.items() if value}

    return walk(params, "")


def join(base: Params, adapters: Params) -> Params:
    """Parameters with adapters beside their kernels; a decoder with `lora` in its settings applies them."""
    return {**base, **{k: join(base[k], v) if isinstance(v, dict) else v for k, v in adapters.items()}}


def split(params: Params) -> tuple[Params, Params]:
    """(base, adapters): the inverse of `join`."""
    base: Params = {}
    adapters: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            base[name], inner = split(value)
            if inner:
                adapters[name] = inner
        else:
            (adapters if name in ("a", "b") else base)[name] = value
    return base, adapters


def merge(base: Params, adapters: Params, scale: float) -> Params:
    """Plain parameters with the adapters added into the kernels.

    A B is multiplied and added in float32 or wider, and rounded once, to the kernel's type.
    """
    merged = dict(base)
    for name, value in adapters.items():
        if isinstance(value, dict):
            merged[name] = merge(base[name], value, scale)
    if "a" in adapters:
        kernel, a, b = base["kernel"], adapters["a"], adapters["b"]
        wide = jnp.promote_types(jnp.result_type(kernel, a, b), jnp.float32)
        change = jnp.matmul(a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST)
        merged["kernel"] = (kernel + scale * change).astype(kernel.dtype)
    return merged


def with_b(adapters: Params, other: Params) -> Params:
    """Adapters with another tree's B."""
    if "a" in adapters:
        return {"a": adapters["a"], "b": other["b"]}
    return {name: with_b(child, other[name]) for name, child in adapters.items()}


def inner(adapters: Params, other: Params) -> Float[Array, ""]:
    """The inner product of two changes A B of the kernels, over all layers; no A B is ever formed."""
    if "a" in adapters:
        left = jnp.einsum("...ir,...is->...rs", adapters["a"], other["a"])
        right = jnp.einsum("...ro,...so->...rs", adapters["b"], other["b"])
        return jnp.sum(left * right)
    return sum((inner(child, other[name]) for name, child in adapters.items()), start=jnp.zeros(()))


def cosine(adapters: Params, other: Params) -> Float[Array, ""]:
    """cos of the angle between two changes of the kernels."""
    return inner(adapters, other) / jnp.sqrt(inner(adapters, adapters) * inner(other, other))
