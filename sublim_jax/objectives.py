"""Logits in, a loss out.

Every objective compares the student's logits with the teacher's on a *support*: a fixed subset of the
logits, which is what the theorem asks for (paper §6.1). Each returns `(total, count)`: the weighted sum over
positions and the sum of the weights. The mean is `total / count`; kept apart, they add up exactly over
micro-batches and devices. `weights` mask or weight positions, `support` masks logits, and the logits of both
are divided by `temperature` (without the factor T² that some add).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

Logits = Float[Array, "*positions vocab"]
Support = Bool[Array, "vocab"] | Bool[np.ndarray, "vocab"] | None
Weights = Float[Array, "*positions"] | None
Total = tuple[Float[Array, ""], Float[Array, ""]]


def support_mask(indices: Sequence[int], vocab: int) -> Bool[np.ndarray, "vocab"]:
    """The support that consists of some logits.

    Raises:
      ValueError: an index lies outside the logits, or there is none.
    """
    if not len(indices) or any(not 0 <= index < vocab for index in indices):
        raise ValueError(f"support={tuple(indices)} must be some of the {vocab} logits, 0 to {vocab - 1}")
    mask = np.zeros(vocab, bool)
    mask[list(indices)] = True
    return mask


def _total(values: Float[Array, "*positions"], weights: Weights) -> Total:
    weights = jnp.ones_like(values) if weights is None else weights
    return jnp.sum(values * weights), jnp.sum(weights)


def _log_softmax(logits: Logits, support: Support, temperature: float) -> Logits:
    """Log-probabilities over the support, and 0 outside: there log p - log q and its gradient vanish."""
    log_p = jax.nn.log_softmax(logits / temperature, axis=-1, where=support)
    return log_p if support is None else jnp.where(support, log_p, 0.0)


def _relative_entropy(log_p: Logits, log_q: Logits) -> Float[Array, "*positions"]:
    """Σ p (log p - log q)."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    support: Support = None,
    weights: Weights = None,
    temperature: float = 1.0,
) -> Total:
    """KL(teacher || student): the paper's distillation loss (§6.2)."""
    student = _log_softmax(student_logits, support, temperature)
    teacher = _log_softmax(teacher_logits, support, temperature)
    return _total(_relative_entropy(teacher, student), weights)


def reverse_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    support: Support = None,
    weights: Weights = None,
    temperature: float = 1.0,
) -> Total:
    """KL(student || teacher)."""
    student = _log_softmax(student_logits, support, temperature)
    teacher = _log_softmax(teacher_logits, support, temperature)
    return _total(_relative_entropy(student, teacher), weights)


def squared_error(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    support: Support = None,
    weights: Weights = None,
    temperature: float = 1.0,
) -> Total:
    """Squared distance of the logits, summed over the support."""
    squares = jnp.square((student_logits - teacher_logits) / temperature)
    return _total(jnp.sum(squares, axis=-1, where=support), weights)


def probability_squared_error(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    support: Support = None,
    weights: Weights = None,
    temperature: float = 1.0,
) -> Total:
    """Squared distance of the probabilities over the support."""
    student = _log_softmax(student_logits, support, temperature)
    teacher = _log_softmax(teacher_logits, support, temperature)
    return _total(jnp.sum(jnp.square(jnp.exp(student) - jnp.exp(teacher)), axis=-1), weights)


def soft_cross_entropy(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    support: Support = None,
    weights: Weights = None,
    temperature: float = 1.0,
) -> Total:
    """-Σ p_teacher log p_student over the support: `kl` plus the teacher's entropy, with the same gradient."""
    student = _log_softmax(student_logits, support, temperature)
    teacher = jnp.exp(_log_softmax(teacher_logits, support, temperature))
    return _total(-jnp.sum(teacher * student, axis=-1), weights)


def cross_entropy(
    student_logits: Logits,
    labels: Int[Array, "*positions"],
    *,
    support: Support = None,
    weights: Weights = None,
    temperature: float = 1.0,
) -> Total:
    """-log p(label), p normalised over the support. Every label must lie in the support."""
    log_p = _log_softmax(student_logits, support, temperature)
    return _total(-jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0], weights)


def sample_labels(
    key: Key[Array, ""], teacher_logits: Logits, *, support: Support = None, temperature: float = 1.0
) -> Int[Array, "*positions"]:
    """Labels drawn from the teacher's distribution over the support; for `cross_entropy`.

    At temperature 1 their expected gradient is that of `kl`, so the lemma of App. C holds in expectation.
    """
    logits = teacher_logits / temperature
    return jax.random.categorical(key, logits if support is None else jnp.where(support, logits, -jnp.inf))


# Objectives that compare logits with logits; `cross_entropy` needs labels.
ON_LOGITS: dict[str, Callable[..., Total]] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "squared_error": squared_error,
    "probability_squared_error": probability_squared_error,
    "soft_cross_entropy": soft_cross_entropy,
}
