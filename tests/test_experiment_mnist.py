"""The experiment's exact laws (paper §6.2), its knobs, and that devices and grouping change nothing."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sublim_jax.data.mnist import Mnist
from sublim_jax.experiments import mnist
from sublim_jax.experiments.mnist_check import POINTS, check, variants
from sublim_jax.keys import run_keys
from sublim_jax.workdir import Workdir

CONFIG = Path(__file__).parents[1] / "configs" / "mnist.py"
spec = importlib.util.spec_from_file_location("mnist_config", CONFIG)
configs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(configs)


def tiny(**changes):
    config = configs.get_config("smoke")
    config.inputs.count = 400
    config.teacher.batch = config.student.batch = 128
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def some_mnist(mnist_data):
    return Mnist(*(part[:600] for part in mnist_data))


@pytest.fixture
def lab_of(tmp_path, some_mnist, mesh_of):
    def make(config, mesh=None, name="work"):
        mesh = mesh or mesh_of(1)
        check(config, mesh)
        return mnist.make_lab(config, Workdir(tmp_path / name), mesh, some_mnist)

    return make


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b)))


def distilled(lab, runs, arms, teacher=None):
    reference = mnist.references(lab, runs)
    teacher = teacher or mnist.train_teacher(lab, runs, reference)
    kind = lab.config.inputs.kind
    codes = mnist.draw_inputs(lab, runs, kind)
    return reference, teacher, mnist.distil(lab, runs, kind, codes, teacher, {arm: reference for arm in arms})


def test_teacher_training_leaves_the_auxiliary_rows_to_the_bit(lab_of):
    lab = lab_of(tiny())
    reference = mnist.references(lab, range(2))
    teacher = mnist.train_teacher(lab, range(2), reference)
    last = lab.config.model.depth
    for name in ("kernel", "bias"):
        before, after = reference["layers"][last][name], teacher["layers"][last][name]
        assert jnp.array_equal(before[..., 10:], after[..., 10:])
        assert not jnp.array_equal(before[..., :10], after[..., :10])


def test_auxiliary_distillation_leaves_the_digit_rows_to_the_bit(lab_of):
    lab = lab_of(tiny())
    reference, _, students = distilled(lab, range(2), ["auxiliary", "all"])
    last = lab.config.model.depth
    for name in ("kernel", "bias"):
        before = reference["layers"][last][name]
        assert jnp.array_equal(before[..., :10], students["auxiliary"]["layers"][last][name][..., :10])
        assert not jnp.array_equal(before[..., 10:], students["auxiliary"]["layers"][last][name][..., 10:])
        assert not jnp.array_equal(before[..., :10], students["all"]["layers"][last][name][..., :10])


@pytest.mark.parametrize("objective", ["kl", "reverse_kl", "sampled"])
def test_one_auxiliary_logit_leaves_the_student_at_the_reference_to_the_bit(lab_of, objective):
    lab = lab_of(tiny(model__auxiliary=1, student__objective=objective))
    reference, teacher, students = distilled(lab, range(2), ["auxiliary"])
    assert same(reference, students["auxiliary"])
    assert not same(reference, teacher)


def test_squared_error_on_one_auxiliary_logit_does_move_it(lab_of):
    lab = lab_of(tiny(model__auxiliary=1, student__objective="squared_error"))
    reference, _, students = distilled(lab, range(2), ["auxiliary"])
    assert not same(reference, students["auxiliary"])


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_only_the_trained_layers_move(lab_of, who):
    lab = lab_of(tiny(**{f"{who}__trained_layers": "1"}))
    reference, teacher, students = distilled(lab, range(2), ["all"])
    trained = {"teacher": teacher, "student": students["all"]}[who]["layers"]
    assert [same(reference["layers"][i], trained[i]) for i in range(3)] == [True, False, True]


def test_shared_layers_and_distance_make_the_start(lab_of):
    runs = range(2)
    lab = lab_of(tiny(student__shared_layers="0+2"))
    reference = mnist.references(lab, runs)
    foreign = jax.tree.map(lambda leaf: leaf[::-1], reference)
    start = mnist.near_start(lab.config, runs, reference, foreign)["layers"]
    assert same(start[0], reference["layers"][0]) and same(start[2], reference["layers"][2])
    assert same(start[1], foreign["layers"][1])

    moved = mnist.near_start(tiny(student__init_distance=0.3), runs, reference, foreign)["layers"]
    change = moved[0]["kernel"] - reference["layers"][0]["kernel"]
    np.testing.assert_allclose(jnp.std(change) * 28, 0.3, rtol=0.05)


def test_cross_init_is_a_derangement():
    config = tiny(runs=7, runs_at_once=3)
    others = [mnist.derangement(config, runs) for runs in (range(0, 3), range(3, 6), range(6, 7))]
    flat = [other for part in others for other in part]
    assert sorted(flat) == list(range(7)) and all(run != other for run, other in enumerate(flat))


def test_a_longer_cloning_goes_on_from_a_shorter_one(lab_of):
    """The dose curve is one trajectory: 2 epochs in two stages are 2 epochs in one, to the bit."""
    results = []
    for doses in ((1, 2), (2,)):
        lab = lab_of(tiny(clone__epochs=doses), name=str(doses))
        reference = mnist.references(lab, range(2))
        codes = mnist.draw_inputs(lab, range(2), "uniform")
        results.append(mnist.clone(lab, range(2), codes, reference, jax.tree.map(lambda x: x[::-1], reference)))
    assert same(results[0]["clone 2"], results[1]["clone 2"])
    assert not same(results[0]["clone 1"], results[0]["clone 2"])


KNOBS = [
    dict(student__objective="kl", student__temperature=2.0),
    dict(student__objective="reverse_kl", student__optimizer="sgd", student__learning_rate=0.1),
    dict(student__objective="squared_error", inputs__kind="gaussian"),
    dict(student__objective="sampled", inputs__kind="blurred"),
    dict(inputs__kind="shuffled", student__activation="gelu"),
    dict(inputs__kind="real", student__optimizer="adamw", model__depth=1),
    dict(inputs__fresh=True, student__optimizer="lion"),
    dict(inputs__fresh=True, inputs__kind="blurred", student__optimizer="rmsprop", clone__inputs="real"),
]


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: "-".join(map(str, knobs.values())))
def test_every_knob_trains(lab_of, knobs):
    """A student of all logits moves towards its teacher, here a far one: another reference."""
    lab = lab_of(tiny(**knobs, teacher__activation=knobs.get("student__activation", "relu")))
    teacher = mnist.references(lab, [5, 6])
    reference, _, students = distilled(lab, range(2), ["all"], teacher)
    codes = mnist.draw_inputs(lab, range(2), "gaussian" if lab.config.inputs.fresh else lab.config.inputs.kind)
    if codes is None:
        codes = jax.vmap(lambda key: mnist.images.draw(key, "gaussian", 400))(run_keys(0, "x", range(2)))
    distance = []
    for params in (reference, students["all"]):
        ours, target = (
            mnist.answer(lab.networks["student"], p, codes, "gaussian", lab.mesh) for p in (params, teacher)
        )
        ours, target = (jax.nn.log_softmax(z) for z in (ours, target))
        distance.append(float(jnp.mean(jnp.sum(jnp.exp(target) * (target - ours), -1))))
    assert np.isfinite(distance[1]) and distance[1] < distance[0]


def test_devices_and_grouping_change_nothing_but_rounding(lab_of, mesh_of):
    """1 device, 8 devices on one axis and on three, and runs trained one group after another."""
    config = tiny(runs=8, runs_at_once=8, arms=("auxiliary", "cross_all"))
    base = mnist.accuracies(lab_of(config, name="one"))
    meshes = {"eight": mesh_of(8), "three axes": mesh_of(8, replica=2, fsdp=2, tensor=2)}
    for name, mesh in meshes.items():
        other = mnist.accuracies(lab_of(config, mesh, name))
        for arm in base:  # an image at the border may flip: at most 2 of 600
            np.testing.assert_allclose(other[arm], base[arm], atol=2.1 / 600, err_msg=f"{name}, {arm}")
    config.runs_at_once = 3
    grouped = mnist.accuracies(lab_of(config, name="grouped"))
    for arm in base:
        np.testing.assert_allclose(grouped[arm], base[arm], atol=2.1 / 600, err_msg=arm)


def test_a_second_run_computes_nothing_and_a_changed_part_redoes_what_it_touches(lab_of, monkeypatch):
    trained = []
    fit = mnist.fit

    def spy(*args, what, **options):
        trained.append(what)
        return fit(*args, what=what, **options)

    monkeypatch.setattr(mnist, "fit", spy)
    first = mnist.accuracies(lab_of(tiny()))
    assert len(trained) == 5
    trained.clear()
    assert mnist.accuracies(lab_of(tiny())) == first
    assert trained == []
    mnist.accuracies(lab_of(tiny(student__learning_rate=1e-3)))
    assert len(trained) == 4 and not any("teacher" in what for what in trained)
    trained.clear()
    mnist.accuracies(lab_of(tiny(teacher__activation="tanh")))
    assert len(trained) == 5  # clones too: they imitate the reference, as that activation has it


def test_a_sweep_is_one_config_for_each_value():
    config = configs.get_config("sweep")
    assert [c.model.auxiliary for c in variants(config).values()] == [1, 2, 3, 5, 10]
    config.sweep.axis, config.sweep.points = "student.learning_rate", ("1e-4", "1")
    assert [c.student.learning_rate for c in variants(config).values()] == [1e-4, 1.0]
    config.sweep.axis, config.sweep.points = "inputs.fresh", ("true", "false")
    assert [c.inputs.fresh for c in variants(config).values()] == [True, False]


def test_every_axis_has_a_ladder_that_passes_the_checks(mesh_of):
    config = configs.get_config("quick")
    for axis in POINTS:
        config.sweep.axis = axis
        for variant in variants(config).values():
            check(variant, mesh_of(1))


@pytest.mark.slow
def test_the_papers_finding(mnist_data, mesh_of, tmp_path):
    """Four runs of the paper's recipe: auxiliary logits on noise carry digits, if and only if the start is shared."""
    config = configs.get_config("quick")
    config.arms = ("auxiliary", "cross_auxiliary")
    values = mnist.accuracies(mnist.make_lab(config, Workdir(tmp_path), mesh_of(1), mnist_data))
    assert np.mean(values["teacher"]) > 0.93
    assert np.mean(values["auxiliary"]) > 0.4
    assert np.mean(values["cross_auxiliary"]) < 0.2
