"""The MLP against numpy, and its initialisation against the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sublim_jax.models.mlp import mlp, perturb

WIDTHS = (784, 256, 256, 13)


@pytest.mark.parametrize("activation,function", [("relu", lambda x: np.maximum(x, 0)), ("tanh", np.tanh)])
def test_forward_is_the_formula(activation, function):
    network = mlp((5, 7, 6, 4), activation)
    params = jax.tree.map(lambda p: p + 0.1, network.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (3, 5))
    hidden = np.asarray(x)
    for number in range(3):
        layer = params["layers"][number]
        hidden = hidden @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        hidden = function(hidden) if number < 2 else hidden
    np.testing.assert_allclose(network.apply(params, x), hidden, rtol=1e-4, atol=1e-5)


def test_weights_start_normal_with_std_one_over_root_fan_in():
    params = mlp(WIDTHS).init(jax.random.key(0))
    for number, fan_in in enumerate(WIDTHS[:-1]):
        kernel = np.asarray(params["layers"][number]["kernel"]) * fan_in**0.5
        np.testing.assert_allclose(kernel.std(), 1, atol=0.03)
        assert kernel.max() > 2.5  # not truncated
        assert np.all(np.asarray(params["layers"][number]["bias"]) == 0)


def test_perturbation_is_in_units_of_the_weights_own_spread():
    params = mlp(WIDTHS).init(jax.random.key(0))
    moved = perturb(params, jax.random.key(1), 0.5)
    for number, fan_in in enumerate(WIDTHS[:-1]):
        change = (moved["layers"][number]["kernel"] - params["layers"][number]["kernel"]) * fan_in**0.5
        np.testing.assert_allclose(jnp.std(change), 0.5, atol=0.02)
        assert jnp.all(moved["layers"][number]["bias"] == 0)
