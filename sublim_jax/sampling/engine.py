"""The decode loop: a fixed number of slots on the device, prompts in, tokens out, finished rows replaced.

Four pure functions, each compiled once (`compiled`): `start` (empty slots), `prefix` (the common prefix of all prompts,
computed once), `admit` (prompts into free slots, in chunks of a fixed length), and `advance` (some tokens for every
slot). Shapes never change, so that a row's samples do not depend on the other rows. `scheduler.py` assigns rows to
slots.

Axes in front of a state's arrays: d devices (mesh axes replica × fsdp), r adapters over one base, then s slots.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from sublim_jax.keys import fold_elementwise
from sublim_jax.models import lora
from sublim_jax.models.decoder import Caches, Decoder, Steering, empty_cache, unstack
from sublim_jax.models.functional import Functions, Params
from sublim_jax.models.layers import Cache
from sublim_jax.models.settings import Settings
from sublim_jax.sampling.constraints import Constraint
from sublim_jax.sampling.samplers import Sampler, draw
from sublim_jax.sharding import everywhere, named, parameter_shardings

DEVICES = ("replica", "fsdp")
LANES = 8  # one slot in so many is refilled at a time
NAN = -2  # in place of a token where logits are not finite


class Fixed(NamedTuple):
    """The inputs that are the same at every step."""

    base: Params
    adapters: Params | None = None  # stacked, r in front
    prefix: Caches | None = None  # r in front
    steering: Steering | None = None
    constraint: Constraint | None = None


class State(NamedTuple):
    """The state of all slots."""

    cache: Caches  # (d, r, layers, s, groups, length, h)
    token: Int[Array, "d r s"]  # the last one, which is not in the cache yet
    length: Int[Array, "d r s"]  # number of cached tokens
    num_generated: Int[Array, "d r s"]
    limit: Int[Array, "d r s"]  # number of tokens to sample
    key: Key[Array, "d r s"]
    grammar: Int[Array, "d r s"]  # state of the constraint
    active: Bool[Array, "d r s"]


class Prompts(NamedTuple):
    """Rows for free slots: a lanes for each device and adapter; a lane whose slot is s or more is empty."""

    tokens: Int[Array, "d r a t"]  # padded on the right
    length: Int[Array, "d r a"]
    slot: Int[Array, "d r a"]
    limit: Int[Array, "d r a"]
    key: Key[Array, "d r a"]


class Generated(NamedTuple):
    """The output of n steps; tokens are −1 where a slot was idle."""

    token: Int[Array, "d n r s"]
    logprob: Float[Array, "d n r s"]  # under the model itself: temperature 1, no cut, no constraint
    entropy: Float[Array, "d n r s"] | None  # of the model's own distribution, in nats
    alternatives: tuple[Array, Array] | None  # the most probable tokens and their log-probabilities (…, k)


@dataclasses.dataclass(frozen=True)
class Engine:
    """The configuration of the decode loop; compiled once for all prompts that fit its shapes.

    Attributes:
      slots: rows at once, for each device and adapter. More devices take more rows; each has the same shapes.
      lanes: prompts that are admitted together.
      chunk: tokens of a prompt that are computed together.
      length: columns of the cache for a row's own tokens; a multiple of `chunk`.
      steps: maximum number of tokens of a row between two synchronisations with the host.
      stops: tokens that end a row.
      alternatives: number of most probable tokens to return beside each sampled one.
      unstacked: layers are run one after another, each with its own weights, adapters and cache; `network` is the
        decoder for them. See `capacity.suited`.
    """

    network: Functions[Decoder]
    settings: Settings
    mesh: Mesh
    sampler: Sampler
    slots: int
    lanes: int
    chunk: int
    length: int
    steps: int
    stops: tuple[int, ...] = ()
    adapters: int = 1
    entropy: bool = False
    alternatives: int = 0
    dtype: DTypeLike = jnp.float32
    unstacked: bool = False

    def with_slots(self, slots: int) -> "Engine":
        """The engine with so many slots, of which an eighth is refilled at a time."""
        return dataclasses.replace(self, slots=slots).with_lanes(slots // LANES)

    def with_lanes(self, lanes: int) -> "Engine":
        """The engine with so many lanes: at least one, at most one a slot."""
        return dataclasses.replace(self, lanes=min(max(lanes, 1), self.slots))

    @property
    def devices(self) -> int:
        return self.mesh.shape["replica"] * self.mesh.shape["fsdp"]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of one device's slots, before the mesh axis `tensor` splits it."""
        shapes = jax.eval_shape(lambda: empty_cache(self.settings, self.slots, self.length, self.dtype))
        return self.adapters * sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)

    @property
    def _vocabulary_axis(self) -> str | None:
        """The mesh axis that splits the unembedding, and with it the logits, if one does."""
        tensor = self.mesh.shape["tensor"]
        return "tensor" if tensor > 1 and self.settings.vocab % tensor == 0 else None

    def _start(self) -> State:
        shape = (self.devices, self.adapters, self.slots)
        cache = self._cache(shape[:2], self.slots, self.length)
        zeros = jnp.zeros(shape, jnp.int32)
        keys = jax.random.split(jax.random.key(0), shape)
        return State(cache, zeros, zeros, zeros, zeros, keys, zeros, jnp.zeros(shape, bool))

    def _cache(self, front: tuple[int, ...], rows: int, length: int) -> Caches:
        if not self.unstacked:
            return stacked_cache(self.settings, front, rows, length, self.dtype)
        layer_settings = dataclasses.replace(self.settings, layers=1)
        return tuple(
            stacked_cache(layer_settings, front, rows, length, self.dtype) for _ in range(self.settings.layers)
        )

    def _prefix(self, fixed: Fixed, tokens: Int[Array, "1 p"]) -> Caches:
        cache = self._cache((self.adapters,), 1, tokens.shape[1])
        tokens = jnp.broadcast_to(tokens, (self.adapters, *tokens.shape))
        filled = features(self.network, fixed, tokens, cache, jnp.zeros((self.adapters, 1), jnp.int32))[1]
        return jax.tree.map(lambda x: x[:, :, 0], filled)

    def _admit(self, fixed: Fixed, state: State, prompts: Prompts) -> State:
        shape, lanes = prompts.tokens.shape[:2], prompts.tokens.shape[1]
        cache = self._cache(shape[:1], lanes, self.length)

        # The last token of a prompt is left to the first step, which draws from its logits.
        def more(carried: tuple[Array, Caches]) -> Array:
            return carried[0] * self.chunk < jnp.max(prompts.length) - 1

        def fill(carried: tuple[Array, Caches]) -> tuple[Array, Caches]:
            number, cache = carried
            at = number * self.chunk
            tokens = jax.lax.dynamic_slice_in_dim(prompts.tokens, at, self.chunk, 2)
            begin = jnp.broadcast_to(at, shape)
            return number + 1, features(self.network, fixed, tokens, cache, begin, prompts.length)[1]

        cache = jax.lax.while_loop(more, fill, (jnp.int32(0), cache))[1]
        last = jnp.take_along_axis(prompts.tokens, prompts.length[..., None] - 1, -1)[..., 0]
        zeros = jnp.zeros_like(last)
        given = (last, prompts.length - 1, zeros, prompts.limit, prompts.key, zeros, jnp.ones(shape, bool))
        adapter = jnp.arange(shape[0])[:, None]
        slots = jax.tree.map(lambda old, new: old.at[adapter, prompts.slot].set(new), tuple(state[1:]), given)
        caches = jax.tree.map(
            lambda old, new: jax.vmap(lambda o, n, slot: o.at[:, slot].set(n))(old, new, prompts.slot),
            state.cache,
            cache,
        )
        return State(caches, *slots)

    def _advance(self, fixed: Fixed, state: State, steps: Int[Array, ""]) -> tuple[State, Generated]:
        shapes = jax.eval_shape(lambda: self._step(fixed, state)[1])
        history = jax.tree.map(lambda x: jnp.full((self.steps, *x.shape), -1, x.dtype), shapes)

        def body(i: Array, carried: tuple[State, Generated]) -> tuple[State, Generated]:
            state, history = carried
            state, generated = self._step(fixed, state)
            return state, jax.tree.map(lambda h, x: h.at[i].set(x), history, generated)

        return jax.lax.fori_loop(0, steps, body, (state, history))

    def _step(self, fixed: Fixed, state: State) -> tuple[State, Generated]:
        """One token for every active slot."""
        whole = state.length + 1  # `generate` refuses texts that may outgrow the table they began with
        output, cache = features(self.network, fixed, state.token[..., None], state.cache, state.length, whole)
        logits = unembed(self.network, fixed, output[:, :, 0])
        total = jax.nn.logsumexp(logits, -1)
        may = logits
        if fixed.constraint is not None:
            may = jnp.where(fixed.constraint.allowed[state.grammar], logits, -jnp.inf)
        token = draw(fold_elementwise(state.key, state.num_generated), may, self.sampler, self._vocabulary_axis)
        logprob = jnp.take_along_axis(logits, token[..., None], -1)[..., 0] - total
        broken = state.active & ~jnp.isfinite(total)
        entropy = alternatives = None
        if self.entropy:
            p = jnp.exp(logits - total[..., None])
            entropy = total - jnp.sum(jnp.where(p > 0, p * logits, 0), -1)
        if self.alternatives:
            values, tokens = jax.lax.top_k(logits, self.alternatives)
            alternatives = (tokens, values - total[..., None])
        grammar = state.grammar
        if fixed.constraint is not None:
            grammar = fixed.constraint.after[state.grammar, token]
        count = state.num_generated + state.active
        stopped = jnp.isin(token, jnp.asarray(self.stops, jnp.int32)) if self.stops else jnp.zeros_like(state.active)
        shown = jnp.where(broken, NAN, jnp.where(state.active, token, -1))
        after = State(
            cache,
            jnp.where(state.active, token, state.token),
            state.length + state.active,
            count,
            state.limit,
            state.key,
            jnp.where(state.active, grammar, state.grammar),
            state.active & ~stopped & ~broken & (count < state.limit),
        )
        return after, Generated(shown, logprob, entropy, alternatives)


def place(fixed: Fixed, mesh: Mesh, unstacked: bool = False) -> Fixed:
    """Puts the inputs on the mesh, where every device has all that its rows need."""
    shardings = row_weights(fixed.base, mesh)
    rest = everywhere(fixed[1:], mesh)
    if not unstacked:
        return Fixed(jax.tree.map(jax.device_put, fixed.base, shardings), *rest)
    layers = unstack(fixed.base, shardings=shardings)["layers"]
    ends = {name: jax.device_put(leaf, shardings[name]) for name, leaf in fixed.base.items() if name != "layers"}
    adapters = None if fixed.adapters is None else unstack(rest[0], 1)
    return Fixed({**ends, "layers": layers}, adapters, *rest[1:])


def row_weights(params: Params, mesh: Mesh) -> PyTree:
    """Shardings of weights for decoding: layers split over `tensor` by the rules, whole where rows are split."""

    def spec(sharding: NamedSharding) -> NamedSharding:
        return named(mesh, *[axis if axis == "tensor" else None for axis in sharding.spec])

    return jax.tree.map(spec, parameter_shardings(params, mesh))


def stacked_cache(settings: Settings, front: tuple[int, ...], rows: int, length: int, dtype: DTypeLike) -> Cache:
    """An empty cache with leading axes `front`."""
    shapes = jax.eval_shape(lambda: empty_cache(settings, rows, length, dtype))
    return jax.tree.map(lambda x: jnp.zeros((*front, *x.shape), x.dtype), shapes)


def features(
    network: Functions[Decoder],
    fixed: Fixed,
    tokens: Int[Array, "r s t"],
    cache: Caches,
    start: Int[Array, "r s"],
    lengths: Int[Array, "r s"] | None = None,
) -> tuple[Float[Array, "r s t width"], Caches]:
    """The last layer's output and the cache, for every adapter; r = 1 without adapters.

    Args:
      lengths: of the whole texts, where rotations depend on them.
    """

    def forward(
        adapters: Params | None,
        prefix: Caches | None,
        tokens: Array,
        cache: Caches,
        start: Array,
        lengths: Array | None,
    ) -> tuple[Array, Caches]:
        params = fixed.base if adapters is None else lora.join(fixed.base, adapters)
        outputs = network.bind(params).features(
            tokens, cache=cache, start=start, prefix=prefix, lengths=lengths, steering=fixed.steering
        )
        assert outputs.cache is not None  # with the new keys and values
        return outputs.output, outputs.cache

    if fixed.adapters is not None:
        return jax.vmap(forward)(fixed.adapters, fixed.prefix, tokens, cache, start, lengths)
    only = jax.tree.map(lambda x: x[0], (fixed.prefix, tokens, cache, start, lengths))
    return jax.tree.map(lambda x: x[None], forward(None, *only))


def unembed(
    network: Functions[Decoder], fixed: Fixed, output: Float[Array, "*rows width"]
) -> Float[Array, "*rows vocab"]:
    """Logits; the unembedding has no adapters, and is the same for all of them."""
    first_adapter = jax.tree.map(lambda x: x[0], fixed.adapters)
    params = fixed.base if first_adapter is None else lora.join(fixed.base, first_adapter)
    return network.bind(params).unembed(output).astype(jnp.float32)


def state_shardings(engine: Engine) -> PyTree:
    """Shardings of a state: slots over devices; the cache's groups of keys, as a layer's heads, over `tensor`."""
    rows = named(engine.mesh, DEVICES)
    groups = engine.settings.key_heads % engine.mesh.shape["tensor"] == 0
    split = named(engine.mesh, DEVICES, None, None, None, "tensor" if groups else None)
    shapes = jax.eval_shape(engine._start)
    return jax.tree.map(lambda x: split if x.ndim == 7 else rows, shapes)


class Compiled(NamedTuple):
    start: jax.stages.Wrapped  # () -> State
    prefix: jax.stages.Wrapped  # (Fixed, tokens (1, p)) -> Cache
    admit: jax.stages.Wrapped  # (Fixed, State, Prompts) -> State; donates the state
    advance: jax.stages.Wrapped  # (Fixed, State, steps) -> (State, Generated); donates the state


@lru_cache(maxsize=8)  # a study has several engines; programs of many would fill the host's memory
def compiled(engine: Engine) -> Compiled:
    """An engine's functions on its mesh.

    Each device decodes its own slots; splitting a layer over the mesh axis `tensor` is left to the compiler.
    """
    split, whole = PartitionSpec(DEVICES), PartitionSpec()

    def per_device(function: Callable[..., PyTree], given_specs: PartitionSpec) -> Callable[..., PyTree]:
        def local(fixed: Fixed, state: State, given: PyTree) -> PyTree:
            state = jax.tree.map(lambda x: x[0], state)
            given = jax.tree.map(lambda x: x[0], given) if given_specs == split else given
            return jax.tree.map(lambda x: x[None], function(fixed, state, given))

        return jax.shard_map(
            local,
            mesh=engine.mesh,
            in_specs=(whole, split, given_specs),
            out_specs=split,
            axis_names=set(DEVICES),
            check_vma=False,
        )

    advance = per_device(engine._advance, whole)

    def advanced(fixed: Fixed, state: State, steps: Int[Array, ""]) -> tuple[State, Generated]:
        state, generated = advance(fixed, state, steps)
        # Replicated on every device, and so on every host: gathering it later would wait for the next steps.
        return state, jax.lax.with_sharding_constraint(generated, named(engine.mesh))

    # Otherwise XLA merges the kernels of query, key and value, and of gate and up, by copying them at every step.
    options = {"xla_gpu_dot_merger_threshold_mb": 0} if engine.unstacked else None
    jit = partial(jax.jit, compiler_options=options)
    return Compiled(
        jit(engine._start, out_shardings=state_shardings(engine)),
        jit(engine._prefix),
        jit(per_device(engine._admit, split), donate_argnums=(1,)),
        jit(advanced, donate_argnums=(1,)),
    )
