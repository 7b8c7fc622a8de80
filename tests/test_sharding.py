"""The mesh and the rule table."""

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
