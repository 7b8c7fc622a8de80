"""The pipeline, from the reference networks to the measurements."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from sublim_jax import assets, report, specs
from sublim_jax.data import images, mnist
from sublim_jax.experiments.mnist import train
from sublim_jax.experiments.mnist.report import document as document
from sublim_jax.experiments.mnist.spec import (
    MNIST_ROWS,
    InputsSpec,
    MnistSpec,
    NetworkSpec,
    check_divides,
    check_read,
    variants,
)
from sublim_jax.experiments.mnist.train import Inputs, Networks, Record, Runs
from sublim_jax.measurements import from_array
from sublim_jax.models.functional import Params
from sublim_jax.preflight import Step, parameters, training_step
from sublim_jax.sharding import fetch, make_mesh, named, put
from sublim_jax.store import Store, digest
from sublim_jax.training import Program
from sublim_jax.workdir import claim

# Of what is measured. A change of it gets another number, and a workdir of before is measured again, not mixed.
DEFINITION = 2


def read(config: ConfigDict) -> MnistSpec:
    """The spec of a config. Raises UserError for the first value, of it or of its sweep, that makes no sense."""
    spec = specs.read(MnistSpec, config)
    variants(spec)
    return spec


def check_typed(spec: MnistSpec, keys: Iterable[str]) -> None:
    """Raises UserError for a value that no arm, or no point of a sweep, reads; also for the axis of a sweep."""
    points, axis = variants(spec), spec.sweep.axis
    for key in keys:
        check_read(points.values(), key)
    if axis:
        check_read(points.values(), axis, f"sweep.axis={axis}: ")
    if axis in ("student", "teacher"):
        for name in {change.partition("=")[0] for point in points for change in point.split("/")}:
            check_read(points.values(), f"{axis}.{name}", f"sweep.axis={axis}: ")


def run(spec: MnistSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Runs the experiment, or a sweep of it, and writes measurements and a report to `folder`."""
    mesh = make_mesh(spec.mesh.sizes)
    points = variants(spec)
    for point in points.values():
        check_divides(point, mesh)
    data = mnist.load(assets.fetch(assets.MNIST, spec.data.path))
    store = claim(folder, spec.values, update=update, bytes_needed=sum(map(artefact_bytes, points.values())))
    rows = []
    for value, point in points.items():
        for arm, accuracies in test_accuracies(point, data, store, mesh).items():
            rows += from_array(accuracies, arm=arm, measure="test_accuracy", item=value)
    report.finish(store.folder, spec, rows, document)


class Programs(NamedTuple):
    """The training programs of a spec, compiled once for all groups of runs."""

    teaching: Program
    distilling: dict[InputsSpec, Program]


def programs_of(spec: MnistSpec, mesh: Mesh) -> Programs:
    student, teacher = spec.student_network, spec.teacher_network
    every = {spec.inputs, real(spec.inputs), *clone_inputs(spec).values()}
    distilling = {seen: train.distilling_program(student, teacher, spec.student, seen, mesh) for seen in every}
    return Programs(train.teaching_program(teacher, spec.teacher, mesh), distilling)


def clone_inputs(spec: MnistSpec) -> dict[str, InputsSpec]:
    """The inputs on which the reference is cloned, by the names in `clone.inputs`."""
    kinds = {
        "noise": spec.inputs,
        "fresh_noise": replace(spec.inputs, fresh=spec.inputs.kind in images.NOISE_KINDS),
        "real": real(spec.inputs),
    }
    return {name: kinds[name] for name in spec.clone.inputs} if spec.doses else {}


def real(inputs: InputsSpec) -> InputsSpec:
    """The same number of real images."""
    return replace(inputs, kind="real", fresh=False)


def test_accuracies(spec: MnistSpec, data: mnist.Mnist, store: Store, mesh: Mesh) -> dict[str, list[float]]:
    """Test accuracy of every arm, one value per run."""
    programs = programs_of(spec, mesh)
    parts = []
    with jax.default_matmul_precision(spec.precision):
        for runs in spec.groups:

            def measured(*_: object, runs: range = runs) -> dict[str, list[float]]:
                return train_and_test(spec, runs, data, programs=programs, store=store, mesh=mesh)

            parts.append(store.json(f"accuracy-{span(runs)}", measured, spec, runs, data, DEFINITION))
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


class Prepared(NamedTuple):
    """Some runs before their students are trained."""

    runs: Runs
    reference: Networks
    foreign: Networks  # references of other runs, with the student's architecture
    near: Networks  # where students start
    teacher: Networks
    inputs: Inputs

    @property
    def codes(self) -> Array:
        """The fixed inputs; not defined for fresh ones."""
        assert self.inputs.codes is not None
        return self.inputs.codes


def prepare(
    spec: MnistSpec, numbers: range, data: mnist.Mnist, *, program: Program, store: Store, mesh: Mesh
) -> Prepared:
    """References, students' starts and inputs, and the teachers, trained or read from the store."""
    runs = Runs(spec.seed, numbers, spec.precision)
    reference = train.references(runs, spec.teacher_network, mesh)
    foreign = train.references(train.next_runs(runs), spec.student_network, mesh)
    made_of = (runs, spec.teacher, reference, data)
    like = program.abstract(reference.params).params
    record = record_of(spec, store, runs, "teacher", "teacher")
    name = f"teacher-{span(numbers)}"
    params = store.tree(name, train.train_teacher, *made_of, like=like, program=program, record=record)
    teacher = Networks(spec.teacher_network, params, digest("teacher", *made_of))
    near = train.near_start(runs, spec.student, reference, foreign)
    return Prepared(runs, reference, foreign, near, teacher, train.draw_inputs(runs, spec.inputs, data, mesh))


def train_and_test(
    spec: MnistSpec, numbers: range, data: mnist.Mnist, *, programs: Programs, store: Store, mesh: Mesh
) -> dict[str, list[float]]:
    """The paper's method for some runs, trained together."""
    known = prepare(spec, numbers, data, program=programs.teaching, store=store, mesh=mesh)
    runs, reference, foreign, near, teacher, inputs = known
    starts = {"auxiliary": near, "all": near, "cross_auxiliary": foreign, "cross_all": foreign}
    starts = {name: start for name, start in starts.items() if name in spec.arms}
    for name, seen in clone_inputs(spec).items():
        cloning_inputs = inputs if seen == spec.inputs else train.draw_inputs(runs, seen, data, mesh)
        made = clones(spec, runs, reference, foreign, cloning_inputs, program=programs.distilling[seen], store=store)
        starts |= {f"clone {epochs} {name}": networks for epochs, networks in made.items()}
    program = programs.distilling[spec.inputs]
    students = students_of(spec, runs, teacher, inputs, starts, program=program, store=store) if starts else {}
    if "real" in spec.arms:
        digits, program = train.draw_inputs(runs, real(spec.inputs), data, mesh), programs.distilling[real(spec.inputs)]
        students |= students_of(spec, runs, teacher, digits, {"real": near}, program=program, store=store)

    test = put((data.test_images, data.test_labels), named(mesh))
    result = {"reference": train.accuracy(reference.functions, reference.params, *test, mesh)}
    result["teacher"] = train.accuracy(teacher.functions, teacher.params, *test, mesh)
    result |= {name: train.accuracy(near.functions, params, *test, mesh) for name, params in students.items()}
    return {name: [float(value) for value in fetch(values)] for name, values in result.items()}


def clones(
    spec: MnistSpec,
    runs: Runs,
    reference: Networks,
    foreign: Networks,
    inputs: Inputs,
    *,
    program: Program,
    store: Store,
) -> dict[int, Networks]:
    """Clones: foreign starts that imitate the *reference* on all logits first, by the number of epochs."""
    kind = "fresh noise" if inputs.spec.fresh else inputs.spec.kind
    record = record_of(spec, store, runs, f"clones-{kind.replace(' ', '-')}", f"clones on {kind} inputs")
    start, cloned = train.begin(program, {"all": foreign}), {}
    for epochs in spec.doses:
        made_of = (runs, replace(spec.student, epochs=epochs), reference, inputs, start)
        # The whole train state, so that the next dose continues from it.
        name = f"clone-{epochs}-{span(runs.numbers)}"
        state = store.tree(name, train.imitate, *made_of, like=start.state, program=program, record=record)
        start = replace(start, state=state, origin=digest(*made_of))
        cloned[epochs] = replace(foreign, params=train.member(state.params, 0), origin=start.origin)
    return cloned


def students_of(
    spec: MnistSpec,
    runs: Runs,
    teacher: Networks,
    inputs: Inputs,
    starts: Mapping[str, Networks],
    *,
    program: Program,
    store: Store,
    what: str = "students",
) -> dict[str, Params]:
    """Students from each of `starts` that imitate their run's teacher, all in one program."""
    kind, start = inputs.spec.kind, train.begin(program, starts)
    record = record_of(spec, store, runs, f"{what}-{kind}", f"{what} on {kind} inputs")

    # Clones have seen the noise that the key "student" draws.
    draws = "distillation" if inputs.spec.fresh else "student"
    made_of = (runs, spec.student, teacher, inputs, start)

    def make(*_: object, checkpoints: epath.Path) -> Params:
        return train.imitate(*made_of, program=program, record=record, checkpoints=checkpoints, draws=draws).params

    named_by = (*made_of, draws) if inputs.spec.fresh else made_of
    made = store.tree(f"students-{kind}-{span(runs.numbers)}", make, *named_by, like=start.state.params)
    return {name: train.member(made, index) for index, name in enumerate(starts)}


def record_of(spec: MnistSpec, store: Store, runs: Runs, name: str, label: str) -> Record:
    label, folder = f"{label}, runs {span(runs.numbers)} of {spec.runs}", f"{name}-{span(runs.numbers)}"
    if spec.point:
        label, folder = f"{label}, {spec.point}", f"{folder}-{spec.point.replace('/', ',').replace(' ', '')}"
    return Record(label, store.folder / "metrics" / folder, spec.checkpoint_every)


def span(runs: Sequence[int]) -> str:
    return f"{runs[0]}-{runs[-1]}"


def artefact_bytes(spec: MnistSpec) -> int:
    """Disk space that a run may need, for results and for checkpoints during training."""
    params = 5 * max(kernels(spec.teacher_network), kernels(spec.student_network))  # 4 bytes each, and biases
    kept = spec.runs * params * (1 + len(spec.arms) + 4 * spec.num_clones)
    return kept + 9 * spec.runs_at_once * params * (len(spec.arms) + spec.num_clones)


def preflight(spec: MnistSpec, devices: Sequence[jax.Device]) -> list[Step]:
    """The training steps of one group of runs, for `--preflight`."""
    mesh = make_mesh(spec.mesh.sizes, devices)
    with jax.default_matmul_precision(spec.precision):
        return [step for point in variants(spec).values() for step in _steps(point, mesh)]


def _steps(spec: MnistSpec, mesh: Mesh) -> list[Step]:
    check_divides(spec, mesh)
    programs, runs = programs_of(spec, mesh), len(spec.groups[0])
    seen = real(spec.inputs) if spec.arms == ("real",) else spec.inputs
    student, teacher = spec.student_network, spec.teacher_network
    split, whole = named(mesh, "replica"), named(mesh)

    def stacked(network: NetworkSpec, *counts: int) -> Params:
        return parameters(jax.eval_shape(train.network(network).init, jax.random.key(0)), mesh, *counts)

    def array(shape: tuple[int, ...], dtype: Any, sharding: Any = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    labelled = (array((MNIST_ROWS, images.PIXELS), jnp.uint8), array((MNIST_ROWS,), jnp.uint8))
    members = len([name for name in spec.arms if name not in ("clone", "real")]) + spec.num_clones or 1
    frozen: dict[str, Any] = {"supports": array((members, teacher.vocab), bool)}
    if seen.fresh:
        frozen["teacher"] = stacked(teacher, runs)
    else:
        shared = seen.kind == "real"
        codes = (seen.count, images.PIXELS)
        frozen["codes"] = array(codes, jnp.uint8) if shared else array((runs, *codes), jnp.uint8, split)
        frozen["logits"] = array((runs, seen.count, teacher.vocab), jnp.float32, split)
    text = f"{runs} runs at once"
    if spec.point:
        text += f", {spec.point}"
    teachers = partial(training_step, f"teachers, {text}", programs.teaching, stacked(teacher, runs), labelled)
    students = partial(
        training_step,
        f"students, {members} a run, {text}",
        programs.distilling[seen],
        stacked(student, runs, members),
        frozen,
    )
    return [
        teachers(6.0 * runs * kernels(teacher) * spec.teacher.batch),
        students(6.0 * runs * members * kernels(student) * spec.student.batch),
    ]


def kernels(network: NetworkSpec) -> int:
    """The number of weights of a network without biases."""
    return sum(inputs * outputs for inputs, outputs in pairwise(network.widths))
