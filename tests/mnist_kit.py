"""A small MNIST noise distillation: a spec, part of the data, teachers and students."""

from typing import Any, NamedTuple

from jax.sharding import Mesh

from configs import mnist as configs
from sublim_jax.data.mnist import Mnist
from sublim_jax.experiments.mnist import run, train
from sublim_jax.experiments.mnist.spec import MnistSpec
from sublim_jax.experiments.mnist.train import Inputs, Networks, Runs
from sublim_jax.store import Store


def tiny(**changes) -> MnistSpec:
    """The smoke preset, smaller; `student__epochs=2` changes config.student.epochs."""
    config = configs.get_config("smoke")
    config.inputs.count = 400
    config.teacher.batch = config.student.batch = 128
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return run.read(config)


def some(data: Mnist, count: int = 600) -> Mnist:
    parts = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    return Mnist(*(part[:count] for part in parts))


class Trained(NamedTuple):
    runs: Runs
    inputs: Inputs
    reference: Networks
    teacher: Networks
    students: dict[str, Any]


def distilled(spec, data: Mnist, store: Store, mesh: Mesh, arms=("auxiliary",), teacher_runs=None) -> Trained:
    """Distils two runs; the references of `teacher_runs` replace the teachers if they are given."""
    programs = run.programs_of(spec, mesh)
    known = run.prepare(spec, range(2), data, program=programs.teaching, store=store, mesh=mesh)
    teacher = known.teacher
    if teacher_runs:
        others = Runs(spec.seed, teacher_runs, spec.precision)
        teacher = train.references(others, spec.teacher_network, mesh)
    starts, program = dict.fromkeys(arms, known.reference), programs.distilling[spec.inputs]
    students = run.students_of(spec, known.runs, teacher, known.inputs, starts, program=program, store=store)
    return Trained(known.runs, known.inputs, known.reference, teacher, students)
