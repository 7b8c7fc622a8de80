"""The one training loop. It owns jit, shardings, donation, the replica axis, several steps a dispatch,
accumulation, checkpoints, signals, metrics and progress. It is independent of what it trains.

A *loss* is a pure function `loss(params, frozen, batch, key) -> ((total, count), metrics)`: weighted sums and the
sums of their weights (metrics likewise, `{name: (total, count)}`), so that micro-batches add up exactly. Many runs
are replicas, stacked on the leading axis of parameters, batch and keys; the loop maps the loss over them, and `frozen`
is shared by all. A replica may have *members*, which share its batch and key: a second leading axis of its parameters,
which the loss maps over itself, because it knows what they share; its totals then have the shape (members,).

Batches come from a pure function `batch(frozen, key, index)` that runs on the device, or from an iterator of host
arrays with `get_state()` and `set_state(state)` (grain's protocol), each process yielding its own rows.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Float, Int, Key, PyTree

from sublim_jax import signals
from sublim_jax.checkpoints import opened
from sublim_jax.errors import Interrupted, UserError
from sublim_jax.keys import fold_all
from sublim_jax.progress import Track
from sublim_jax.sharding import abstract, map_replicas, named, parameter_shardings, place_key, put
from sublim_jax.specs import check_count

Total = tuple[Float[Array, "*replicas"], Float[Array, "*replicas"]]
Metrics = dict[str, Total]
Loss = Callable[[PyTree, PyTree, PyTree, Key[Array, "..."]], tuple[Total, Metrics]]
Batch = Callable[[PyTree, Key[Array, "..."], Int[Array, ""]], PyTree]
Log = Callable[[int, dict[str, np.ndarray]], None]


class TrainState(NamedTuple):
    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]


@runtime_checkable
class BatchIterator(Protocol):
    def __next__(self) -> PyTree: ...
    def get_state(self) -> dict[str, object]: ...
    def set_state(self, state: dict[str, object]) -> None: ...


def over_replicas(function: Callable[..., PyTree], axes: int) -> Callable[..., PyTree]:
    """`function` mapped over `axes` leading axes of all its arguments."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


@dataclasses.dataclass(frozen=True)
class Program:
    """What one update does; compiled once for all runs that share its shapes, for as long as the program lives.

    Attributes:
      loss: see the module's docstring; its `batch` and `key` are those of one micro-batch.
      optimizer: mapped over the replica axes.
      batch: the device function that makes a batch, or None where `fit` is given an iterator.
      replica_axes: how many leading axes of every parameter count runs: 0, 1 (replicas), or 2 (their members too).
        The first is split over the mesh.
      accumulate: consecutive batches that make one update.
      steps_per_dispatch: maximum number of updates per dispatch by the host.
    """

    loss: Loss
    optimizer: optax.GradientTransformation
    mesh: Mesh
    batch: Batch | None = None
    replica_axes: int = 0
    accumulate: int = 1
    steps_per_dispatch: int = 20

    @property
    def batch_spec(self) -> PartitionSpec:
        """Mesh axes of a batch's leading axes.

        Rows are never split over two mesh axes: under parameters split over one of them XLA's partitioner leaves out an
        all-reduce, and gradients are silently wrong (openxla/xla issue 40034; seen here on 2×2×2 CPU devices, jax
        0.10.2).
        """
        return PartitionSpec("replica", "fsdp") if self.replica_axes else PartitionSpec("fsdp")

    def init(self, params: PyTree) -> TrainState:
        """A fresh state: the parameters copied onto the mesh by its rules, optimiser state beside them, step 0."""
        shardings = self.shardings(jax.eval_shape(self._fresh, params))
        return jax.jit(self._fresh, out_shardings=shardings)(params)

    def _fresh(self, params: PyTree) -> TrainState:
        opt_state = over_replicas(self.optimizer.init, self.replica_axes)(params)
        return TrainState(jax.tree.map(jnp.copy, params), opt_state, jnp.zeros((), jnp.int32))

    def abstract(self, params: PyTree) -> TrainState:
        """The state that `init` would return, as shapes on the mesh; `params` may be arrays or shapes."""
        state = jax.eval_shape(self._fresh, params)
        return abstract(state, self.shardings(state))

    def lower(self, params: PyTree, frozen: PyTree) -> jax.stages.Lowered:
        """The dispatch, lowered for shapes on the mesh and not compiled; preflight compiles it."""
        state = self.abstract(params)
        replicas = jax.tree.leaves(params)[0].shape[: min(self.replica_axes, 1)]
        key = jax.ShapeDtypeStruct(
            replicas, jax.random.key(0).dtype, sharding=named(self.mesh, *["replica"][: len(replicas)])
        )
        stop = jax.ShapeDtypeStruct((), jnp.int32, sharding=named(self.mesh))
        shardings, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, state))
        return self._compiled(structure, tuple(shardings)).lower(state, frozen, None, key, stop)

    def shardings(self, state: TrainState) -> PyTree:
        """A `TrainState` of shardings; optimiser moments lie where their parameters lie."""
        params = parameter_shardings(state.params, self.mesh, self.replica_axes)
        opt_state = optax.tree_map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            state.opt_state,
            params,
            transform_non_params=lambda _: named(self.mesh, *["replica"][: self.replica_axes]),
        )
        return TrainState(params, opt_state, jax.tree.map(lambda _: named(self.mesh), state.step))

    def dispatch(
        self, state: TrainState, frozen: PyTree, rows: PyTree, key: Key[Array, "..."], stop: Int[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        """The state at step `stop`, and {metric: (steps_per_dispatch, *replicas)}. Compiled; donates `state`."""
        shardings, structure = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, state))
        return self._compiled(structure, tuple(shardings))(state, frozen, rows, key, stop)

    def _compiled(self, structure: PyTreeDef, shardings: tuple[NamedSharding, ...]) -> jax.stages.Wrapped:
        """`_dispatch` with explicit output shardings: a returned state can be passed in again unchanged."""
        if (structure, shardings) not in self._programs:
            out_shardings = (jax.tree.unflatten(structure, shardings), named(self.mesh))
            self._programs[structure, shardings] = jax.jit(
                self._dispatch, donate_argnums=(0,), out_shardings=out_shardings
            )
        return self._programs[structure, shardings]

    # The loss references a whole model: a cache that outlives the program would keep the model in memory.
    @cached_property
    def _programs(self) -> dict[tuple[PyTreeDef, tuple[NamedSharding, ...]], jax.stages.Wrapped]:
        return {}

    # A loop with traced bounds: one compilation, and the same bits, however many steps a dispatch takes.
    def _dispatch(
        self, state: TrainState, frozen: PyTree, rows: PyTree, key: Key[Array, "..."], stop: Int[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        first, keys = state.step, (fold_all(key, 0), fold_all(key, 1))
        shapes = jax.eval_shape(lambda: self._update(state, frozen, rows, keys, first)[1])
        history = jax.tree.map(lambda x: jnp.zeros((self.steps_per_dispatch, *x.shape), x.dtype), shapes)

        def body(carry: tuple[TrainState, dict[str, Array]]) -> tuple[TrainState, dict[str, Array]]:
            state, history = carry
            slot = state.step - first
            state, metrics = self._update(state, frozen, rows, keys, first)
            return state, jax.tree.map(lambda h, m: h.at[slot].set(m), history, metrics)

        return jax.lax.while_loop(lambda carry: carry[0].step < stop, body, (state, history))

    def _update(
        self, state: TrainState, frozen: PyTree, rows: PyTree, keys: tuple[Array, Array], first: Int[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        def micro(index: Int[Array, ""]) -> tuple[PyTree, Metrics]:
            if self.batch is not None:
                batch = self.batch(frozen, keys[0], index)
            else:
                batch = jax.tree.map(lambda row: row[index - first * self.accumulate], rows)
            batch = jax.lax.with_sharding_constraint(batch, NamedSharding(self.mesh, self.batch_spec))
            return self._gradients(state.params, frozen, batch, fold_all(keys[1], index))

        index = state.step * self.accumulate
        if self.accumulate == 1:
            grads, metrics = micro(index)
        else:  # in one loop: with a second copy of the step, compilation for pods takes many times as long
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, index))
            where = parameter_shardings(state.params, self.mesh, self.replica_axes)
            zeros = (jax.lax.with_sharding_constraint(zeros[0], where), zeros[1])
            grads, metrics = jax.lax.fori_loop(
                0, self.accumulate, lambda i, sums: jax.tree.map(jnp.add, sums, micro(index + i)), zeros
            )
        count = metrics["loss"][1]
        count = jnp.where(count == 0, 1, count)  # a batch of weight 0 has gradient 0
        grads = jax.tree.map(
            lambda g: (g / count.reshape(count.shape + (1,) * (g.ndim - count.ndim))).astype(g.dtype), grads
        )
        updates, opt_state = over_replicas(self.optimizer.update, self.replica_axes)(
            grads, state.opt_state, state.params
        )
        mean_metrics = {name: total / count for name, (total, count) in metrics.items()}
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), mean_metrics

    def _gradients(
        self, params: PyTree, frozen: PyTree, batch: PyTree, key: Key[Array, "..."]
    ) -> tuple[PyTree, Metrics]:
        def replica_gradients(params: PyTree, batch: PyTree, key: Key[Array, ""]) -> tuple[PyTree, Metrics]:
            def summed(params: PyTree) -> tuple[Array, Metrics]:
                total, metrics = self.loss(params, frozen, batch, key)
                return jnp.sum(total[0]), {"loss": total, **metrics}

            return jax.grad(summed, has_aux=True)(params)

        if not self.replica_axes:
            return replica_gradients(params, batch, key)
        return map_replicas(replica_gradients, self.mesh)(params, batch, key)

    def stack(self, batches: list[PyTree]) -> PyTree:
        """Host batches of consecutive updates as global arrays of a dispatch's static size."""
        batches = batches + batches[-1:] * (self.steps_per_dispatch * self.accumulate - len(batches))
        sharding = NamedSharding(self.mesh, PartitionSpec(None, *self.batch_spec))
        return jax.tree.map(
            lambda *leaves: jax.make_array_from_process_local_data(sharding, np.stack(leaves)), *batches
        )


def fit(
    program: Program,
    state: TrainState,
    *,
    steps: int,
    key: Key[Array, "..."],
    frozen: PyTree = None,
    iterator: BatchIterator | None = None,
    checkpoints: epath.Path | None = None,
    checkpoint_every: int = 200,
    evaluate: Callable[[PyTree, int], object] | None = None,
    evaluate_every: int = 200,
    log: Log | None = None,
    what: str = "training",
) -> TrainState:
    """Trains until `state.step == steps` and returns the state there. Donates `state`.

    Args:
      state: from `program.init`, or where an earlier `fit` ended.
      key: one key, or an array of keys along the leading replica axes; every random draw is folded from it and
        the index of the batch, so that resuming or regrouping replicas changes nothing.
      frozen: arrays that are read and not trained (data, base weights), placed on the mesh by the caller.
      iterator: host batches, where the program has no `batch` function.
      checkpoints: directory of this run's checkpoints; where it holds one, training goes on from there.
      evaluate: called with (params, step) every `evaluate_every` steps and at the end.
      log: called with (first step, {metric: values of shape (steps, *replicas)}) after each dispatch.

    Raises:
      Interrupted: on SIGTERM or Ctrl-C, after saving.
      UserError: the checkpoint is of a later step, or the iterator ends before the training.
    """
    check_count("checkpoint_every", checkpoint_every)
    check_count("evaluate_every", evaluate_every)
    key = place_key(key, named(program.mesh, *["replica"][: key.ndim]))
    with signals.deferred() as signal, opened(checkpoints) as store:
        if store and (restored := store.restore(state)):
            state, position = restored
            if state.step > steps:
                raise UserError(f"{checkpoints} holds step {int(state.step)} of a longer training; ask for as many")
            if iterator is not None and position is not None:
                iterator.set_state(position)
        start = step = int(state.step)
        pending: tuple[int, int, dict[str, Array]] | None = None

        def due(every: int) -> bool:
            return step % every == 0 or step >= steps

        def read(first: int, stop: int, history: dict[str, Array]) -> None:
            values = {name: value[: stop - first] for name, value in jax.device_get(history).items()}
            if log:
                log(first, values)
            track.update(stop, f"loss {np.mean(values['loss'][-1]):.4g}")

        def save() -> None:
            if store:
                store.save(step, state, iterator.get_state() if iterator is not None else None)

        with Track(what, steps, start) as track:
            # The order is a contract: evaluate the old state; save it; stop here if asked to; only then take the
            # next batches, so that a saved position never runs ahead of the state; dispatch; and while the device
            # works read the metrics of the dispatch before.
            while True:
                if evaluate and due(evaluate_every):
                    evaluate(state.params, step)
                stopping = signal.requested()
                if step > start and (stopping or (due(checkpoint_every) and step < steps)):
                    save()
                if stopping:
                    if pending:
                        read(*pending)
                    raise Interrupted(f"stopped by {signal.heard} at step {step} of {what}")
                if step >= steps:
                    break
                stop = min(step + program.steps_per_dispatch, steps, _next(step, checkpoint_every))
                stop = min(stop, _next(step, evaluate_every)) if evaluate else stop
                end = put(np.int32(stop), named(program.mesh))
                with jax.transfer_guard("disallow"):  # only explicit transfers may touch the device here
                    rows = None
                    if iterator is not None:
                        try:
                            batches = [next(iterator) for _ in range((stop - step) * program.accumulate)]
                        except StopIteration as error:
                            text = f"the iterator has ended at step {step} of {steps}; give it more, or ask for fewer"
                            raise UserError(text) from error
                        rows = program.stack(batches)
                    state, history = program.dispatch(state, frozen, rows, key, end)
                    if pending:
                        read(*pending)
                pending, step = (step, stop, history), stop
            if pending:
                read(*pending)
            # Asked to stop while the last dispatch ran.
            if step > start and signal.requested():
                save()
    if signal.heard:
        raise Interrupted(f"stopped by {signal.heard} at the end of {what}")
    return state


def _next(step: int, every: int) -> int:
    """The first multiple of `every` after `step`."""
    return (step // every + 1) * every
