"""One decoder for all families of open language models.

Settings say what a family does; layers are stacked on a leading axis and scanned, or, `unstack`ed, run one by one.

Axes in names: b rows, t positions of queries, s positions of keys, k groups of keys, g queries of a group, h head size.
Normalisation, rotation and softmax are computed in float32 or wider, matrix products in the parameters' dtype.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from sublim_jax.errors import UserError
from sublim_jax.models import attention
from sublim_jax.models.attention import Attend, AttentionMask
from sublim_jax.models.functional import Functions, Params, functions
from sublim_jax.models.layers import MLP, Cache, CacheAt, Layer, Linear, Norm
from sublim_jax.models.rope import rotations
from sublim_jax.models.settings import Settings
from sublim_jax.sharding import rows_of

Remat = bool | Literal["mlp"]
KEPT_BY: dict[Remat, tuple[str, ...]] = {False: (attention.KEPT, MLP), "mlp": (attention.KEPT,), True: ()}


Caches = Cache | tuple[Cache, ...]  # of all layers; or one a layer for an unstacked decoder


def columns(cache: Caches) -> int:
    """The number of positions that a cache has room for."""
    return (cache if isinstance(cache, Cache) else cache[0]).keys.shape[-2]


def empty_cache(settings: Settings, rows: int, length: int, dtype: DTypeLike = jnp.float32) -> Cache:
    shape = (settings.layers, rows, settings.key_heads, length, settings.head_size)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class Steering(NamedTuple):
    """Changes of the residual stream after each layer.

    Attributes:
      add: a vector for each layer, zero where nothing is added.
      project_out: a unit vector for each layer, whose direction is projected out of the stream; zero for none.
      where: strength at each position, 0 to 1; 1 everywhere if left out.
    """

    add: Float[Array, "layers width"] | None = None
    project_out: Float[Array, "layers width"] | None = None
    where: Float[Array, "b t"] | None = None


def steer(
    x: Float[Array, "b t width"],
    add: Float[Array, "width"] | None,
    project_out: Float[Array, "width"] | None,
    where: Float[Array, "b t"] | None,
) -> Float[Array, "b t width"]:
    """The residual stream after one layer, for that layer's vectors of a `Steering`."""
    change = jnp.zeros_like(x)
    if project_out is not None:
        unit = project_out.astype(x.dtype)
        change = change - (x @ unit)[..., None] * unit
    if add is not None:
        change = change + add.astype(x.dtype)
    return x + (change if where is None else change * where[..., None].astype(x.dtype))


class Features(NamedTuple):
    output: Float[Array, "b t width"]  # of the last layer, after the final norm
    cache: Caches | None  # with the new keys and values, where there was one
    residuals: Float[Array, "layers b n width"] | None  # after every layer, at the positions asked for


def _parts(cache: Caches | None, stacks: Sequence[Layer]) -> Sequence[Any]:
    """The cache of each stack."""
    return [cache] * len(stacks) if cache is None or isinstance(cache, Cache) else cache


class Decoder(nnx.Module):
    """Tokens to logits. Layers are stacked on a leading axis and scanned: compile time does not grow with depth.

    Unstacked, each layer is a stack of one, and they run one after another: XLA need not copy a layer's arrays out of
    a stack.
    """

    def __init__(self, settings: Settings, unstacked: bool = False, *, rngs: nnx.Rngs):
        c = settings
        self.settings = c
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (c.vocab, c.width)) * c.width**-0.5)
        if c.positions:
            self.position_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.positions, c.width)))
        self.layers: Layer | nnx.List[Layer]
        if unstacked:
            self.layers = nnx.List(Layer(c, (1,), rngs=rngs) for _ in range(c.layers))
        else:
            self.layers = Layer(c, (c.layers,), rngs=rngs)
        self.norm = Norm(c, (), c.width)
        if not c.tied:
            self.unembedding = Linear((), c.width, c.vocab, False, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b t"], **where: Any) -> Float[Array, "b t vocab"]:
        """Logits; arguments as for `features`."""
        return self.unembed(self.features(tokens, **where).output)

    def features(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        cache: Caches | None = None,
        start: Int[Array, "#b"] | Int[Array, ""] | int = 0,
        prefix: Caches | None = None,
        lengths: Int[Array, "b"] | None = None,
        steering: Steering | None = None,
        read: Int[Array, "n"] | None = None,
        place: Callable[[Array], Array] = lambda x: x,
        attend: Attend = attention.xla,
        remat: Remat = False,
    ) -> Features:
        """The output of the layers, before the unembedding.

        Args:
          positions: for rotation; 0, 1, … of each row where left out, after what is cached.
          segments: 0 for padding, else the number of the text that a position belongs to: positions see their own
            text only. All one text where left out. Not with a cache, whose rows are one text each.
          cache: keys and values of earlier positions; a row's tokens are written at `start`, `start` + 1, …, and see
            the positions up to their own. Padding after a text is overwritten by its next tokens.
          prefix: keys and values (layers, groups, p, h) of a prefix that all rows share.
          lengths: of each row's whole text, including the prefix and tokens still to come, where rotations depend on
            it (`Settings.turns_by_length`). Where left out, the last of these positions decides for all rows, as in
            transformers.
          steering: changes of the residual stream.
          read: positions (columns of `tokens`) at which the residual stream is returned after every layer.
          place: applied to the residual stream wherever it is computed, such as a sharding constraint.
          attend: the implementation of attention. `on_mesh` gives `place` and `attend` for a mesh.
          remat: what of each layer is recomputed in the backward pass. False: norms, activation functions and
            attention's weights, which cost little and would be most of what is kept; "mlp": all but queries, keys,
            values and the output of attention; True: all.

        Raises UserError where a row has more tokens than there are learned positions, and, outside of compiled
        functions, for a token that the model does not have.
        """
        c = self.settings
        check_tokens(tokens, c.vocab)
        b, t = tokens.shape
        before = 0 if prefix is None else columns(prefix)
        start = jnp.broadcast_to(start, (b,))
        if positions is None:
            if cache is None:
                c.check_length(before + t, "the text")
            positions = before + start[:, None] + jnp.arange(t)
        x = self.embedding[...][tokens]
        if c.embed_scale != 1:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        if c.positions:
            x = x + self.position_embedding[...][positions]
        x = place(x)
        slots = before + (t if cache is None else columns(cache))
        back = (before + start[:, None] + jnp.arange(t))[:, :, None] - jnp.arange(slots)
        seen = back >= 0
        if segments is not None:
            seen = seen & (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
        whole = None
        if c.turns_by_length:
            whole = jnp.broadcast_to(jnp.max(positions) + 1 if lengths is None else lengths[:, None], (b, 1))
        tables = rotations(c.rotaries, positions, whole)
        windows = jnp.asarray(c.windows or (0,) * c.layers, jnp.int32)
        rotary_of = jnp.asarray(c.rotary_of or (0,) * c.layers, jnp.int32)
        vectors = (None, None) if steering is None else (steering.add, steering.project_out)
        stacks = list(self.layers) if isinstance(self.layers, nnx.List) else [self.layers]
        graphdef = nnx.split(stacks[0], nnx.Param)[0]

        def layer(carried: tuple[Array, Cache | None], given: PyTree) -> tuple[tuple[Array, Cache | None], PyTree]:
            x, cache = carried
            params, number, prefix, window, which, (add, project_out) = given
            rotation = jax.tree.map(lambda table: table[which], tables)
            mask = AttentionMask(seen & ((back < window) | (window == 0)), window, segments)
            where = None if cache is None else CacheAt(number, start, cache, prefix)
            x, cache = nnx.merge(graphdef, params)(x, rotation, mask, where, attend)
            if steering is not None:
                x = steer(x, add, project_out, steering.where)
            return (place(x), cache), None if read is None else x[:, read]

        body: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] = layer
        if cache is None:
            body = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*KEPT_BY[remat]))
        size = c.layers // len(stacks)
        caches: list[Cache] = []
        residuals: list[Array] = []
        for number, (stack, stack_cache, stack_prefix) in enumerate(
            zip(stacks, _parts(cache, stacks), _parts(prefix, stacks))
        ):
            part = slice(number * size, (number + 1) * size)
            of_layers = jax.tree.map(lambda every, part=part: every[part], (windows, rotary_of, vectors))
            before_rows = None if stack_prefix is None else tuple(stack_prefix)
            given = (nnx.split(stack, nnx.Param)[1], jnp.arange(size), before_rows, *of_layers)
            (x, stack_cache), stack_residuals = jax.lax.scan(body, (x, stack_cache), given)
            caches.append(stack_cache)
            residuals.append(stack_residuals)
        if cache is not None:
            cache = caches[0] if isinstance(cache, Cache) else tuple(caches)
        return Features(self.norm(x), cache, None if read is None else jnp.concatenate(residuals))

    def unembed(
        self, x: Float[Array, "*rows width"], only: Int[Array, "support"] | None = None
    ) -> Float[Array, "*rows logits"]:
        """Logits of chosen positions, and of chosen tokens if `only` names some.

        The vocabulary is the widest layer: compute its logits where a loss needs them, and only those that it needs.
        """
        c = self.settings
        kernel = self.embedding[...].T if c.tied else self.unembedding.kernel[...]
        logits = x @ (kernel if only is None else kernel[:, only])
        return c.logit_cap * jnp.tanh(logits / c.logit_cap) if c.logit_cap else logits


def check_tokens(tokens: Int[Array, "b t"], vocab: int) -> None:
    """Raises UserError for a token outside the vocabulary, where its value is known."""
    if isinstance(tokens, jax.core.Tracer) or not tokens.size or not getattr(tokens, "is_fully_addressable", True):
        return
    known = np.asarray(tokens)  # not jnp: inside jit it would trace even what is known
    for token in (int(known.min()), int(known.max())):
        if not 0 <= token < vocab:
            raise UserError(f"token {token} is outside the model's vocabulary of {vocab}")


class Placement(TypedDict):
    """Arguments of `Decoder.features` that go with a mesh."""

    place: Callable[[Array], Array]
    attend: Attend


def on_mesh(settings: Settings, mesh: Mesh) -> Placement:
    """`place` and `attend` for a mesh: rows stay split over `fsdp` (unconstrained, the partitioner may split the
    stream's width instead), and attention is the implementation for its devices.

    Raises UserError where the axis `tensor` does not divide the heads.
    """
    if settings.key_heads % mesh.shape["tensor"]:
        raise UserError(
            f"tensor={mesh.shape['tensor']} of the mesh does not divide the model's {settings.key_heads} heads of keys "
            f"({settings.heads} of queries); set --config.mesh.tensor to a divisor, and fsdp to the rest"
        )
    return {"place": rows_of(mesh), "attend": attention.on(mesh)}


@lru_cache
def decoder(settings: Settings, unstacked: bool = False) -> Functions[Decoder]:
    """`init(key)` and `apply(params, tokens)` of a decoder, over plain parameter dicts.

    Cached by settings, so that programs compiled for it are reused.

    Args:
      unstacked: for parameters and caches as returned by `unstack`.
    """
    return functions(lambda rngs: Decoder(settings, unstacked, rngs=rngs))


def unstack(params: Params, axis: int = 0, shardings: PyTree = None) -> Params:
    """Parameters, or adapters, of an unstacked decoder, made of a stacked one's: {"layers": {0: …, 1: …}}.

    Args:
      axis: of the layers; 1 of stacked adapters.
      shardings: of the parameters. Each array is put there before it is cut, so that at most one is there twice.
    """

    def cut(leaf: Array, sharding: NamedSharding | None = None) -> list[Array]:
        return _cut(leaf if sharding is None else jax.device_put(leaf, sharding), axis)

    parts = jax.tree.map(cut, params["layers"], *([] if shardings is None else [shardings["layers"]]))
    is_cut = lambda node: isinstance(node, list)  # noqa: E731
    count = len(jax.tree.leaves(parts, is_leaf=is_cut)[0])
    of = lambda number: jax.tree.map(lambda part: part[number], parts, is_leaf=is_cut)  # noqa: E731
    return {**params, "layers": {number: of(number) for number in range(count)}}


@partial(jax.jit, static_argnums=1)
def _cut(leaf: Array, axis: int) -> list[Array]:
    return [jax.lax.slice_in_dim(leaf, number, number + 1, axis=axis) for number in range(leaf.shape[axis])]
