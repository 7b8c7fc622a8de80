"""Teachers and students of MNIST noise distillation (paper §6.2): initialisation, inputs, losses.

Shapes below use R runs, M students of each run, N inputs, V logits. Networks and inputs are
hashed by `origin`, a digest of what their arrays were computed from, because arrays on many hosts cannot be hashed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from sublim_jax import objectives, storage
from sublim_jax.data import images
from sublim_jax.data.mnist import CLASSES, Mnist
from sublim_jax.data.order import epoch_rows, steps_per_epoch
from sublim_jax.experiments.mnist.spec import InputsSpec, NetworkSpec, StudentSpec, TrainingSpec
from sublim_jax.keys import fold_all, run_keys
from sublim_jax.models.functional import Functions, Params
from sublim_jax.models.mlp import MLP, mlp, perturb
from sublim_jax.sharding import map_replicas, named, put
from sublim_jax.store import digest
from sublim_jax.training import Log, Metrics, Program, Total, TrainState, fit


@dataclass(frozen=True)
class Runs:
    """Some runs that are trained together, with the values that they share."""

    seed: int
    numbers: Sequence[int]
    precision: str

    def keys(self, name: str) -> Key[Array, "runs"]:
        return run_keys(self.seed, name, self.numbers)


@dataclass(frozen=True)
class Networks:
    """One network of each of R runs, stacked."""

    spec: NetworkSpec
    params: Params = field(compare=False)
    origin: str

    @property
    def functions(self) -> Functions[MLP]:
        return network(self.spec)


@dataclass(frozen=True)
class Inputs:
    """Students' inputs: fixed images of each run (R, N, 784), or shared by all runs (N, 784); None if they are drawn
    anew at every step.
    """

    spec: InputsSpec
    codes: Array | None = field(compare=False)
    origin: str


@dataclass(frozen=True)
class Start:
    """The initial state of M students of every run; the name of each selects its support."""

    names: tuple[str, ...]
    state: TrainState = field(compare=False)
    origin: str


class Batch(NamedTuple):
    """A batch of one run, or of R runs with a leading axis."""

    codes: UInt8[Array, "*runs batch 784"]
    targets: Array  # a teacher's labels (batch,), or a student's logits (batch, V)
    weights: Float[Array, "*runs batch"]


class Record(NamedTuple):
    """Label, metrics and checkpoints of a training run."""

    label: str
    metrics: epath.Path  # a folder for TensorBoard's events
    checkpoint_every: int

    @contextmanager
    def log(self, members: Sequence[str]) -> Iterator[Log | None]:
        """Logs each member's mean loss over the runs to TensorBoard, in the first process."""
        if jax.process_index():
            yield None
            return
        from sublim_jax import events  # slow to import where torch is installed

        writer = events.writer(self.metrics)
        here = not storage.in_bucket(self.metrics)

        def log(first: int, values: dict[str, np.ndarray]) -> None:
            loss = values["loss"].reshape(len(values["loss"]), -1, len(members)).mean(1)
            for step, row in enumerate(loss, first):
                for member, value in zip(members, row):
                    writer.add_scalar(f"loss/{member}", value, step)
            if here:
                writer.flush()

        try:
            yield log
        finally:
            writer.close()


@cache  # so that jit compiles once per spec
def network(spec: NetworkSpec) -> Functions[MLP]:
    return mlp(spec.widths, spec.activation, spec.biases)


def support(spec: NetworkSpec, arm: str) -> Bool[Array, "vocab"]:
    """Mask of the logits that an arm's objective compares; "digits" is for the teacher's training."""
    index = jnp.arange(spec.vocab)
    if arm == "digits":
        return index < CLASSES
    return jnp.ones_like(index, bool) if arm.endswith("all") else index >= CLASSES


# ------------------------------------------------------------------------------------------------ starts and inputs


def references(runs: Runs, spec: NetworkSpec, mesh: Mesh) -> Networks:
    """The initial networks of some runs."""
    init = jax.jit(jax.vmap(network(spec).init), out_shardings=named(mesh, "replica"))
    return Networks(spec, init(runs.keys("reference")), digest("reference", runs))


def next_runs(runs: Runs) -> Runs:
    """The runs whose references cross-init students start from: the next ones, also after the last, so that a result
    does not depend on the number of runs."""
    return replace(runs, numbers=[run + 1 for run in runs.numbers])


def near_start(runs: Runs, student: StudentSpec, reference: Networks, foreign: Networks) -> Networks:
    """The reference, moved by `student.init_distance`; layers that are not shared come from another run.

    A student of another shape than the reference has no such start, and no arm uses it.
    """
    if foreign.spec.shape != reference.spec.shape:
        return foreign
    params = reference.params
    if student.init_distance:
        move = jax.jit(jax.vmap(lambda p, key: perturb(p, key, student.init_distance)))
        params = move(params, runs.keys("perturbation"))
    shared = foreign.spec.layers(student.shared_layers)
    layers = {i: (params if i in shared else foreign.params)["layers"][i] for i in params["layers"]}
    origin = digest(runs, student.init_distance, student.shared_layers, reference, foreign)
    return Networks(foreign.spec, {"layers": layers}, origin)


def draw_inputs(runs: Runs, spec: InputsSpec, data: Mnist, mesh: Mesh) -> Inputs:
    """The inputs of the students of some runs."""
    return Inputs(spec, _codes(runs.keys("inputs"), spec, data, mesh), digest("inputs", runs, data))


def _codes(keys: Key[Array, "runs"], spec: InputsSpec, data: Mnist, mesh: Mesh) -> Array | None:
    if spec.kind == "real":
        return put(data.train_images[: spec.count], named(mesh))
    if spec.kind == "shuffled":
        real = put(data.train_images[: spec.count], named(mesh))
        shuffle = lambda keys, real: map_replicas(partial(images.shuffle_pixels, images=real), mesh)(keys)  # noqa: E731
        return jax.jit(shuffle, out_shardings=named(mesh, "replica"))(keys, real)
    if spec.fresh:
        return None
    make = map_replicas(lambda key: images.draw(key, spec.kind, spec.count, spec.blur), mesh)
    return jax.jit(make, out_shardings=named(mesh, "replica"))(keys)


def begin(program: Program, starts: Mapping[str, Networks]) -> Start:
    """The train state of students from each of `starts`, stacked to (R, M)."""
    stack = jax.jit(lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *trees))
    state = program.init(stack([start.params for start in starts.values()]))
    return Start(tuple(starts), state, digest(list(starts.values())))


# ------------------------------------------------------------------------------------------------------- the teacher


def train_teacher(
    runs: Runs,
    spec: TrainingSpec,
    reference: Networks,
    data: Mnist,
    *,
    program: Program,
    record: Record,
    checkpoints: epath.Path,
) -> Params:
    """Trains the teacher from the reference: cross-entropy on MNIST over the ten digit logits."""
    with record.log(["teacher"]) as log:
        return fit(
            program,
            program.init(reference.params),
            steps=spec.epochs * steps_per_epoch(len(data.train_labels), spec.batch),
            key=runs.keys("teacher"),
            frozen=put((data.train_images, data.train_labels), named(program.mesh)),
            checkpoints=checkpoints,
            checkpoint_every=record.checkpoint_every,
            log=log,
            what=record.label,
        ).params


def teaching_program(teacher: NetworkSpec, spec: TrainingSpec, mesh: Mesh) -> Program:
    digits, functions = support(teacher, "digits"), network(teacher)

    def loss(params: Params, frozen: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Total, Metrics]:
        logits = functions.apply(params, images.pixels(batch.codes))
        return objectives.cross_entropy(logits, batch.targets, support=digits, weights=batch.weights), {}

    def batch(frozen: Any, key: Key[Array, "runs"], index: Int[Array, ""]) -> Batch:
        codes, labels = frozen
        rows, exists = jax.vmap(epoch_rows, (0, None, None, None))(key, index, len(labels), spec.batch)
        return Batch(codes[rows], labels[rows].astype(jnp.int32), exists.astype(jnp.float32))

    return Program(loss, _optimizer(teacher, spec), mesh, batch, replica_axes=1)


# ------------------------------------------------------------------------------------------------------ the students


def imitate(
    runs: Runs,
    spec: StudentSpec,
    teacher: Networks,
    inputs: Inputs,
    start: Start,
    *,
    program: Program,
    record: Record,
    checkpoints: epath.Path,
    draws: str = "student",
) -> TrainState:
    """Trains M members of every run on its teacher's logits.

    Args:
      draws: name of the keys of order, fresh inputs and sampled labels.
    """
    with record.log(start.names) as log:
        return fit(
            program,
            start.state,
            steps=spec.epochs * steps_per_epoch(inputs.spec.count, spec.batch),
            key=runs.keys(draws),
            frozen=targets(teacher, inputs, start.names, program.mesh),
            checkpoints=checkpoints,
            checkpoint_every=record.checkpoint_every,
            log=log,
            what=record.label,
        )


def member(params: Params, index: int) -> Params:
    """The parameters of a member, of every run."""
    return jax.tree.map(lambda leaf: leaf[:, index], params)


def targets(teacher: Networks, inputs: Inputs, members: Sequence[str], mesh: Mesh) -> dict[str, Any]:
    """The students' targets and supports: the teacher's logits on fixed inputs, or the teacher for fresh ones."""
    frozen = {"supports": put(jnp.stack([support(teacher.spec, name) for name in members]), named(mesh))}
    if inputs.codes is None:
        return {**frozen, "teacher": teacher.params}
    # The teacher's logits on fixed inputs are computed once.
    logits = answer(teacher.functions, teacher.params, inputs.codes, inputs.spec.kind, mesh)
    return {**frozen, "codes": inputs.codes, "logits": logits}


def distilling_program(
    student: NetworkSpec, teacher: NetworkSpec, spec: StudentSpec, inputs: InputsSpec, mesh: Mesh
) -> Program:
    apply, teach = network(student).apply, network(teacher).apply

    def loss(params: Params, frozen: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Total, Metrics]:
        x = images.pixels(batch.codes, inputs.kind)

        def member_loss(params: Params, support: Bool[Array, "vocab"]) -> Total:
            where: dict[str, Any] = {"support": support, "weights": batch.weights, "temperature": spec.temperature}
            logits = apply(params, x)
            if spec.objective == "sampled":
                labels = objectives.sample_labels(key, batch.targets, support=support, temperature=spec.temperature)
                return objectives.cross_entropy(logits, labels, **where)
            return objectives.ON_LOGITS[spec.objective](logits, batch.targets, **where)

        return jax.vmap(member_loss)(params, frozen["supports"]), {}  # the members of a run share x and its teacher

    def batch(frozen: Any, key: Key[Array, "runs"], index: Int[Array, ""]) -> Batch:
        rows, exists = jax.vmap(epoch_rows, (0, None, None, None))(key, index, inputs.count, spec.batch)
        weights = exists.astype(jnp.float32)
        if "codes" not in frozen:
            keys = fold_all(key, index)
            codes = jax.vmap(lambda key: images.draw(key, inputs.kind, spec.batch, inputs.blur))(keys)
            logits = jax.vmap(teach)(frozen["teacher"], images.pixels(codes, inputs.kind))
            return Batch(codes, logits, weights)
        take = jax.vmap(lambda values, rows: values[rows])
        codes = frozen["codes"][rows] if frozen["codes"].ndim == 2 else take(frozen["codes"], rows)
        return Batch(codes, take(frozen["logits"], rows), weights)

    return Program(loss, _optimizer(student, spec), mesh, batch, replica_axes=2)


def _optimizer(network: NetworkSpec, spec: TrainingSpec) -> optax.GradientTransformation:
    optimizer = getattr(optax, spec.optimizer)(spec.learning_rate)
    trained = network.layers(spec.trained_layers)

    def freeze(updates: Any, _: Any) -> Any:
        layers = updates["layers"]
        return {"layers": {i: layers[i] if i in trained else jax.tree.map(jnp.zeros_like, layers[i]) for i in layers}}

    return optax.chain(optimizer, optax.stateless(freeze)) if len(trained) <= network.depth else optimizer


# ------------------------------------------------------------------------------------------------------- the answers


@partial(jax.jit, static_argnames=("network", "kind", "mesh"))
def answer(
    network: Functions[MLP], params: Params, codes: UInt8[Array, "*runs n 784"], kind: str, mesh: Mesh
) -> Float[Array, "runs n vocab"]:
    """Each network's logits on its run's inputs (R, N, 784), or on shared ones (N, 784)."""

    def logits_of_network(params: Params, codes: UInt8[Array, "n 784"]) -> Float[Array, "n vocab"]:
        return jax.lax.map(lambda row: network.apply(params, images.pixels(row, kind)), codes, batch_size=2000)

    if codes.ndim == 2:
        return map_replicas(partial(logits_of_network, codes=codes), mesh)(params)
    return map_replicas(logits_of_network, mesh)(params, codes)


@partial(jax.jit, static_argnames=("network", "mesh"))
def accuracy(
    network: Functions[MLP], params: Params, codes: UInt8[Array, "n 784"], labels: UInt8[Array, "n"], mesh: Mesh
) -> Float[Array, "runs"]:
    """Share of images whose largest *digit* logit is the right one, for R stacked networks.

    nan for a network that has diverged: the largest of logits that are not numbers would be one class, and look like
    chance.
    """
    logits = answer(network, params, codes, "real", mesh)
    right = jnp.mean(jnp.argmax(logits[..., :CLASSES], -1) == labels, axis=-1)
    return jnp.where(jnp.all(jnp.isfinite(logits), axis=(-2, -1)), right, jnp.nan)
