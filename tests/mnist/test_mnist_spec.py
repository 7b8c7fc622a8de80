"""The typed spec of `configs/mnist.py`, and its sweeps."""

import pytest
from mnist_kit import tiny

from configs import mnist as configs
from sublim_jax.errors import UserError
from sublim_jax.experiments.mnist.run import check_typed, read
from sublim_jax.experiments.mnist.spec import POINTS, check_divides, variants


def test_a_sweep_is_one_spec_for_each_value():
    config = configs.get_config("sweep")
    assert [point.model.auxiliary for point in variants(read(config)).values()] == [1, 2, 3, 5, 10]
    config.sweep.axis, config.sweep.points = "student.learning_rate", ("1e-4", "1")
    assert [point.student.learning_rate for point in variants(read(config)).values()] == [1e-4, 1.0]
    config.sweep.axis, config.sweep.points = "inputs.fresh", ("true", "false")
    assert [point.inputs.fresh for point in variants(read(config)).values()] == [True, False]


def test_every_axis_has_a_ladder_that_passes_the_checks(mesh_of):
    for axis in POINTS:
        config = configs.get_config("architectures" if axis.startswith("student") else "paper")
        config.sweep.axis, config.sweep.points = axis, ()
        for point in variants(read(config)).values():
            check_divides(point, mesh_of(1))


def test_how_something_is_computed_or_shown_makes_no_other_spec():
    spec = tiny()
    changes = dict(preset="quick", checkpoint_every=1, mesh__fsdp=2, data__path="x", sweep__axis="model.width")
    same = tiny(runs_at_once=1, **changes)
    assert same.values != spec.values and same == spec != tiny(seed=1)


@pytest.mark.parametrize("points, expected", [(("1", "1.0"), "all different"), (("1", "0"), "student.epochs=0: ")])
def test_a_point_of_a_sweep_that_makes_no_sense_is_told(points, expected):
    config = configs.get_config("sweep")
    config.sweep.axis = "student.epochs" if "0" in points else "student.learning_rate"
    config.sweep.points = points
    with pytest.raises(UserError, match=expected):
        read(config)


def test_a_sweep_over_students_changes_several_values_at_a_point():
    config = configs.get_config("architectures")
    config.sweep.points = ("activation=gelu", "width=128/depth=3", "optimizer=sgd/learning_rate=1")
    points = variants(read(config))
    assert [point.student_network.widths for point in points.values()] == [
        (784, 256, 256, 60),
        (784, 128, 128, 128, 60),
        (784, 256, 256, 60),
    ]
    assert {point.teacher_network.widths for point in points.values()} == {(784, 256, 256, 60)}
    assert [point.student.optimizer for point in points.values()] == ["adam", "adam", "sgd"]


@pytest.mark.parametrize(
    "points, expected",
    [
        (("gelu", "sigmoid"), "name=value"),
        (("width=8", "colour=red"), "there is no config.student.colour"),
        (("width=8", "width=wide"), "a whole number"),
        (("width=8", "width=8/depth=2"), None),
    ],
)
def test_a_point_of_several_values_that_makes_no_sense_is_told(points, expected):
    config = configs.get_config("architectures")
    config.sweep.points = points
    if expected is None:
        assert len(variants(read(config))) == 2
        return
    with pytest.raises(UserError, match=expected):
        read(config)


@pytest.mark.parametrize("name, value", [("width", 64), ("depth", 1), ("biases", False)])
def test_a_student_of_another_shape_cannot_start_at_the_reference(name, value):
    assert (
        tiny(**{f"student__{name}": value}, arms=("cross_auxiliary", "clone")).student_network != tiny().student_network
    )
    with pytest.raises(UserError, match="arms: students of auxiliary start at the reference"):
        tiny(**{f"student__{name}": value})
    assert tiny(student__activation="gelu")  # which has the same parameters


@pytest.mark.parametrize("key, words", [("clone.epochs", "the arm clone"), ("inputs.blur", "inputs.kind=blurred")])
def test_a_typed_value_that_nothing_reads_is_told(key, words):
    with pytest.raises(UserError, match=words):
        check_typed(tiny(arms=("auxiliary",)), [key])
    check_typed(tiny(arms=("auxiliary", "clone"), inputs__kind="blurred"), [key])


@pytest.mark.parametrize(
    "changes, keys, words",
    [
        ({"arms": ("cross_auxiliary",)}, ["student.init_distance"], "start at the reference"),
        ({"arms": ("cross_auxiliary",)}, ["student.shared_layers"], "start at the reference"),
        ({"arms": ("real",)}, ["inputs.kind"], "digits"),
        ({"sweep__axis": "inputs.blur"}, [], r"sweep.axis=inputs.blur: .*inputs.kind=blurred"),
        ({"arms": ("cross_auxiliary",), "sweep__axis": "student.init_distance"}, [], "start at the reference"),
        (
            {
                "arms": ("cross_auxiliary",),
                "sweep__axis": "student",
                "sweep__points": ("init_distance=0.1/width=64", "width=32"),
            },
            [],
            r"sweep.axis=student: student.init_distance is of students that start at the reference",
        ),
    ],
)
def test_a_value_that_no_arm_reads_is_told_also_as_the_axis_of_a_sweep(changes, keys, words):
    with pytest.raises(UserError, match=words):
        check_typed(tiny(**changes), keys)
    swept = tiny(sweep__axis="inputs.kind", sweep__points=("uniform", "blurred"))
    check_typed(swept, ["inputs.blur", "student.init_distance", "inputs.kind"])


@pytest.mark.parametrize("changes", [{"inputs__fresh": True}, {"inputs__kind": "real"}])
def test_two_names_of_the_same_inputs_of_clones_are_told(changes):
    other = "fresh_noise" if "inputs__fresh" in changes else "real"
    with pytest.raises(UserError, match=f"noise, as in distillation, is {other} here"):
        tiny(arms=("auxiliary", "clone"), clone__inputs=("noise", other), **changes)


def test_only_noise_that_is_drawn_can_be_drawn_afresh():
    with pytest.raises(UserError, match=r"fresh_noise: .*shuffled is not drawn noise"):
        tiny(inputs__kind="shuffled", clone__inputs=("fresh_noise",))
