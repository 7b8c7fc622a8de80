"""MNIST noise distillation in the small, for tests: a spec, some of the data, teachers and students."""

from typing import NamedTuple

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
    students: dict


def distilled(spec, data: Mnist, store: Store, mesh: Mesh, arms=("auxiliary",), teacher_runs=None) -> Trained:
    """Two runs' students from their reference; their teachers, or the references of other runs in their place."""
    runs = Runs(spec.seed, range(2), spec.precision)
    programs = run.programs_of(spec, mesh)

    def references(runs):
        return train.references(runs, spec.model, spec.student.activation, mesh)

    reference = references(runs)
    if teacher_runs:
        teacher = references(Runs(spec.seed, teacher_runs, spec.precision))
    else:
        teacher = run.teacher_of(spec, runs, reference, data, program=programs.teaching, store=store)
    inputs = train.draw_inputs(runs, spec.inputs, data, mesh)
    starts, program = dict.fromkeys(arms, reference), programs.distilling[spec.inputs.kind]
    students = run.students_of(spec, runs, teacher, inputs, starts, program=program, store=store)
    return Trained(runs, inputs, reference, teacher, students)
