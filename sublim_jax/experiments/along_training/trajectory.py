"""Beyond one step: alignment along a distillation run, and the ceiling of transfer (paper §6.1, App. C)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sublim_jax import objectives, report, theorem
from sublim_jax.data import images
from sublim_jax.data.mnist import Mnist
from sublim_jax.data.order import steps_per_epoch
from sublim_jax.evaluation.statistics import normal_interval
from sublim_jax.experiments.along_training import coverage
from sublim_jax.experiments.along_training.spec import TrajectorySpec
from sublim_jax.experiments.along_training.spec import check_typed as check_typed
from sublim_jax.experiments.along_training.spec import read as read_spec
from sublim_jax.experiments.mnist import train
from sublim_jax.experiments.mnist.report import accuracy_arm
from sublim_jax.experiments.mnist.run import test_accuracies
from sublim_jax.experiments.mnist.spec import MnistSpec
from sublim_jax.figures import Entry, Line, Panel, banded, panels_figure
from sublim_jax.measurements import Measurements, from_array
from sublim_jax.models.functional import Params
from sublim_jax.sharding import fetch, named, put
from sublim_jax.store import Store
from sublim_jax.training import fit

QUANTITIES = ("cosine", "toward", "loss", "predicted", "accuracy")


read = partial(read_spec, TrajectorySpec)


def run(spec: TrajectorySpec, folder: epath.Path, *, update: bool = False) -> None:
    """Measures alignment along distillation, and the ceiling for each number of auxiliary logits."""
    data, store, mesh = coverage.claimed(spec, folder, update)
    rows = []
    with jax.default_matmul_precision(spec.mnist.precision):
        runs = range(spec.mnist.runs)
        inputs = (spec.mnist, runs, spec.probe, spec.every, data)
        path = store.json("trajectory", follow, *inputs, store=store, mesh=mesh)
        axes = {"step": path["step"], "run": runs}
        for name in QUANTITIES:
            rows += from_array(path[name], axes, arm="followed", measure=name)
        for setting in spec.settings:
            arm = arm_name(setting)
            inputs = (setting, runs, spec.probe, spec.iterations, data)
            shares = store.json("shares", row_space_shares, *inputs, store=store, mesh=mesh)
            axes = {"step": range(1, spec.iterations + 1), "run": runs}
            rows += from_array(np.transpose(shares), axes, arm=arm, measure="row_space_share")
            accuracies = test_accuracies(setting, data, store, mesh)["auxiliary"]
            rows += from_array(accuracies, arm=arm, measure="test_accuracy")
    report.finish(store.folder, spec, rows, document)


def arm_name(spec: MnistSpec) -> str:
    return f"{spec.model.auxiliary} auxiliary logits"


def follow(
    spec: MnistSpec, runs: range, probe: int, every: int, data: Mnist, *, store: Store, mesh: Mesh
) -> dict[str, list[Any]]:
    """Trains the student and measures it every `every` steps: {quantity: (measurements, runs)}, and "step"."""
    known = coverage.before_training(spec, runs, data, store=store, mesh=mesh)
    reference, teacher, seen = known.reference.params, known.teacher.params, known.codes[..., :probe, :]
    network = train.network(spec.student_network)
    real = put((data.train_images[:probe], data.train_labels[:probe]), named(mesh))
    test = put((data.test_images, data.test_labels), named(mesh))
    measure_runs = coverage.over_runs(spec, quantities(spec, *real), mesh)
    history: dict[str, list[Any]] = {name: [] for name in ("step", *QUANTITIES)}
    before: dict[str, Params] = {}

    def evaluate(params: Params, step: int) -> None:
        params = train.member(params, 0)
        last = before.get("params", params)
        values = fetch(measure_runs(seen, params, teacher, reference, last))
        values["accuracy"] = fetch(train.accuracy(network, params, *test, mesh))
        before["params"] = jax.tree.map(jnp.copy, params)
        history["step"].append(step)
        for name, value in values.items():
            history[name].append(np.asarray(value).tolist())

    program = train.distilling_program(spec.student_network, spec.teacher_network, spec.student, spec.inputs, mesh)
    fit(
        program,
        train.begin(program, {"auxiliary": known.near}).state,
        steps=spec.student.epochs * steps_per_epoch(spec.inputs.count, spec.student.batch),
        key=known.runs.keys("student"),
        frozen=train.targets(known.teacher, known.inputs, ["auxiliary"], mesh),
        evaluate=evaluate,
        evaluate_every=every,
        what="students, measured on the way",
    )
    return history


def quantities(spec: MnistSpec, codes: Array, labels: Array) -> Callable[..., dict[str, Array]]:
    """Measures one run's student; the trait is the teacher's own objective, cross-entropy on these images."""
    network, digits = train.network(spec.student_network), train.support(spec.student_network, "digits")

    def trait_loss(params: Params) -> Array:
        logits = network.apply(params, images.pixels(codes))
        total, count = objectives.cross_entropy(logits, labels.astype(jnp.int32), support=digits)
        return total / count

    def quantities_of_run(
        apply: theorem.Apply, codes: Array, params: Params, teacher: Params, reference: Params, last: Params
    ) -> dict[str, Array]:
        update = theorem.student_update(apply, coverage.objective_of(spec), params, codes, apply(teacher, codes))
        trait = jax.tree.map(jnp.negative, jax.grad(trait_loss)(params))
        return {
            "cosine": theorem.coverage(update, trait),
            "toward": theorem.coverage(update, coverage.difference(teacher, reference)),
            "loss": trait_loss(params),
            "predicted": theorem.alignment(jax.grad(trait_loss)(last), coverage.difference(params, last)),
        }

    return quantities_of_run


def row_space_shares(
    spec: MnistSpec, runs: range, probe: int, iterations: int, data: Mnist, *, store: Store, mesh: Mesh
) -> list[list[float]]:
    """The share of θ_T - θ⁰ in the row space of the student's curvature: (runs, iterations)."""
    known = coverage.before_training(spec, runs, data, store=store, mesh=mesh)

    def shares(apply: theorem.Apply, codes: Array, reference: Params, teacher: Params) -> Float[Array, "iterations"]:
        direction = coverage.difference(teacher, reference)
        arguments = (apply, coverage.objective_of(spec), reference, direction, codes)
        return theorem.row_space_shares(*arguments, iterations=iterations)

    measure = coverage.over_runs(spec, shares, mesh)
    return fetch(measure(known.codes[..., :probe, :], known.reference.params, known.teacher.params)).tolist()


def document(spec: TrajectorySpec, rows: Measurements, notes: report.Notes) -> report.Document:
    arms, ceiling = _ceilings(spec, rows)
    return arms, [_trajectory_section(spec, rows), ceiling]


def over_steps(spec: TrajectorySpec, rows: Measurements, **given: str) -> Float[np.ndarray, "steps runs"]:
    return np.reshape(rows.values(**given), (-1, spec.mnist.runs))


def _trajectory_section(spec: TrajectorySpec, rows: Measurements) -> report.Section:
    steps = np.asarray(rows.names("step", measure="loss"))
    cosine, toward, loss, predicted, accuracy = (
        over_steps(spec, rows, arm="followed", measure=name) for name in QUANTITIES
    )
    linear = loss[:1] + np.cumsum(predicted, 0)
    change = np.diff(loss, axis=0)
    right = float(np.mean(np.sign(change) == np.sign(predicted[1:])))
    first, last = cosine[0], cosine[-1]
    text = (
        f"{len(cosine[0])} runs of the student on auxiliary logits ({spec.mnist.student.optimizer}), measured every "
        f"{spec.every} steps. The trait is what the teacher was trained on, cross-entropy on MNIST. The cosine of "
        f"the student's gradient with the trait's is {np.mean(first):.3f} at the start and {np.mean(last):.3f} at the "
        f"end; it is positive at {np.mean(cosine > 0):.0%} of the measurements. The trait's loss goes from "
        f"{np.mean(loss[0]):.3f} to {np.mean(loss[-1]):.3f}; first-order changes, summed over the intervals, say "
        f"{np.mean(linear[-1]):.3f}, and have the right sign in {right:.0%} of the intervals."
    )
    table = [["step", "cos(gradient, trait's)", "cos(−gradient, θ_T − θ⁰)", "trait loss", "first order", "accuracy"]]
    for index in np.unique(np.linspace(0, len(steps) - 1, 11).astype(int)):
        values = (cosine, toward, loss, linear, accuracy)
        table.append([str(steps[index]), *(f"{np.mean(value[index]):.3f}" for value in values)])

    cosines = [
        banded("with the trait's", steps, cosine),
        banded("its negative with θ_T − θ⁰ (coverage)", steps, toward),
    ]
    losses = [banded("measured", steps, loss), banded("first order, summed", steps, linear, ls="--")]
    panels = [
        Panel("step", "cosine", cosines, title="the gradient of the student's loss"),
        Panel("step", "cross-entropy on MNIST", losses, title="the trait's loss"),
        Panel("step", "test accuracy", [banded("student", steps, accuracy)], title="the student's accuracy"),
    ]
    return report.Section("Beyond one step", text, table, {"trajectory": partial(panels_figure, panels)})


def _ceilings(spec: TrajectorySpec, rows: Measurements) -> tuple[list[Entry], report.Section]:
    """The share of θ_T - θ⁰ in the row space, for each number of auxiliary logits, against accuracy."""
    arms, lines, table = [], [], [["auxiliary logits", "share of θ_T − θ⁰", "test accuracy"]]
    iterations = np.arange(1, spec.iterations + 1)
    for setting in spec.settings:
        name = arm_name(setting)
        shares = over_steps(spec, rows, arm=name, measure="row_space_share")
        share = normal_interval(shares[-1])
        more = {"row_space_share": share.mean, "row_space_share_runs": shares[-1].tolist()}
        arm = accuracy_arm(name, rows.values(arm=name, measure="test_accuracy"), **more)
        arms.append(arm)
        lines.append(banded(name, iterations, shares))
        accuracy_text = report.plus_minus(arm["mean"], arm["ci95"])
        table.append([str(setting.model.auxiliary), report.plus_minus(*share), accuracy_text])
    dots = {"ls": "none", "marker": "o", "ms": 5}  # one for each run
    points = [Line(arm["name"], arm["row_space_share_runs"], arm["runs"], dots) for arm in arms]
    x = "conjugate-gradient iterations"
    panels = [
        Panel(x, "share of |θ_T − θ⁰|² in the row space", lines, ("log", "linear")),
        Panel(f"share after {spec.iterations} iterations", "test accuracy of each run", points),
    ]
    text = (
        f"The share of |θ_T − θ⁰|² that lies in the row space of the student's curvature on {spec.probe} noise "
        f"images at θ⁰, found by {spec.iterations} steps of conjugate gradients: a lower bound that grows in the "
        "order in which gradient steps learn. The share itself is what a linear student of these images could reach "
        "by gradient flow."
    )
    return arms, report.Section("The ceiling", text, table, {"ceiling": partial(panels_figure, panels)})
