"""Shared by forecast, trajectory and examples: the lemma's inner product in the MNIST experiment."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array

from sublim_jax import assets, objectives, theorem
from sublim_jax.data import images
from sublim_jax.data.mnist import Mnist, load
from sublim_jax.experiments.along_training.spec import AlongSpec
from sublim_jax.experiments.mnist import train
from sublim_jax.experiments.mnist.run import Prepared, prepare
from sublim_jax.experiments.mnist.spec import MnistSpec, check_divides
from sublim_jax.models.functional import Params
from sublim_jax.sharding import fetch, make_mesh, map_replicas
from sublim_jax.store import Store
from sublim_jax.workdir import claim

Output = TypeVar("Output")


def claimed(spec: AlongSpec, folder: epath.Path, update: bool) -> tuple[Mnist, Store, Mesh]:
    """MNIST, the store of the claimed folder and the mesh, which is checked against all settings of `spec`."""
    mesh = make_mesh(spec.mesh.sizes)
    for setting in spec.settings:
        check_divides(setting, mesh)
    data = load(assets.fetch(assets.MNIST, spec.data.path))
    return data, claim(folder, spec.values, update=update), mesh


def objective_of(spec: MnistSpec) -> theorem.Objective:
    """The student's objective on the auxiliary logits."""
    where = {"support": train.support(spec.student_network, "auxiliary"), "temperature": spec.student.temperature}
    return partial(objectives.ON_LOGITS[spec.student.objective], **where)


def before_training(spec: MnistSpec, runs: range, data: Mnist, *, store: Store, mesh: Mesh) -> Prepared:
    """Some runs, before their students are trained."""
    program = train.teaching_program(spec.teacher_network, spec.teacher, mesh)
    return prepare(spec, runs, data, program=program, store=store, mesh=mesh)


def over_runs(spec: MnistSpec, function: Callable[..., Output], mesh: Mesh) -> Callable[..., Output]:
    """Maps `function(apply, codes, *trees)` over runs: a jitted function of (codes, *trees).

    `apply` takes pixels as bytes. Inputs that all runs share, `codes` with two axes, are not stacked.
    """
    network = train.network(spec.student_network)

    def apply(params: Params, codes: Array) -> Array:
        return network.apply(params, images.pixels(codes, spec.inputs.kind))

    def all_of(codes: Array, *trees: Params) -> Output:
        if codes.ndim == 2:
            return map_replicas(partial(function, apply, codes), mesh)(*trees)
        return map_replicas(partial(function, apply), mesh)(codes, *trees)

    return jax.jit(all_of)


def difference(after: Params, before: Params) -> Params:
    """θ_T - θ⁰."""
    return jax.tree.map(jnp.subtract, after, before)


def coverages(spec: MnistSpec, runs: range, probe: int, data: Mnist, *, store: Store, mesh: Mesh) -> list[float]:
    """cos(−∇ of the student's loss, θ_T - θ⁰) of every run, before the student is trained."""
    before = before_training(spec, runs, data, store=store, mesh=mesh)

    def coverage_of_run(apply: theorem.Apply, codes: Array, reference: Params, teacher: Params, start: Params) -> Array:
        targets = apply(teacher, codes)
        update = theorem.student_update(apply, objective_of(spec), start, codes, targets)
        return theorem.coverage(update, difference(teacher, reference))

    networks = [part.params for part in (before.reference, before.teacher, before.near)]
    return fetch(over_runs(spec, coverage_of_run, mesh)(before.codes[..., :probe, :], *networks)).tolist()
