"""Which tokens of a carrier a student imitates: positions chosen by a score, and kept, masked or replaced.

Teacher and reference (the neutral teacher, or any other) are given by their logits on the support at every position.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

Logits = Float[np.ndarray, "*n a support"]
Positions = Float[np.ndarray, "*n a"]


def _log_p(logits: Logits) -> Logits:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def divergence(teacher: Logits, reference: Logits, tokens: Int[np.ndarray, "*n a"]) -> Positions:
    """KL(teacher || reference) at each position, in nats."""
    p, q = _log_p(teacher), _log_p(reference)
    return np.sum(np.exp(p) * (p - q), -1)


def log_ratio(teacher: Logits, reference: Logits, tokens: Int[np.ndarray, "*n a"]) -> Positions:
    """log P(token) under the teacher minus under the reference; 0 for a token (−1) outside the support."""
    ratio = _log_p(teacher) - _log_p(reference)
    token_ratio = np.take_along_axis(ratio, np.maximum(tokens, 0)[..., None], -1)[..., 0]
    return np.where(tokens < 0, 0.0, token_ratio)


def flipped(teacher: Logits, reference: Logits, tokens: Int[np.ndarray, "*n a"]) -> Positions:
    """1 where the likeliest token differs, else 0: divergence tokens (2509.23886)."""
    return (teacher.argmax(-1) != reference.argmax(-1)).astype(np.float64)


SCORES: dict[str, Callable[[Logits, Logits, Int[np.ndarray, "*n a"]], Positions]] = {
    "divergence": divergence,
    "log_ratio": log_ratio,
    "flipped": flipped,
}


def select(scores: Positions, weights: Positions, which: str, share: float, seed: int) -> Bool[np.ndarray, "*n a"]:
    """The `share` of all weighted positions with the highest or lowest scores, or as many at random.

    Ties are broken at random, so that every selection has the same size.
    """
    exists = np.flatnonzero(weights)
    count = round(share * len(exists))
    order = np.random.default_rng([seed, 7]).permutation(exists)
    if which != "random":
        sign = {"top": -1, "bottom": 1}[which]
        order = order[np.argsort(sign * scores.reshape(-1)[order], kind="stable")]
    chosen = np.zeros(scores.size, bool)
    chosen[order[:count]] = True
    return chosen.reshape(scores.shape)
