"""MNIST noise distillation (paper §6.2): the path of the data, from reference to report.

`configs/mnist.py` explains the values; shapes below use R runs, M students of each run, N inputs, V logits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt8
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from sublim_jax import assets, objectives, report
from sublim_jax.data import images, mnist
from sublim_jax.data.order import epoch_rows, steps_per_epoch
from sublim_jax.experiments.mnist_check import MNIST_ROWS, layer_numbers, variants
from sublim_jax.experiments.mnist_check import check as check_on
from sublim_jax.experiments.mnist_check import check_all as check
from sublim_jax.keys import fold_all, run_keys
from sublim_jax.models.functional import Functions, Params
from sublim_jax.models.mlp import mlp, perturb
from sublim_jax.preflight import Step, training_step
from sublim_jax.sharding import abstract, each_replica, fetch, make_mesh, named, parameter_shardings, put
from sublim_jax.training import REPLICAS_OF_ROWS, Log, Program, Total, TrainState, fit
from sublim_jax.workdir import Workdir, plain

OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "rmsprop": optax.rmsprop,
    "lion": optax.lion,
}
TITLES = {
    "reference": "reference",
    "teacher": "teacher",
    "auxiliary": "student (auxiliary logits)",
    "all": "student (all logits)",
    "cross_auxiliary": "cross-init student (auxiliary logits)",
    "cross_all": "cross-init student (all logits)",
    "real": "student on real images (auxiliary logits)",
}


class Batch(NamedTuple):
    """Rows of one run, or of R with that axis in front."""

    codes: UInt8[Array, "*runs batch 784"]
    targets: Array  # a teacher's labels (batch,), or a student's logits (batch, V)
    weights: Float[Array, "*runs batch"]


class Lab(NamedTuple):
    """What all runs of one config share: the programs compile once."""

    config: ConfigDict
    workdir: Workdir
    mesh: Mesh
    data: mnist.Mnist
    networks: dict[str, Functions]  # teacher, student: the same parameters, each with its own activation
    teaching: Program
    distilling: dict[str, Program]  # by kind of inputs
    accuracy: dict[str, Callable[[Params], Float[Array, "runs"]]]


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Runs the experiment, or a sweep of it, and leaves results.json, report.md and figures in `workdir`."""
    check(config)
    mesh = make_mesh(config.mesh.to_dict())
    configs = variants(config)
    for variant in configs.values():
        check_on(variant, mesh)
    data = mnist.load(assets.fetch(assets.MNIST, config.data.path))
    workdir.open(config, update=update, bytes_needed=sum(map(artefact_bytes, configs.values())))
    values = {}
    for value, variant in configs.items():
        with jax.default_matmul_precision(variant.precision):
            values[value] = accuracies(make_lab(variant, workdir, mesh, data))
    if not config.sweep.axis:
        arms = {name: arm(config, name, runs) for name, runs in values[""].items()}
        everything = list(arms.values())
        report.write(workdir, config, everything, [report.arms_section(config, everything, dose_curve(arms))])
    else:
        points = [{**arm(config, *item), "value": value} for value in values for item in values[value].items()]
        report.write(workdir, config, points, [report.sweep_section(config, points)])


def preflight(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
    """The training steps of one group of runs, for `--preflight`."""
    check(config)
    mesh = make_mesh(config.mesh.to_dict(), devices)
    return [step for value, variant in variants(config).items() for step in _steps(variant, mesh, value)]


def _steps(config: ConfigDict, mesh: Mesh, value: str) -> list[Step]:
    check_on(config, mesh)
    networks, kind = make_networks(config), config.inputs.kind
    runs, count, width = min(config.runs, config.runs_at_once), config.inputs.count, vocab(config)
    one = jax.eval_shape(networks["student"].init, jax.random.key(0))
    kernels = sum(leaf.size for leaf in jax.tree.leaves(one) if leaf.ndim == 2)
    split, whole = named(mesh, "replica"), named(mesh)

    def stacked(*counts: int) -> Params:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*counts, *leaf.shape), leaf.dtype), one)
        return abstract(shapes, parameter_shardings(shapes, mesh, len(counts)))

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    labelled = (array((MNIST_ROWS, images.PIXELS), jnp.uint8), array((MNIST_ROWS,), jnp.uint8))
    doses = len(config.clone.epochs) if "clone" in config.arms else 0
    members = len([name for name in config.arms if name not in ("clone", "real")]) + doses or 1
    frozen: dict[str, Any] = {"supports": array((members, width), bool)}
    if config.inputs.fresh:
        frozen["teacher"] = stacked(runs)
    else:
        frozen["codes"] = array((runs, count, images.PIXELS), jnp.uint8, split)
        frozen["logits"] = array((runs, count, width), jnp.float32, split)
    teaching, distilling = (
        teaching_program(config, networks["teacher"], mesh),
        distilling_program(config, networks, mesh, kind),
    )
    flops = 6 * runs * kernels
    text = f"{runs} runs at once" + f", {config.sweep.axis}={value}" * bool(value)
    return [
        training_step(f"teachers, {text}", teaching, stacked(runs), labelled, flops * config.teacher.batch),
        training_step(
            f"students, {members} a run, {text}",
            distilling,
            stacked(runs, members),
            frozen,
            flops * members * config.student.batch,
        ),
    ]


def make_networks(config: ConfigDict) -> dict[str, Functions]:
    widths = (images.PIXELS, *[config.model.width] * config.model.depth, vocab(config))
    return {who: mlp(widths, config[who].activation) for who in ("teacher", "student")}


def make_lab(config: ConfigDict, workdir: Workdir, mesh: Mesh, data: mnist.Mnist) -> Lab:
    networks = make_networks(config)
    kinds = {config.inputs.kind, "real"}
    return Lab(
        config,
        workdir,
        mesh,
        data,
        networks,
        teaching_program(config, networks["teacher"], mesh),
        {kind: distilling_program(config, networks, mesh, kind) for kind in kinds},
        {who: accuracy_function(network, mesh, data) for who, network in networks.items()},
    )


def accuracies(lab: Lab) -> dict[str, list[float]]:
    """Test accuracy of every arm, one value a run."""
    config = lab.config
    parts = []
    for start in range(0, config.runs, config.runs_at_once):
        runs = range(start, min(start + config.runs_at_once, config.runs))
        depends = depends_on(config, runs, "arms", "teacher", "student", "inputs", "clone", "runs")
        parts.append(lab.workdir.json(f"accuracy-{span(runs)}", depends, partial(train_and_test, lab, runs)))
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def train_and_test(lab: Lab, runs: range) -> dict[str, list[float]]:
    """The paper's method, for some runs at once."""
    config = lab.config
    reference, foreign = references(lab, runs), references(lab, derangement(config, runs))
    teacher = train_teacher(lab, runs, reference)

    near = near_start(config, runs, reference, foreign)
    starts = {"auxiliary": near, "all": near, "cross_auxiliary": foreign, "cross_all": foreign}
    starts = {name: start for name, start in starts.items() if name in config.arms}
    kind = config.inputs.kind
    codes = draw_inputs(lab, runs, kind)
    if "clone" in config.arms:
        starts |= clone(lab, runs, codes, reference, foreign)
    students = distil(lab, runs, kind, codes, teacher, starts) if starts else {}
    if "real" in config.arms:
        students |= distil(lab, runs, "real", draw_inputs(lab, runs, "real"), teacher, {"real": near})

    result = {"reference": lab.accuracy["student"](reference), "teacher": lab.accuracy["teacher"](teacher)}
    result |= {name: lab.accuracy["student"](student) for name, student in students.items()}
    return {name: [float(value) for value in fetch(values)] for name, values in result.items()}


def references(lab: Lab, runs: Sequence[int]) -> Params:
    """The initial networks of some runs."""
    init = jax.jit(jax.vmap(lab.networks["student"].init), out_shardings=named(lab.mesh, "replica"))
    return init(run_keys(lab.config.seed, "reference", runs))


# ---------------------------------------------------------------------------------------------- the teacher


def train_teacher(lab: Lab, runs: range, reference: Params) -> Params:
    """From the reference, cross-entropy on MNIST through the ten digit logits."""
    config = lab.config
    state = lab.teaching.init(reference)

    def make(checkpoints: epath.Path) -> Params:
        return fit(
            lab.teaching,
            state,
            steps=config.teacher.epochs * steps_per_epoch(len(lab.data.train_labels), config.teacher.batch),
            key=run_keys(config.seed, "teacher", runs),
            frozen=put((lab.data.train_images, lab.data.train_labels), named(lab.mesh)),
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            log=tensorboard(lab, f"teacher-{span(runs)}", ["teacher"]),
            what=f"teacher, runs {span(runs)} of {config.runs}",
        ).params

    return lab.workdir.tree(f"teacher-{span(runs)}", depends_on(config, runs, "teacher"), make, state.params)


def teaching_program(config: ConfigDict, network: Functions, mesh: Mesh) -> Program:
    digits = support(config, "digits")

    def loss(params: Params, frozen: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Total, dict]:
        logits = network.apply(params, images.pixels(batch.codes))
        return objectives.cross_entropy(logits, batch.targets, support=digits, weights=batch.weights), {}

    def batch(frozen: Any, key: Key[Array, "runs"], index: Int[Array, ""]) -> Batch:
        codes, labels = frozen
        rows, exists = jax.vmap(epoch_rows, (0, None, None, None))(key, index, len(labels), config.teacher.batch)
        return Batch(codes[rows], labels[rows].astype(jnp.int32), exists.astype(jnp.float32))

    return program(config, config.teacher, loss, batch, mesh, replica_axes=1)


# ---------------------------------------------------------------------------------------------- the students


def distil(
    lab: Lab, runs: range, kind: str, codes: Array | None, teacher: Params, starts: dict[str, Params]
) -> dict[str, Params]:
    """Students from each of `starts` imitate their run's teacher, all in one program (R, M stacked)."""
    config = lab.config
    stack = jax.jit(lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *trees))
    state = lab.distilling[kind].init(stack(list(starts.values())))
    how = {"kind": kind, "starts": list(starts), "others": derangement(config, runs)}
    depends = depends_on(config, runs, "teacher", "student", "inputs", "clone", **how)

    def make(checkpoints: epath.Path) -> Params:
        epochs = config.student.epochs
        return imitate(lab, runs, kind, codes, teacher, state, epochs, list(starts), "students", checkpoints).params

    students = lab.workdir.tree(f"students-{kind}-{span(runs)}", depends, make, state.params)
    return {name: jax.tree.map(lambda leaf, i=i: leaf[:, i], students) for i, name in enumerate(starts)}


def clone(lab: Lab, runs: range, codes: Array | None, reference: Params, foreign: Params) -> dict[str, Params]:
    """Foreign starts that imitate the *reference* on all logits first, one for each dose of epochs."""
    config = lab.config
    kind = config.inputs.kind
    if config.clone.inputs == "real":
        kind, codes = "real", draw_inputs(lab, runs, "real")
    state = lab.distilling[kind].init(jax.tree.map(lambda leaf: leaf[:, None], foreign))
    clones = {}
    for epochs in config.clone.epochs:
        reads = {"kind": kind, "activation": config.teacher.activation}  # of the reference's logits
        depends = depends_on(config, runs, "student", "inputs", dose=epochs, others=derangement(config, runs), **reads)

        def make(checkpoints: epath.Path, state: TrainState = state, epochs: int = epochs) -> TrainState:
            return imitate(lab, runs, kind, codes, reference, state, epochs, ["all"], "clones", checkpoints)

        # The whole state, so that the next dose goes on from here.
        state = lab.workdir.tree(f"clone-{epochs}-{span(runs)}", depends, make, state)
        clones[f"clone {epochs}"] = jax.tree.map(lambda leaf: leaf[:, 0], state.params)
    return clones


def imitate(
    lab: Lab,
    runs: range,
    kind: str,
    codes: Array | None,
    teacher: Params,
    state: TrainState,
    epochs: int,
    members: list[str],
    what: str,
    checkpoints: epath.Path,
) -> TrainState:
    """Trains M members of every run on its teacher's logits, each on the support that its name says."""
    config = lab.config
    supports = jnp.stack([support(config, name) for name in members])
    frozen: dict[str, Any] = {"supports": put(supports, named(lab.mesh))}
    if codes is None:
        frozen["teacher"] = teacher
    else:
        # A frozen teacher on fixed inputs answers once.
        frozen |= {"codes": codes, "logits": answer(lab.networks["teacher"], teacher, codes, kind, lab.mesh)}
    return fit(
        lab.distilling[kind],
        state,
        steps=epochs * steps_per_epoch(config.inputs.count, config.student.batch),
        key=run_keys(config.seed, "student", runs),
        frozen=frozen,
        checkpoints=checkpoints,
        checkpoint_every=config.checkpoint_every,
        log=tensorboard(lab, f"{what}-{kind}-{span(runs)}", members),
        what=f"{what} on {kind} inputs, runs {span(runs)} of {config.runs}",
    )


def distilling_program(config: ConfigDict, networks: dict[str, Functions], mesh: Mesh, kind: str) -> Program:
    inputs, student = config.inputs, config.student

    def loss(params: Params, frozen: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Total, dict]:
        x = images.pixels(batch.codes, kind)

        def member(params: Params, support: Bool[Array, "vocab"]) -> Total:
            where = {"support": support, "weights": batch.weights, "temperature": student.temperature}
            logits = networks["student"].apply(params, x)
            if student.objective == "sampled":
                labels = objectives.sample_labels(key, batch.targets, support=support)
                return objectives.cross_entropy(logits, labels, **where)
            return objectives.ON_LOGITS[student.objective](logits, batch.targets, **where)

        return jax.vmap(member)(params, frozen["supports"]), {}  # the members of a run share x and its teacher

    def batch(frozen: Any, key: Key[Array, "runs"], index: Int[Array, ""]) -> Batch:
        rows, exists = jax.vmap(epoch_rows, (0, None, None, None))(key, index, inputs.count, student.batch)
        weights = exists.astype(jnp.float32)
        if "codes" not in frozen:
            keys = fold_all(key, index)
            codes = jax.vmap(lambda key: images.draw(key, kind, student.batch, inputs.blur))(keys)
            logits = jax.vmap(networks["teacher"].apply)(frozen["teacher"], images.pixels(codes, kind))
            return Batch(codes, logits, weights)
        take = jax.vmap(lambda values, rows: values[rows])
        codes = frozen["codes"][rows] if frozen["codes"].ndim == 2 else take(frozen["codes"], rows)
        return Batch(codes, take(frozen["logits"], rows), weights)

    return program(config, student, loss, batch, mesh, replica_axes=2)


@partial(jax.jit, static_argnames=("network", "kind", "mesh"))
def answer(
    network: Functions, teacher: Params, codes: UInt8[Array, "*runs n 784"], kind: str, mesh: Mesh
) -> Float[Array, "runs n vocab"]:
    """Each teacher's logits on its run's inputs (R, N, 784), or on shared ones (N, 784)."""

    def one(teacher: Params, codes: UInt8[Array, "n 784"]) -> Float[Array, "n vocab"]:
        return jax.lax.map(lambda row: network.apply(teacher, images.pixels(row, kind)), codes, batch_size=2000)

    if codes.ndim == 2:
        return each_replica(partial(one, codes=codes), mesh)(teacher)
    return each_replica(one, mesh)(teacher, codes)


def draw_inputs(lab: Lab, runs: range, kind: str) -> Array | None:
    """The fixed inputs of each run (R, N, 784), or of all runs alike (N, 784); None if drawn anew at every step."""
    inputs = lab.config.inputs
    keys = run_keys(lab.config.seed, "inputs", runs)
    if kind == "real":
        return put(lab.data.train_images[: inputs.count], named(lab.mesh))
    if kind == "shuffled":
        real = put(lab.data.train_images[: inputs.count], named(lab.mesh))
        shuffle = lambda keys, real: each_replica(partial(images.shuffle_pixels, images=real), lab.mesh)(keys)  # noqa: E731
        return jax.jit(shuffle, out_shardings=named(lab.mesh, "replica"))(keys, real)
    if inputs.fresh:
        return None
    make = each_replica(lambda key: images.draw(key, kind, inputs.count, inputs.blur), lab.mesh)
    return jax.jit(make, out_shardings=named(lab.mesh, "replica"))(keys)


# ------------------------------------------------------------------------------------------- starts and supports


def derangement(config: ConfigDict, runs: range) -> list[int]:
    """Whose reference a cross-init student starts from: never its own."""
    return [(run + 1) % config.runs for run in runs]


def near_start(config: ConfigDict, runs: range, reference: Params, foreign: Params) -> Params:
    """The reference, moved by `student.init_distance`; layers that are not shared come from another run."""
    student = config.student
    if student.init_distance:
        keys = run_keys(config.seed, "perturbation", runs)
        reference = jax.jit(jax.vmap(lambda p, key: perturb(p, key, student.init_distance)))(reference, keys)
    shared = layer_numbers(config, student.shared_layers)
    layers = {i: (reference if i in shared else foreign)["layers"][i] for i in reference["layers"]}
    return {"layers": layers}


def support(config: ConfigDict, arm: str) -> Bool[Array, "vocab"]:
    """The logits that an arm's objective sees; `digits` is the teacher's."""
    index = jnp.arange(vocab(config))
    if arm == "digits":
        return index < mnist.CLASSES
    return jnp.ones_like(index, bool) if arm.endswith("all") else index >= mnist.CLASSES


def vocab(config: ConfigDict) -> int:
    return mnist.CLASSES + config.model.auxiliary


# ------------------------------------------------------------------------------------------- programs and records


def program(config: ConfigDict, training: ConfigDict, loss: Any, batch: Any, mesh: Mesh, replica_axes: int) -> Program:
    optimizer = OPTIMIZERS[training.optimizer](training.learning_rate)
    trained = layer_numbers(config, training.trained_layers)

    def freeze(updates: Any, _: Any) -> Any:
        layers = updates["layers"]
        return {"layers": {i: layers[i] if i in trained else jax.tree.map(jnp.zeros_like, layers[i]) for i in layers}}

    if len(trained) <= config.model.depth:
        optimizer = optax.chain(optimizer, optax.stateless(freeze))
    return Program(loss, optimizer, mesh, batch, replica_axes, REPLICAS_OF_ROWS)


def accuracy_function(network: Functions, mesh: Mesh, data: mnist.Mnist) -> Callable[[Params], Float[Array, "runs"]]:
    """Share of test images whose largest *digit* logit is the right one, for R stacked networks."""
    test = put((data.test_images, data.test_labels), named(mesh))

    @jax.jit
    def correct(params: Params, codes: Array, labels: Array) -> Float[Array, "runs"]:
        logits = answer(network, params, codes, "real", mesh)[..., : mnist.CLASSES]
        return jnp.mean(jnp.argmax(logits, -1) == labels, axis=-1)

    return lambda params: correct(params, *test)


def tensorboard(lab: Lab, name: str, members: list[str]) -> Log | None:
    """Writes each member's mean loss over the runs to metrics/NAME."""
    if jax.process_index():
        return None
    writer = SummaryWriter(str(lab.workdir.path / "metrics" / name))

    def log(first: int, values: dict[str, np.ndarray]) -> None:
        loss = values["loss"].reshape(len(values["loss"]), -1, len(members)).mean(1)
        for step, row in enumerate(loss, first):
            for member, value in zip(members, row):
                writer.add_scalar(f"loss/{member}", value, step)
        writer.flush()

    return log


def depends_on(config: ConfigDict, runs: range, *parts: str, **more: Any) -> dict[str, Any]:
    """What an artefact depends on: the runs, the network, and the named parts of the config."""
    base = {name: plain(config)[name] for name in ("seed", "model", "precision", *parts)}
    return {**base, **more, "run_numbers": list(runs)}


def artefact_bytes(config: ConfigDict) -> int:
    """Disk space that a run may need: what it keeps, and the checkpoints on the way."""
    widths = (images.PIXELS, *[config.model.width] * config.model.depth, vocab(config))
    params = 4 * sum(inputs * outputs + outputs for inputs, outputs in zip(widths, widths[1:]))
    doses = len(config.clone.epochs) if "clone" in config.arms else 0
    kept = config.runs * params * (1 + len(config.arms) + 4 * doses)
    return kept + 9 * config.runs_at_once * params * (len(config.arms) + doses)


def arm(config: ConfigDict, name: str, values: list[float]) -> dict[str, Any]:
    """One entry of results.json."""
    published, published_half_width = config.published.get(name, (None, None))
    title = TITLES.get(name) or f"student cloned for {name.removeprefix('clone ')} epochs (auxiliary logits)"
    return report.accuracy_arm(title, values, paper=published, paper_ci95=published_half_width)


def dose_curve(arms: dict[str, dict[str, Any]]) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Accuracy over the epochs of cloning, the uncloned cross-init student at 0 and the reference's own as the aim."""
    doses = {name.removeprefix("clone "): entry for name, entry in arms.items() if name.startswith("clone ")}
    if len(doses) < 2:
        return {}
    if "cross_auxiliary" in arms:
        doses = {"0": arms["cross_auxiliary"], **doses}
    points = [{**entry, "value": dose, "name": "cloned student"} for dose, entry in doses.items()]
    if "auxiliary" in arms:
        points += [{**arms["auxiliary"], "value": dose, "name": "same-init student"} for dose in doses]
    return {"cloning": ("epochs of cloning the reference before distillation", points)}


def span(runs: range) -> str:
    return f"{runs.start}-{runs.stop - 1}"
