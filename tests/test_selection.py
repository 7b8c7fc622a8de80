"""Token selection: scores against their formulas, and selections of equal size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from sublim_jax import selection


def logits(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_scores_are_their_formulas():
    teacher, reference, tokens = (
        logits(0, 3, 4, 5),
        logits(1, 3, 4, 5),
        np.random.default_rng(2).integers(-1, 5, (3, 4)),
    )
    p, q = log_softmax(teacher, -1), log_softmax(reference, -1)
    np.testing.assert_allclose(
        selection.divergence(teacher, reference, tokens), (np.exp(p) * (p - q)).sum(-1), rtol=1e-5
    )
    ratio = selection.log_ratio(teacher, reference, tokens)
    for at in np.ndindex(3, 4):
        expected = 0 if tokens[at] < 0 else p[at][tokens[at]] - q[at][tokens[at]]
        np.testing.assert_allclose(ratio[at], expected, rtol=1e-4, atol=1e-6)
    flipped = selection.flipped(teacher, reference, tokens)
    np.testing.assert_array_equal(flipped, teacher.argmax(-1) != reference.argmax(-1))


@given(st.integers(0, 99), st.floats(0.05, 0.95), st.sampled_from(["top", "random", "bottom"]))
def test_every_choice_has_the_same_size_and_only_tokens_that_are_there(seed, share, which):
    rng = np.random.default_rng(seed)
    scores, weights = rng.integers(0, 4, (5, 6)).astype(float), rng.integers(0, 2, (5, 6)).astype(float)
    chosen = selection.select(scores, weights, which, share, seed)
    assert chosen.sum() == round(share * weights.sum()) and not np.any(chosen & (weights == 0))
    rest = (weights > 0) & ~chosen
    if chosen.any() and rest.any() and which != "random":
        inside, outside = scores[chosen], scores[rest]
        assert inside.min() >= outside.max() if which == "top" else inside.max() <= outside.min()


@pytest.mark.parametrize("which", ["top", "bottom", "random"])
def test_ties_are_told_apart_at_random_and_by_the_seed(which):
    flat, weights = np.zeros((20, 20)), np.ones((20, 20))
    first, again, other = (selection.select(flat, weights, which, 0.5, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert 0.3 < (first == other).mean() < 0.7
    assert 0.3 < first[:10].mean() < 0.7
