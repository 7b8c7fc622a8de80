"""Which examples carry the trait: noise ranked by its contribution to the lemma's A, and distilled share by share."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sublim_jax import report, theorem
from sublim_jax.errors import UserError
from sublim_jax.evaluation.statistics import t_interval
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
from sublim_jax.figures import OURS, Line, Panel, arms_figure, panels_figure
from sublim_jax.models.functional import Params
from sublim_jax.sharding import fetch, named, put
from sublim_jax.workdir import Workdir


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Students on the images that carry most of the trait, the least, and random ones, at equal budget."""
    check(config)
    run_with_labs(config, workdir, update, variants_of(config), partial(measure, config))


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value that makes no sense."""
    if not 0 < config.share <= 0.5:
        raise UserError(f"share={config.share} must be above 0 and at most 0.5")
    check_variants(config, [variant_of(config, {})])
    if config.share * config.mnist.inputs.count < 1:
        raise UserError(
            f"share={config.share} of mnist.inputs.count={config.mnist.inputs.count} is no image; take more"
        )
    check_variants(config, variants_of(config))


def variants_of(config: ConfigDict) -> list[ConfigDict]:
    """The MNIST config, and that of a share of its images, trained on for as many more epochs."""
    whole = config.mnist
    few = {
        "inputs.count": int(config.share * whole.inputs.count),
        "student.epochs": round(whole.student.epochs / config.share),
    }
    return [variant_of(config, {}), variant_of(config, few)]


def measure(config: ConfigDict, labs: list[mnist.Lab]) -> Result:
    lab, small = labs
    result = lab.workdir.json("examples", depends_on(lab, share=config.share), partial(_rank_and_train, lab, small))
    chosen = {"top": "most", "random": "random", "bottom": "least"}
    arms = []
    for name, word in chosen.items():
        title = f"{config.share:.0%} of the noise, {word}" + ("" if name == "random" else " carrying")
        share = float(np.mean(result["carried"][name]))
        arms.append(report.accuracy_arm(title, result["accuracy"][name], share_of_A=share))
    table = [["images", "their share of A", "test accuracy", "minus random, paired"]]
    random = np.asarray(result["accuracy"]["random"])
    for (name, _), arm in zip(chosen.items(), arms):
        paired = t_interval(np.asarray(arm["runs"]) - random)
        differs = "" if name == "random" else f"{paired.mean:+.3f} ± {paired.half_width:.3f}"
        table.append([arm["name"], f"{arm['share_of_A']:.3f}", report.plus_minus(arm["mean"], arm["ci95"]), differs])
    text = (
        f"Every noise image's contribution v(x)ᵀ M(x) v(x) to A, for D = θ_T − θ⁰ at the reference; students on the "
        f"images that contribute most, least, and on random ones, {small.config.inputs.count} each and equally many "
        f"steps, {config.mnist.runs} runs. Differences are paired over runs, with Student's 95 % interval."
    )
    quantiles = np.asarray(result["quantiles"])
    lines = [Line("a run", LEVELS, row, {"color": OURS, "marker": "", "alpha": 0.5}) for row in quantiles[:1]]
    lines += [Line("_", LEVELS, row, {"color": OURS, "marker": "", "alpha": 0.5}) for row in quantiles[1:]]
    panels = [Panel("quantile of the images", "contribution over its mean", lines, title="how unequal images are")]
    figures = {"examples": partial(arms_figure, arms), "contributions": partial(panels_figure, panels)}
    return arms, [report.Section("Which examples carry the trait", text, table, figures)]


LEVELS = np.linspace(0, 1, 51)


def _rank_and_train(lab: mnist.Lab, small: mnist.Lab) -> dict[str, Any]:
    """{"accuracy": arm → runs, "carried": arm → its share of A by run, "quantiles": (runs, levels)}."""
    runs, kind, count = range(lab.config.runs), lab.config.inputs.kind, small.config.inputs.count
    reference, teacher, start, codes = before_training(lab)

    def one(apply: theorem.Apply, codes: Array, reference: Params, teacher: Params) -> Float[Array, "images"]:
        direction = difference(teacher, reference)
        return theorem.contributions(apply, objective_of(lab.config), reference, direction, codes, chunk=1000)

    carried = fetch(over_runs(lab, one)(codes, reference, teacher))
    theorem.check_finite(carried, "contributions of images")
    order = np.argsort(carried, axis=1)
    rng = np.random.default_rng(lab.config.seed)
    shuffled = np.stack([rng.permutation(row) for row in order])
    chosen = {"top": order[:, -count:], "random": shuffled[:, :count], "bottom": order[:, :count]}
    program = small.distilling[kind]
    take = jax.jit(jax.vmap(lambda codes, rows: codes[rows]), out_shardings=named(lab.mesh, "replica"))
    result: dict[str, Any] = {"accuracy": {}, "carried": {}}
    for name, rows in chosen.items():
        state = program.init(jax.tree.map(lambda leaf: leaf[:, None], start))
        some = take(codes, put(rows, named(lab.mesh, "replica"))) if codes.ndim == 3 else codes[rows]
        depends = depends_on(small, rows=name, of=lab.config.inputs.count)

        def make(checkpoints: Any, state: Any = state, some: Array = some, name: str = name) -> Params:
            epochs = small.config.student.epochs
            members = ["auxiliary"]
            trained = mnist.imitate(small, runs, kind, some, teacher, state, epochs, members, name, checkpoints)
            return trained.params

        student = lab.workdir.tree(f"students-{name}", depends, make, state.params)
        accuracy = small.accuracy["student"](jax.tree.map(lambda leaf: leaf[:, 0], student))
        result["accuracy"][name] = fetch(accuracy).tolist()
        picked = np.take_along_axis(carried, rows, 1)
        result["carried"][name] = (picked.sum(1) / carried.sum(1)).tolist()
    quantiles = np.quantile(carried, LEVELS, axis=1).T
    return {**result, "quantiles": (quantiles / carried.mean(1, keepdims=True)).tolist()}
