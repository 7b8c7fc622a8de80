"""Inputs, the order they are read in, and random keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sublim_jax.data import images
from sublim_jax.data.order import epoch_rows, shuffled, steps_per_epoch
from sublim_jax.keys import named_key, run_keys


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_the_order_is_a_permutation(size, seed):
    order = shuffled(jax.random.key(seed), jnp.arange(size), size)
    assert sorted(np.asarray(order)) == list(range(size))


def test_every_permuted_pair_is_equally_likely():
    size, draws = 12, 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    orders = np.asarray(jax.jit(jax.vmap(lambda key: shuffled(key, jnp.arange(size), size)))(keys))
    assert stats.chisquare(np.bincount((orders + size * np.arange(size)).ravel())).pvalue > 1e-4
    pairs = np.bincount(orders[:, 2] * size + orders[:, 7], minlength=size**2).reshape(size, size)
    assert stats.chisquare(pairs[~np.eye(size, dtype=bool)]).pvalue > 1e-4


@pytest.mark.parametrize("size,batch", [(10, 4), (8, 4), (3, 8)])
def test_an_epoch_reads_every_row_once_and_the_next_in_another_order(size, batch):
    steps = steps_per_epoch(size, batch)
    epochs = []
    for epoch in range(2):
        read = []
        for index in range(epoch * steps, (epoch + 1) * steps):
            rows, exists = epoch_rows(jax.random.key(1), jnp.int32(index), size, batch)
            read += list(np.asarray(rows)[np.asarray(exists)])
        assert sorted(read) == list(range(size))
        epochs.append(read)
    assert size < 5 or epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", images.NOISE_KINDS)
def test_noise_has_mean_zero_and_mean_square_one_third(kind):
    pixels = images.pixels(images.draw(jax.random.key(0), kind, 4100, blur=1.5), kind)
    assert pixels.shape == (4100, 784)
    np.testing.assert_allclose(pixels.mean(), 0, atol=5e-3)
    np.testing.assert_allclose(jnp.mean(pixels**2), 1 / 3, rtol=0.01)


def test_uniform_noise_is_uniform_and_blurred_noise_is_smooth():
    uniform = np.asarray(images.draw(jax.random.key(0), "uniform", 500))
    assert stats.chisquare(np.bincount(uniform.ravel(), minlength=256)).pvalue > 1e-4
    values = np.asarray(images.pixels(jnp.asarray(uniform), "uniform"))
    assert -1 < values.min() < -0.99 and 0.99 < values.max() < 1

    def neighbours(kind):
        grid = np.asarray(images.pixels(images.draw(jax.random.key(0), kind, 500, blur=1.0), kind)).reshape(-1, 28, 28)
        return np.corrcoef(grid[:, 10, 10], grid[:, 10, 11])[0, 1]

    assert abs(neighbours("gaussian")) < 0.2
    # A gaussian of width b correlates neighbours by exp(-1 / 4 b²).
    np.testing.assert_allclose(neighbours("blurred"), np.exp(-0.25), atol=0.06)


def test_shuffled_pixels_keep_each_images_histogram():
    real = jax.random.bits(jax.random.key(0), (5, 784), jnp.uint8)
    moved = images.shuffle_pixels(jax.random.key(1), real)
    np.testing.assert_array_equal(np.sort(real, -1), np.sort(moved, -1))
    assert not np.array_equal(real, moved)


def test_real_pixels_span_minus_one_to_one():
    np.testing.assert_allclose(images.pixels(jnp.array([0, 255], jnp.uint8)), [-1, 1])


def test_mnist_is_the_real_one(mnist_data):
    assert mnist_data.train_images.shape == (60_000, 784) and mnist_data.test_images.shape == (10_000, 784)
    np.testing.assert_array_equal(mnist_data.train_labels[:5], [5, 0, 4, 1, 9])
    np.testing.assert_allclose(mnist_data.train_images.mean() / 255, 0.1307, atol=1e-4)


def test_a_runs_key_is_its_own():
    """It does not depend on the other runs; other names and seeds give other keys."""
    data = lambda keys: np.asarray(jax.random.key_data(keys))  # noqa: E731
    np.testing.assert_array_equal(data(run_keys(0, "x", [5]))[0], data(run_keys(0, "x", range(10)))[5])
    assert len({tuple(data(named_key(seed, name))) for seed in (0, 1) for name in ("x", "y")}) == 4
