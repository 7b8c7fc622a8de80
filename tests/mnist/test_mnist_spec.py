"""Values of `configs/mnist.py` in types, and their sweeps."""

import pytest
from mnist_kit import tiny

from configs import mnist as configs
from sublim_jax.errors import UserError
from sublim_jax.experiments.mnist.run import read
from sublim_jax.experiments.mnist.spec import POINTS, check_divides, variants


def test_a_sweep_is_one_spec_for_each_value():
    config = configs.get_config("sweep")
    assert [point.model.auxiliary for point in variants(read(config)).values()] == [1, 2, 3, 5, 10]
    config.sweep.axis, config.sweep.points = "student.learning_rate", ("1e-4", "1")
    assert [point.student.learning_rate for point in variants(read(config)).values()] == [1e-4, 1.0]
    config.sweep.axis, config.sweep.points = "inputs.fresh", ("true", "false")
    assert [point.inputs.fresh for point in variants(read(config)).values()] == [True, False]


def test_every_axis_has_a_ladder_that_passes_the_checks(mesh_of):
    config = configs.get_config("quick")
    for axis in POINTS:
        config.sweep.axis = axis
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
