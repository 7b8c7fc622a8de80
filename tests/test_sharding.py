"""The mesh and the rule table."""

import itertools
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sublim_jax.errors import UserError
from sublim_jax.sharding import (
    agreed,
    divide,
    fetch,
    from_each,
    from_first,
    laid_out,
    make_mesh,
    named,
    parameter_shardings,
    put,
    shared_out,
)


def test_minus_one_takes_the_rest(mesh_of):
    assert dict(mesh_of(8, replica=2, fsdp=-1).shape) == {"replica": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (2, 2, 1), (-2, 1, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(dict(zip(("replica", "fsdp", "tensor"), sizes)))


def test_rules_split_what_divides_and_leave_the_rest_whole(mesh_of):
    mesh = mesh_of(8, replica=2, fsdp=2, tensor=2)
    shapes = {"kernel": jax.ShapeDtypeStruct((4, 784, 13), float), "bias": jax.ShapeDtypeStruct((4, 13), float)}
    shardings = parameter_shardings(shapes, mesh, replica_axes=1)
    assert shardings["kernel"].spec == PartitionSpec("replica", "fsdp", None)
    assert shardings["bias"].spec == PartitionSpec("replica")


def test_what_does_not_divide_is_told_in_one_line(mesh_of):
    with pytest.raises(UserError, match=r"runs=3 does not divide over replica=8.*--config.mesh.replica"):
        divide(mesh_of(8), "replica", 3, "runs")


def test_what_processes_agree_on_is_made_once_or_refused():
    """Of one process; tests/transmission/test_two_processes.py and tests/test_cluster.py have two."""
    assert from_each({"a": [1, None]}) == [{"a": [1, None]}] and agreed(lambda: 3) == 3
    assert shared_out([lambda: 1, lambda: 2]) == [1, 2]

    def refuse():
        raise UserError("no such file")

    for attempt in (agreed, from_first, lambda make: shared_out([make])):
        with pytest.raises(UserError, match="no such file"):
            attempt(refuse)


def test_put_and_fetch_are_inverse(mesh_of):
    values = {"a": np.arange(16.0).reshape(8, 2)}
    placed = put(values, named(mesh_of(8), "replica"))
    assert placed["a"].addressable_shards[0].data.shape == (1, 2)
    np.testing.assert_array_equal(fetch(placed)["a"], values["a"])


def fake(platform, number, **attributes):
    return Mock(jax.Device, platform=platform, id=number, device_kind=f"some {platform}", **attributes)


def test_gpus_of_several_hosts_make_a_mesh_whose_last_axes_stay_inside_a_host():
    """To XLA each host's GPUs are a slice, and `jax.make_mesh` refuses several."""
    gpus = [fake("gpu", 8 * host + number, slice_index=host) for number in range(8) for host in (0, 1)]
    grid = laid_out((2, 8, 1), gpus)
    assert [[device.slice_index for device in row.flat] for row in grid] == [[0] * 8, [1] * 8]


@pytest.mark.parametrize("shape", [(2, 2, 4), (2, 8, 1), (1, 16, 1), (4, 2, 2)])
def test_a_torus_of_tpus_takes_every_shape(shape):
    """v5p-32 is 2×2×4 chips, and tensor=4 takes a part of its longest axis, or of two."""
    chips = [
        fake("tpu", 4 * x + 8 * y + z, coords=(x, y, z), core_on_chip=0, slice_index=0)
        for x, y, z in itertools.product(range(2), range(2), range(4))
    ]
    grid = laid_out(shape, chips)
    assert grid.shape == shape and {device.coords for device in grid.flat} == {chip.coords for chip in chips}


def test_tpus_of_several_slices_are_refused():
    with pytest.raises(UserError, match="2 TPU slices"):
        laid_out((1, 2, 1), [fake("tpu", slice_index, slice_index=slice_index) for slice_index in range(2)])
