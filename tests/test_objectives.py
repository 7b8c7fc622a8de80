"""Objectives against numpy, closed-form gradients and exact laws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, softmax

from sublim_jax import objectives

V = 6
LOGITS = arrays(np.float32, (4, V), elements=st.floats(-8, 8, width=32))
SUPPORTS = st.lists(st.booleans(), min_size=V, max_size=V).filter(any).map(np.array)
WEIGHTS = arrays(np.float32, 4, elements=st.floats(0, 3, width=32))


@settings(max_examples=50, deadline=None)
@given(LOGITS, LOGITS, SUPPORTS, WEIGHTS, st.sampled_from([0.5, 1.0, 3.0]))
def test_values_against_numpy(student, teacher, support, weights, temperature):
    z, y = student[:, support].astype(float) / temperature, teacher[:, support].astype(float) / temperature
    log_p, log_q = log_softmax(y, -1), log_softmax(z, -1)
    expected = {
        "kl": np.sum(np.exp(log_p) * (log_p - log_q), -1),
        "reverse_kl": np.sum(np.exp(log_q) * (log_q - log_p), -1),
        "squared_error": np.sum((z - y) ** 2, -1),
        "probability_squared_error": np.sum((np.exp(log_q) - np.exp(log_p)) ** 2, -1),
        "soft_cross_entropy": -np.sum(np.exp(log_p) * log_q, -1),
    }
    for name, objective in objectives.ON_LOGITS.items():
        total, count = objective(
            jnp.asarray(student),
            jnp.asarray(teacher),
            support=jnp.asarray(support),
            weights=jnp.asarray(weights),
            temperature=temperature,
        )
        np.testing.assert_allclose(total, np.sum(expected[name] * weights), rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(count, weights.sum(), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(LOGITS, LOGITS, SUPPORTS)
def test_gradients_against_closed_forms(student, teacher, support):
    """D KL / dz = softmax(z) - softmax(y) on the support, and exactly 0 outside."""
    where: dict[str, Any] = {"support": jnp.asarray(support)}
    gradient = jax.grad(lambda z: objectives.kl(z, jnp.asarray(teacher), **where)[0])(jnp.asarray(student))
    expected = softmax(student[:, support], -1) - softmax(teacher[:, support], -1)
    np.testing.assert_allclose(gradient[:, support], expected, atol=1e-5)
    for objective in objectives.ON_LOGITS.values():
        gradient = jax.grad(lambda z, f=objective: f(z, jnp.asarray(teacher), **where)[0])(jnp.asarray(student))
        assert np.all(np.isfinite(gradient))
        assert np.all(np.asarray(gradient)[:, ~support] == 0)


def test_one_logit_carries_nothing_through_a_softmax():
    """M = 1: KL and its gradient are 0 to the bit, for any logits (paper §6.2)."""
    z, y = jax.random.normal(jax.random.key(0), (2, 50, V)) * 5
    support = jnp.arange(V) == 3
    for objective in (objectives.kl, objectives.reverse_kl):
        total, gradient = jax.value_and_grad(lambda z, f=objective: f(z, y, support=support)[0])(z)
        assert total == 0 and np.all(np.asarray(gradient) == 0)


def test_cross_entropy_of_labels():
    z = jax.random.normal(jax.random.key(0), (3, 5, V))
    labels = jax.random.randint(jax.random.key(1), (3, 5), 0, 4)
    total, count = objectives.cross_entropy(z, labels, support=jnp.arange(V) < 4)
    expected = -np.take_along_axis(log_softmax(np.asarray(z)[..., :4], -1), np.asarray(labels)[..., None], -1).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == 15


def test_sampled_labels_have_the_gradient_of_kl_in_expectation():
    """Samples never fall outside the support. Bound: 5 standard errors of a mean of 20,000 bounded gradients."""
    z, y = jax.random.normal(jax.random.key(0), (2, V))
    support = jnp.arange(V) >= 3
    draws = 20_000
    labels = objectives.sample_labels(jax.random.key(1), jnp.broadcast_to(y, (draws, V)), support=support)
    assert set(np.unique(labels)) == {3, 4, 5}
    sampled = jax.grad(
        lambda z: objectives.cross_entropy(jnp.broadcast_to(z, (draws, V)), labels, support=support)[0] / draws
    )(z)
    exact = jax.grad(lambda z: objectives.kl(z, y, support=support)[0])(z)
    np.testing.assert_allclose(sampled, exact, atol=5 * 0.5 / draws**0.5)


@pytest.mark.parametrize("name", list(objectives.ON_LOGITS))
def test_sums_and_counts_add_up_over_micro_batches(name):
    z, y = jax.random.normal(jax.random.key(0), (2, 8, V))
    weights = jnp.arange(8.0) % 3
    f = objectives.ON_LOGITS[name]
    whole = f(z, y, weights=weights)
    parts = [f(z[i : i + 2], y[i : i + 2], weights=weights[i : i + 2]) for i in range(0, 8, 2)]
    np.testing.assert_allclose(whole, np.sum(parts, 0), rtol=1e-5)
