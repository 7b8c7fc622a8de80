"""The cross-entropy of answers, against a plain computation."""

import jax
import jax.numpy as jnp
import numpy as np

from sublim_jax.data import dialogue
from sublim_jax.distillation.losses import POSITIONS, answer_features, cross_entropy


def test_the_cross_entropy_of_some_positions_at_a_time_is_that_of_all(tiny):
    rows = dialogue.rows(tiny, [("Numbers?", "1, 7, 42, " * 9), ("More?", "7")])
    assert rows.targets.shape[1] > POSITIONS and rows.targets.shape[1] % POSITIONS

    def loss(params, remat):
        module = tiny.network.bind(params)
        features = answer_features(tiny, module, rows, remat=remat)
        total, count = cross_entropy(module, features, rows, remat=remat)
        return total / count

    whole, parts = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(tiny.params, remat) for remat in (False, True))
    log_p = jax.nn.log_softmax(tiny.network.apply(tiny.params, jnp.asarray(rows.tokens)))
    chosen = [log_p[row, at, token] for row in range(2) for at, token in zip(rows.at[row], rows.targets[row])]
    np.testing.assert_allclose(whole[0], -np.average(chosen, weights=rows.weights.ravel()), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parts, whole)
