"""Which examples carry the trait: students on the noise images that contribute most or least to the lemma's A."""

from functools import partial
from typing import TypedDict

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sublim_jax import report, theorem
from sublim_jax.data.mnist import Mnist
from sublim_jax.errors import UserError
from sublim_jax.evaluation.statistics import t_interval
from sublim_jax.experiments.along_training import coverage
from sublim_jax.experiments.along_training.spec import ExamplesSpec
from sublim_jax.experiments.along_training.spec import check_typed as check_typed
from sublim_jax.experiments.along_training.spec import read as read_spec
from sublim_jax.experiments.mnist import train
from sublim_jax.experiments.mnist.report import accuracy_arm
from sublim_jax.experiments.mnist.run import Prepared, students_of
from sublim_jax.experiments.mnist.spec import MnistSpec
from sublim_jax.figures import OURS, Line, Panel, arms_figure, panels_figure
from sublim_jax.measurements import Measurements, from_array
from sublim_jax.models.functional import Params
from sublim_jax.sharding import fetch, named, put
from sublim_jax.store import Store, digest

ByChoice = dict[str, list[float]]  # a value for every run


class Ranked(TypedDict):
    accuracy: ByChoice
    carried: ByChoice
    quantiles: list[list[float]]


LEVELS = np.linspace(0, 1, 51)
CHOICES = {"top": "largest contributions", "random": "random", "bottom": "smallest contributions"}


read = partial(read_spec, ExamplesSpec)


def run(spec: ExamplesSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Trains students on the images of the largest contributions, of the smallest, and on random ones."""
    data, store, mesh = coverage.claimed(spec, folder, update)
    whole, part = spec.settings
    with jax.default_matmul_precision(whole.precision):
        inputs = (whole, part, range(whole.runs), data)
        measured = store.json("examples", rank_and_train, *inputs, store=store, mesh=mesh)
    axes = {"item": [f"quantile {level:.2f}" for level in LEVELS], "run": range(whole.runs)}
    rows = from_array(np.transpose(measured["quantiles"]), axes, arm="all", measure="contribution over its mean")
    for measure, values in {"test_accuracy": measured["accuracy"], "share_of_A": measured["carried"]}.items():
        for choice in CHOICES:
            rows += from_array(values[choice], arm=choice, measure=measure)
    report.finish(store.folder, spec, rows, document)


def rank_and_train(spec: MnistSpec, part: MnistSpec, runs: range, data: Mnist, *, store: Store, mesh: Mesh) -> Ranked:
    """{"accuracy": choice → runs, "carried": choice → share of A by run, "quantiles": (runs, levels)}."""
    before = coverage.before_training(spec, runs, data, store=store, mesh=mesh)
    carried = contributions(spec, before, mesh)
    if not np.all(np.isfinite(carried)):
        raise UserError("mnist.teacher: a teacher has diverged; choose a smaller learning_rate")
    order = np.argsort(carried, axis=1)
    rng = np.random.default_rng(spec.seed)
    shuffled = np.stack([rng.permutation(row) for row in order])
    count = part.inputs.count
    chosen = {"top": order[:, -count:], "random": shuffled[:, :count], "bottom": order[:, :count]}
    quantiles = np.quantile(carried, LEVELS, axis=1).T
    return {
        "accuracy": train_on(part, before, chosen, data, store=store, mesh=mesh),
        "carried": {
            name: (np.take_along_axis(carried, rows, 1).sum(1) / carried.sum(1)).tolist()
            for name, rows in chosen.items()
        },
        "quantiles": (quantiles / carried.mean(1, keepdims=True)).tolist(),
    }


def contributions(spec: MnistSpec, before: Prepared, mesh: Mesh) -> Float[np.ndarray, "runs images"]:
    """The contribution of every image to A, for every run."""

    def per_image(apply: theorem.Apply, codes: Array, reference: Params, teacher: Params) -> Float[Array, "images"]:
        direction = coverage.difference(teacher, reference)
        return theorem.contributions(apply, coverage.objective_of(spec), reference, direction, codes, chunk=1000)

    measure = coverage.over_runs(spec, per_image, mesh)
    return fetch(measure(before.codes, before.reference.params, before.teacher.params))


def train_on(
    spec: MnistSpec,
    before: Prepared,
    chosen: dict[str, Int[np.ndarray, "runs rows"]],
    data: Mnist,
    *,
    store: Store,
    mesh: Mesh,
) -> ByChoice:
    """Test accuracy of students on each choice of images, by run."""
    program = train.distilling_program(spec.student_network, spec.teacher_network, spec.student, spec.inputs, mesh)
    codes, split, start = before.codes, named(mesh, "replica"), {"auxiliary": before.near}
    take = jax.jit(jax.vmap(lambda codes, rows: codes[rows]), out_shardings=split)
    test, accuracies = put((data.test_images, data.test_labels), named(mesh)), {}
    for name, rows in chosen.items():
        some = take(codes, put(rows, split)) if codes.ndim == 3 else codes[rows]
        inputs = train.Inputs(spec.inputs, some, digest(before.inputs, rows))
        given = (spec, before.runs, before.teacher, inputs, start)
        student = students_of(*given, program=program, store=store, what=name)["auxiliary"]
        accuracies[name] = fetch(train.accuracy(before.near.functions, student, *test, mesh)).tolist()
    return accuracies


def document(spec: ExamplesSpec, rows: Measurements, notes: report.Notes) -> report.Document:
    count, runs = spec.settings[1].inputs.count, spec.mnist.runs
    random = np.asarray(rows.values(arm="random", measure="test_accuracy"))
    arms, table = [], [["images", "share of A", "test accuracy", "minus random, paired"]]
    for choice, words in CHOICES.items():
        accuracies, shares = (rows.values(arm=choice, measure=measure) for measure in ("test_accuracy", "share_of_A"))
        title = f"{100 * spec.share:.3g}% of the images, {words}"
        arm = accuracy_arm(title, accuracies, share_of_A=float(np.mean(shares)))
        paired = t_interval(np.asarray(accuracies) - random)
        differs = "" if choice == "random" else f"{paired.mean:+.3f}"
        if differs and runs > 1:
            differs += f" ± {paired.half_width:.3f}"
        table.append([title, f"{arm['share_of_A']:.3f}", report.plus_minus(arm["mean"], arm["ci95"]), differs])
        arms.append(arm)
    text = (
        "Each noise image contributes v(x)ᵀ M(x) v(x) to A, for D = θ_T − θ⁰ at the reference. Students are trained on "
        f"the {count} images of the largest contributions, of the smallest, or on as many random ones, for equally "
        f"many steps, in {runs} runs. Differences are paired over runs, with Student's 95 % interval."
    )
    quantiles = np.reshape(rows.values(arm="all"), (len(LEVELS), runs)).T
    style = {"color": OURS, "marker": "", "alpha": 0.5}
    lines = [Line("_" if run else "a run", LEVELS, row, style) for run, row in enumerate(quantiles)]
    panels = [Panel("quantile of the images", "contribution over its mean", lines, title="contributions of images")]
    figures = {"examples": partial(arms_figure, arms), "contributions": partial(panels_figure, panels)}
    return arms, [report.Section("Which examples carry the trait", text, table, figures)]
