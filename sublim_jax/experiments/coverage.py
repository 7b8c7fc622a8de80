"""The lemma's inner product on the MNIST experiment: what forecast, trajectory and examples share."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from sublim_jax import assets, objectives, report, theorem
from sublim_jax.data import images
from sublim_jax.data import mnist as digits
from sublim_jax.errors import UserError
from sublim_jax.experiments import mnist
from sublim_jax.experiments.door import at, check_numbers
from sublim_jax.experiments.mnist_check import check
from sublim_jax.figures import Arm
from sublim_jax.models.functional import Params
from sublim_jax.sharding import each_replica, fetch, make_mesh
from sublim_jax.workdir import Workdir

# Of config.mnist, what the whole config says, and what it is there.
OUTSIDE = {"seed": 0, "data.path": "", "mesh.replica": -1, "mesh.fsdp": 1, "mesh.tensor": 1}

Result = tuple[list[Arm], list[report.Section]]


def run_with_labs(
    config: ConfigDict,
    workdir: Workdir,
    update: bool,
    variants: Sequence[ConfigDict],
    measure: Callable[[list[mnist.Lab]], Result],
) -> None:
    """Makes a lab of every MNIST config, which `check_variants` has checked, measures, and writes the report."""
    mesh = make_mesh(config.mesh.to_dict())
    for variant in variants:
        check(variant, mesh)
    data = digits.load(assets.fetch(assets.MNIST, config.data.path))
    workdir.open(config, update=update)
    with jax.default_matmul_precision(config.mnist.precision):
        arms, sections = measure([mnist.make_lab(variant, workdir, mesh, data) for variant in variants])
    report.write(workdir, config, arms, sections)


def check_variants(config: ConfigDict, variants: Sequence[ConfigDict]) -> None:
    """Raises UserError for the first value of a config, or of an MNIST config in it, that makes no sense."""
    check_numbers(config)
    for key, usual in OUTSIDE.items():
        if (given := at(config.mnist, key)) not in (usual, at(config, key)):
            raise UserError(f"mnist.{key}={given}: it is that of the whole; set --config.{key} instead")
    for variant in variants:
        try:
            mnist.check(variant)
            check_covered(variant)
        except UserError as error:
            raise UserError(f"config.mnist: {error}") from error
        if "probe" in config and not 0 < config.probe <= variant.inputs.count:
            raise UserError(f"probe={config.probe} must be between 1 and inputs.count={variant.inputs.count}")


def check_covered(variant: ConfigDict) -> None:
    """Raises UserError for an MNIST config of which coverage says nothing."""
    if variant.sweep.axis:
        raise UserError(f"sweep.axis={variant.sweep.axis!r}: a sweep is for configs/mnist.py; leave it out")
    if variant.runs_at_once < variant.runs:
        raise UserError("coverage takes all runs at once: set mnist.runs_at_once to mnist.runs")
    if variant.student.objective == "sampled" or variant.inputs.fresh:
        raise UserError("coverage needs an objective on logits, and fixed inputs: mnist.inputs.fresh=False")
    if variant.student.activation != variant.teacher.activation or variant.student.trained_layers != "all":
        raise UserError(
            "coverage is of one network, all of whose layers learn: give teacher and student the same activation, "
            "and leave mnist.student.trained_layers=all"
        )
    if "auxiliary" not in variant.arms:
        raise UserError(f"mnist.arms={tuple(variant.arms)}: coverage is of students of the auxiliary logits; add it")
    if variant.model.auxiliary < 2:
        raise UserError("auxiliary: a softmax over one logit is 1 whatever it is; take 2 logits or more")


def variant_of(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """The MNIST config with other values at some dotted paths, and the seed and the data of the whole."""
    variant = config.mnist.copy_and_resolve_references()
    variant.update_from_flattened_dict({"seed": config.seed, "data.path": config.data.path, **changes})
    return variant


def objective_of(config: ConfigDict) -> theorem.Objective:
    """The student's objective on the auxiliary logits."""
    student = config.student
    where = {"support": mnist.support(config, "auxiliary"), "temperature": student.temperature}
    return partial(objectives.ON_LOGITS[student.objective], **where)


def before_training(lab: mnist.Lab) -> tuple[Params, Params, Params, Array]:
    """(reference, teacher, the student's start, its inputs as bytes) of all runs."""
    config, runs = lab.config, range(lab.config.runs)
    reference = mnist.references(lab, runs)
    foreign = mnist.references(lab, mnist.derangement(config, runs))
    codes = mnist.draw_inputs(lab, runs, config.inputs.kind)
    assert codes is not None  # inputs.fresh is refused
    start = mnist.near_start(config, runs, reference, foreign)
    return reference, mnist.train_teacher(lab, runs, reference), start, codes


def over_runs(lab: mnist.Lab, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(apply, codes, *trees)` of every run, as a compiled function of (codes, *trees).

    `apply` reads bytes, and inputs that all runs share stay one.
    """
    kind, network = lab.config.inputs.kind, lab.networks["student"]

    def apply(params: Params, codes: Array) -> Array:
        return network.apply(params, images.pixels(codes, kind))

    def all_of(codes: Array, *trees: Params) -> Any:
        if codes.ndim == 2:
            return each_replica(partial(function, apply, codes), lab.mesh)(*trees)
        return each_replica(partial(function, apply), lab.mesh)(codes, *trees)

    return jax.jit(all_of)


def difference(after: Params, before: Params) -> Params:
    """θ_T - θ⁰."""
    return jax.tree.map(jnp.subtract, after, before)


def coverages(lab: mnist.Lab, probe: int) -> list[float]:
    """cos(the student's first update, θ_T - θ⁰) of every run, before any training of the student."""
    reference, teacher, start, codes = before_training(lab)

    def one(apply: theorem.Apply, codes: Array, reference: Params, teacher: Params, start: Params) -> Array:
        targets = apply(teacher, codes)
        update = theorem.student_update(apply, objective_of(lab.config), start, codes, targets)
        return theorem.coverage(update, difference(teacher, reference))

    return fetch(over_runs(lab, one)(codes[..., :probe, :], reference, teacher, start)).tolist()


def depends_on(lab: mnist.Lab, **more: Any) -> dict[str, Any]:
    """What a measurement on all runs of a lab depends on."""
    return mnist.depends_on(lab.config, range(lab.config.runs), "teacher", "student", "inputs", "runs", **more)
