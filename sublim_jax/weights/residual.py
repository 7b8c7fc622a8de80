"""The part of a weight that PiSSA and OLoRA move into an adapter before training.

The base is then the rest, and PEFT subtracts the part again whenever it loads such an adapter.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float


def part(
    start: str, weight: Float[np.ndarray, "outputs inputs"], rank: int, scale: float
) -> tuple[Float[np.ndarray, "rank inputs"], Float[np.ndarray, "outputs rank"]]:
    """(A, B) of the part, which is scale · B A.

    Args:
      start: "pissa", the largest singular values; or "olora", the first columns of an orthogonal basis.
    """
    if start == "pissa":
        left, values, right = jnp.linalg.svd(weight, full_matrices=False)
        root = jnp.sqrt(values[:rank] / scale)
        a, b = root[:, None] * right[:rank], left[:, :rank] * root
    else:
        basis, coefficients = jnp.linalg.qr(weight)
        a, b = coefficients[:rank], basis[:, :rank]
    return np.asarray(a), np.asarray(b)
