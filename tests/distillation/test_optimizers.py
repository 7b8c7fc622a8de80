"""The optimisers of students and of teachers on corpora."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sublim_jax.distillation.students import Training, optimizer
from sublim_jax.distillation.teachers import CorpusTraining, corpus_optimizer

RATE, WARMUP, STEPS = 0.1, 3, 10


def rates(made, steps):
    """The learning rate of each update: with a constant gradient, Adam's update is minus the rate."""
    params, taken = {"w": jnp.zeros(2)}, []
    state = made.init(params)
    for _ in range(steps):
        updates, state = made.update({"w": jnp.array([2.0, -5.0])}, state, params)
        taken.append(np.asarray(updates["w"]) * [-1, 1])
    np.testing.assert_allclose(np.asarray(taken)[:, 0], np.asarray(taken)[:, 1], rtol=1e-4)
    return np.asarray(taken)[:, 0]


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
    ],
)
def test_a_schedule_rises_for_the_warmup_and_falls_over_the_rest(schedule, factor, warmup):
    training = Training(RATE, schedule, warmup=warmup, clip=0.0, batch=1, accumulate=1, steps=STEPS)
    rising = [RATE * step / warmup for step in range(warmup)]
    falling = [RATE * factor(step / (STEPS - warmup)) for step in range(STEPS - warmup)]
    np.testing.assert_allclose(rates(optimizer(training), STEPS), rising + falling, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("clip", "norms"), [(1.0, (1.0, 0.5)), (0.0, (50.0, 0.5))])
def test_gradients_are_clipped_by_their_norm_over_all_arrays(clip, norms):
    training = Training(RATE, "constant", warmup=0, clip=clip, batch=1, accumulate=1, steps=STEPS)
    made = optimizer(training)
    for scale, norm in zip((10.0, 0.1), norms):
        gradient = {"w": scale * jnp.array([3.0]), "v": scale * jnp.array([4.0])}
        _, state = made.update(gradient, made.init(gradient), gradient)
        moments = optax.tree.get(state, "mu")
        np.testing.assert_allclose(math.hypot(*moments["w"], *moments["v"]), 0.1 * norm, rtol=1e-5)


def test_a_teacher_of_a_corpus_trains_for_its_epochs_with_a_rate_that_ends_at_zero():
    made, steps = corpus_optimizer(CorpusTraining(RATE, batch=4, epochs=2), count=10)
    assert steps == 6  # three batches an epoch, the last of two conversations
    np.testing.assert_allclose(rates(made, steps), [RATE * (1 - step / 6) for step in range(6)], rtol=1e-4)
