"""Beyond one step: alignment along a distillation run, and the ceiling of transfer (paper §6.1, App. C)."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sublim_jax import objectives, report, theorem
from sublim_jax.data import images
from sublim_jax.data.order import steps_per_epoch
from sublim_jax.errors import UserError
from sublim_jax.evaluation.statistics import normal_interval
from sublim_jax.experiments import mnist
from sublim_jax.experiments.coverage import (
    Result,
    before_training,
    check_variants,
    depends_on,
    difference,
    objective_of,
    over_runs,
    run_with_labs,
    variant_of,
)
from sublim_jax.experiments.door import check_whole
from sublim_jax.figures import Arm, Line, Panel, panels_figure
from sublim_jax.keys import run_keys
from sublim_jax.models.functional import Params
from sublim_jax.overrides import check_distinct
from sublim_jax.sharding import fetch, named, put
from sublim_jax.training import fit
from sublim_jax.workdir import Workdir


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Alignment along distillation, and the ceiling that the number of auxiliary logits sets."""
    check(config)
    run_with_labs(config, workdir, update, variants_of(config), partial(measure, config))


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value that makes no sense."""
    check_whole(config, ("every", "iterations"))
    if not config.auxiliary:
        raise UserError("auxiliary is empty: name some numbers of auxiliary logits, such as 2,3,5")
    check_distinct("auxiliary", config.auxiliary)
    check_variants(config, variants_of(config))


def variants_of(config: ConfigDict) -> list[ConfigDict]:
    """The MNIST config that is followed, and one for every number of auxiliary logits."""
    return [variant_of(config, change) for change in ({}, *({"model.auxiliary": m} for m in config.auxiliary))]


def measure(config: ConfigDict, labs: list[mnist.Lab]) -> Result:
    depends = depends_on(labs[0], probe=config.probe, every=config.every)
    path = labs[0].workdir.json("trajectory", depends, partial(_follow, labs[0], config))
    arms, ceiling = _ceilings(config, labs[1:])
    return arms, [_trajectory_section(config, path), ceiling]


def _follow(lab: mnist.Lab, config: ConfigDict) -> dict[str, Any]:
    """The student's training, measured every few steps: {quantity: (measurements, runs)}."""
    runs = range(lab.config.runs)
    reference, teacher, start, codes = before_training(lab)
    logits = mnist.answer(lab.networks["teacher"], teacher, codes, lab.config.inputs.kind, lab.mesh)
    real = put((lab.data.train_images[: config.probe], lab.data.train_labels[: config.probe]), named(lab.mesh))
    probe = codes[..., : config.probe, :]
    program = lab.distilling[lab.config.inputs.kind]
    found: dict[str, list[Any]] = {name: [] for name in ("step", "cosine", "toward", "loss", "predicted", "accuracy")}
    before: dict[str, Params] = {}

    def one(
        apply: theorem.Apply, codes: Array, params: Params, teacher: Params, reference: Params, last: Params
    ) -> dict[str, Array]:
        """The trait is the teacher's own objective: reading MNIST."""

        def trait_loss(params: Params) -> Array:
            logits = lab.networks["student"].apply(params, images.pixels(real[0]))
            labels = real[1].astype(jnp.int32)
            total, count = objectives.cross_entropy(logits, labels, support=mnist.support(lab.config, "digits"))
            return total / count

        update = theorem.student_update(apply, objective_of(lab.config), params, codes, apply(teacher, codes))
        trait = jax.tree.map(jnp.negative, jax.grad(trait_loss)(params))
        return {
            "cosine": theorem.coverage(update, trait),
            "toward": theorem.coverage(update, difference(teacher, reference)),
            "loss": trait_loss(params),
            "predicted": theorem.alignment(jax.grad(trait_loss)(last), difference(params, last)),
        }

    measure_runs = over_runs(lab, one)

    def evaluate(params: Params, step: int) -> None:
        params = jax.tree.map(lambda leaf: leaf[:, 0], params)
        last = before.get("params", params)
        values = fetch(measure_runs(probe, params, teacher, reference, last))
        values["accuracy"] = fetch(lab.accuracy["student"](params))
        before["params"] = jax.tree.map(jnp.copy, params)
        found["step"].append(step)
        for name, value in values.items():
            found[name].append(np.asarray(value).tolist())

    supports = jnp.stack([mnist.support(lab.config, "auxiliary")])
    fit(
        program,
        program.init(jax.tree.map(lambda leaf: leaf[:, None], start)),
        steps=lab.config.student.epochs * steps_per_epoch(lab.config.inputs.count, lab.config.student.batch),
        key=run_keys(lab.config.seed, "student", runs),
        frozen={"supports": put(supports, named(lab.mesh)), "codes": codes, "logits": logits},
        evaluate=evaluate,
        evaluate_every=config.every,
        what="students, measured on the way",
    )
    return found


def _trajectory_section(config: ConfigDict, path: dict[str, Any]) -> report.Section:
    steps = np.asarray(path["step"])
    cosine, toward, loss, predicted, accuracy = (
        np.asarray(path[name]) for name in ("cosine", "toward", "loss", "predicted", "accuracy")
    )
    linear = loss[:1] + np.cumsum(predicted, 0)
    change = np.diff(loss, axis=0)
    right = float(np.mean(np.sign(change) == np.sign(predicted[1:])))
    first, last = cosine[0], cosine[-1]
    text = (
        f"{len(cosine[0])} runs of the student on auxiliary logits ({config.mnist.student.optimizer}), measured every "
        f"{config.every} steps. The trait is what the teacher was trained on, cross-entropy on MNIST. The cosine of "
        f"the student's update with the trait's is {np.mean(first):.3f} at the start and {np.mean(last):.3f} at the "
        f"end; it is positive at {np.mean(cosine > 0):.0%} of the measurements. The trait's loss goes from "
        f"{np.mean(loss[0]):.3f} to {np.mean(loss[-1]):.3f}; first-order changes, summed over the intervals, say "
        f"{np.mean(linear[-1]):.3f}, and have the right sign in {right:.0%} of the intervals."
    )
    table = [["step", "cos(update, trait)", "cos(update, θ_T − θ⁰)", "trait loss", "first order", "accuracy"]]
    for index in np.unique(np.linspace(0, len(steps) - 1, 11).astype(int)):
        values = (cosine, toward, loss, linear, accuracy)
        table.append([str(steps[index]), *(f"{np.mean(value[index]):.3f}" for value in values)])

    def draw(where: Any) -> None:
        panels = [
            Panel(
                "step",
                "cosine",
                [_banded("with the trait's update", steps, cosine), _banded("with θ_T − θ⁰ (coverage)", steps, toward)],
                title="the student's update",
            ),
            Panel(
                "step",
                "cross-entropy on MNIST",
                [_banded("measured", steps, loss), _banded("first order, summed", steps, linear, ls="--")],
                title="the trait's loss",
            ),
            Panel("step", "test accuracy", [_banded("student", steps, accuracy)], title="what comes of it"),
        ]
        panels_figure(panels, where)

    return report.Section("Beyond one step", text, table, {"trajectory": draw})


def _banded(label: str, x: np.ndarray, runs: np.ndarray, **style: Any) -> Line:
    """The mean over runs with its 95 % interval."""
    intervals = [normal_interval(row) for row in runs]
    band = [0.0 if math.isnan(interval.half_width) else interval.half_width for interval in intervals]
    return Line(label, x, [interval.mean for interval in intervals], {"marker": "", **style}, band)


def _ceilings(config: ConfigDict, labs: list[mnist.Lab]) -> tuple[list[Arm], report.Section]:
    """The share of θ_T - θ⁰ in the row space that each number of auxiliary logits leaves, against accuracy."""

    def shares(lab: mnist.Lab) -> list[list[float]]:
        reference, teacher, _, codes = before_training(lab)

        def one(apply: theorem.Apply, codes: Array, reference: Params, teacher: Params) -> Float[Array, "iterations"]:
            direction = difference(teacher, reference)
            arguments = (apply, objective_of(lab.config), reference, direction, codes)
            return theorem.row_space_shares(*arguments, iterations=config.iterations)

        return fetch(over_runs(lab, one)(codes[..., : config.probe, :], reference, teacher)).tolist()

    arms, lines, table = [], [], [["auxiliary logits", "share of θ_T − θ⁰", "test accuracy"]]
    iterations = np.arange(1, config.iterations + 1)
    for lab in labs:
        depends = depends_on(lab, probe=config.probe, iterations=config.iterations)
        found = np.asarray(lab.workdir.json("shares", depends, partial(shares, lab)))
        accuracy = mnist.accuracies(lab)["auxiliary"]
        share = normal_interval(found[:, -1])
        more = {"row_space_share": share.mean, "row_space_share_runs": found[:, -1].tolist()}
        arm = report.accuracy_arm(f"{lab.config.model.auxiliary} auxiliary logits", accuracy, **more)
        arms.append(arm)
        lines.append(_banded(arm["name"], iterations, found.T))
        accuracy_text = report.plus_minus(arm["mean"], arm["ci95"])
        table.append([str(lab.config.model.auxiliary), report.plus_minus(*share), accuracy_text])
    points = [Line(arm["name"], [arm["row_space_share"]], [arm["mean"]], {"marker": "o", "ms": 8}) for arm in arms]
    x = "conjugate-gradient iterations"
    panels = [
        Panel(x, "share of |θ_T − θ⁰|² in the row space", lines, ("log", "linear")),
        Panel(f"share after {config.iterations} iterations", "test accuracy", points),
    ]
    text = (
        f"The share of |θ_T − θ⁰|² that lies in the row space of the student's curvature on {config.probe} noise "
        f"images at θ⁰, found by {config.iterations} steps of conjugate gradients: a lower bound that grows in the "
        "order in which gradient steps learn. A linear student under gradient flow could not gain more."
    )
    return arms, report.Section("The ceiling", text, table, {"ceiling": partial(panels_figure, panels)})
