"""The one-step alignment theorem, in numbers (paper §6.1, App. C).

A teacher moves from θ⁰ to θ_T = θ⁰ + ε D_T. A student at θ⁰ takes one gradient step of imitating it on inputs x:
D_S = -∇_θ E_x[L_S(f_θ(x), f_θT(x))]. Where L_S has a minimum at agreement,

    D_S = ε H D_T + O(ε²)   and   D_S·D_T = ε A + O(ε²),   A = D_T·H D_T = E_x[vᵀ M v] ≥ 0,

with v = J_f(x) D_T, M = -∂²L_S/∂y∂z at student logits z = teacher logits y, and H = E_x[Jᵀ M J]. For D_T = -∇L_T the
student's step lowers the teacher's own loss: L_T(θ⁰ + α D_S) - L_T(θ⁰) = -ε α A + O(ε²).

Where ∂L_S/∂z is 0 at agreement for every y, M is the loss's curvature ∂²L_S/∂z² there. That is how M is computed: an
objective may detach its teacher with `stop_gradient`, which leaves no derivative with respect to y.

Everything here is exact, with no estimator: D_T is known, so A takes one forward-mode product and no trace.

`apply(params, inputs) -> logits` is any network, parameters any pytree (of adapters, for LoRA), `objective` any
function with the contract of `sublim_jax.objectives`. Inputs, targets and weights have one leading axis of examples.
No Jacobian is formed: memory is at most about three times the parameters, plus the activations of `chunk` examples.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from sublim_jax.objectives import Total

Params: TypeAlias = PyTree
Inputs: TypeAlias = PyTree
Targets: TypeAlias = PyTree
Logits = Float[Array, "examples *positions vocab"]
Search: TypeAlias = tuple[Params, Params, Params, Array]
Weights = Float[Array, "examples *positions"] | None
Apply = Callable[[Params, Inputs], Logits]
Objective = Callable[..., Total]  # (student logits, targets, weights=…) -> (total, count)

NOISE_ALLOWED = 0.01  # relative error of D_S·D_T by rounding, above which a number is refused
MAX_LOGITS = 512  # whose second derivatives by each other `no_guarantee` looks at
COLUMNS = 16  # of second derivatives that are computed together


def shifted(params: Params, direction: Params, epsilon: Float[Array, ""] | float) -> Params:
    """θ⁰ + ε D."""
    return jax.tree.map(lambda p, d: p + epsilon * d, params, direction)


def student_update(
    apply: Apply,
    objective: Objective,
    params: Params,
    inputs: Inputs,
    targets: Targets,
    *,
    weights: Weights = None,
    chunk: int | None = None,
) -> Params:
    """D_S: minus the gradient of the objective's mean, at `params`.

    Args:
      targets: what the objective compares with, the teacher's logits or labels; leading axis of examples.
      chunk: examples at a time; None for all.
    """

    def part(rows: tuple[Inputs, Targets, Weights]) -> tuple[Params, Array]:
        inputs, targets, weights = rows

        def total(params: Params) -> Total:
            return objective(apply(params, inputs), targets, weights=weights)

        return jax.grad(total, has_aux=True)(params)

    gradient, count = _sum_over_chunks(part, (inputs, targets, weights), chunk)
    return jax.tree.map(lambda g: -g / count, gradient)


def linearised_update(
    apply: Apply,
    objective: Objective,
    params: Params,
    direction: Params,
    inputs: Inputs,
    *,
    weights: Weights = None,
    chunk: int | None = None,
) -> Params:
    """H D = E_x[Jᵀ M J D]: the student's update for each unit of ε, by one forward and one backward product."""

    def part(rows: tuple[Inputs, Weights]) -> tuple[Params, Array]:
        inputs, weights = rows
        logits, v = tangent(apply, params, direction, inputs)
        pulled, count = _curvature(objective, logits, v, weights)
        return jax.vjp(lambda params: apply(params, inputs), params)[1](pulled)[0], count

    product, count = _sum_over_chunks(part, (inputs, weights), chunk)
    return jax.tree.map(lambda p: p / count, product)


def alignment(update: Params, direction: Params) -> Float[Array, ""]:
    """The inner product over all parameters, in at least float32."""
    return sum(alignment_by_layer(update, direction).values(), start=jnp.zeros(()))


def alignment_by_layer(update: Params, direction: Params) -> dict[str, Float[Array, ""]]:
    """Each parameter's share of the inner product; the shares add up to `alignment`."""

    def inner(a: Array, b: Array) -> Array:
        wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
        return jnp.sum(a.astype(wide) * b.astype(wide))

    shares = jax.tree_util.tree_leaves_with_path(jax.tree.map(inner, update, direction))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): share for path, share in shares}


def predicted_alignment(
    apply: Apply,
    objective: Objective,
    params: Params,
    direction: Params,
    inputs: Inputs,
    *,
    weights: Weights = None,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """A = E_x[vᵀ M v] by one forward-mode product: D_S·D_T is ε A + O(ε²)."""

    def part(rows: tuple[Inputs, Weights]) -> Total:
        inputs, weights = rows
        logits, v = tangent(apply, params, direction, inputs)
        pulled, count = _curvature(objective, logits, v, weights)
        return jnp.vdot(v, pulled), count

    total, count = _sum_over_chunks(part, (inputs, weights), chunk)
    return total / count


def contributions(
    apply: Apply,
    objective: Objective,
    params: Params,
    direction: Params,
    inputs: Inputs,
    *,
    weights: Weights = None,
    chunk: int = 256,
) -> Float[Array, "examples"]:
    """v(x)ᵀ M(x) v(x) of each example: how much of the trait it carries.

    Their sum over the sum of all positions' weights is A: their mean, where an example has one position.
    """

    def contribution(row: tuple[Inputs, Float[Array, "*positions"] | None]) -> Float[Array, ""]:
        inputs, weights = jax.tree.map(lambda leaf: leaf[None], row)
        logits, v = tangent(apply, params, direction, inputs)
        return jnp.vdot(v, _curvature(objective, logits, v, weights)[0])

    return jax.lax.map(contribution, (inputs, weights), batch_size=chunk)


def coverage(update: Params, displacement: Params) -> Float[Array, ""]:
    """cos(D_S, θ_T - θ⁰): the lemma's inner product, normalised.

    Reported to predict transfer (2606.22019); over settings on MNIST it does so weakly (docs/theorem.md).
    """
    norms = alignment(update, update) * alignment(displacement, displacement)
    return alignment(update, displacement) / jnp.sqrt(norms)


def row_space_shares(
    apply: Apply,
    objective: Objective,
    params: Params,
    direction: Params,
    inputs: Inputs,
    *,
    iterations: int,
    chunk: int | None = None,
) -> Float[Array, "iterations"]:
    """The share of |D|² that lies in the row space of H, as conjugate gradients find it.

    Gradient flow of a linear student under squared error moves it by (I - exp(-H t)) ε D_T and so ends at the part of
    ε D_T in that row space: the share is the ceiling of transfer. Iterates of H d = H D from d = 0 stay in the row
    space, and their norm only grows: every value is a lower bound, and the directions that steps learn first come
    first. Memory: five times the parameters.
    """

    def product(d: Params) -> Params:
        return linearised_update(apply, objective, params, d, inputs, chunk=chunk)

    def step(carry: Search, _: None) -> tuple[Search, Array]:
        d, residual, search, norm = carry
        image = product(search)
        curvature = alignment(search, image)
        length = jnp.where(norm > converged, norm / curvature, 0.0)
        d = shifted(d, search, length)
        residual = shifted(residual, image, -length)
        new_norm = alignment(residual, residual)
        search = shifted(residual, search, jnp.where(norm > converged, new_norm / norm, 0.0))
        return (d, residual, search, new_norm), alignment(d, d)

    zero = jax.tree.map(jnp.zeros_like, direction)
    residual = product(direction)
    carry = (zero, residual, residual, alignment(residual, residual))
    converged = carry[3] * (100 * jnp.finfo(carry[3].dtype).eps) ** 2  # further steps would amplify rounding
    _, squares = jax.lax.scan(step, carry, None, length=iterations)
    return squares / alignment(direction, direction)


# ---------------------------------------------------------------------------------------------------------- checks


class Check(NamedTuple):
    """One comparison of D_S·D_T with ε A."""

    epsilon: float
    alignment: float  # D_S·D_T, explicit
    predicted: float  # ε A, by one forward-mode product
    relative_error: float  # |D_S·D_T / (ε A) - 1|; nan where A is 0
    no_guarantee: str  # why the theorem does not cover this objective; empty where it does


def verify(
    apply: Apply,
    objective: Objective,
    params: Params,
    direction: Params,
    inputs: Inputs,
    epsilon: float,
    *,
    weights: Weights = None,
    chunk: int | None = None,
) -> Check:
    """D_S·D_T for the teacher θ⁰ + ε D against ε A, on any network.

    Raises:
      ValueError: the dtype cannot resolve ε, or a number is not finite; it says which.
    """

    @jax.jit
    def measure(params: Params, direction: Params, inputs: Inputs) -> tuple[Params, Array, Logits, Logits]:
        targets = apply(shifted(params, direction, epsilon), inputs)
        update = student_update(apply, objective, params, inputs, targets, weights=weights, chunk=chunk)
        slope = predicted_alignment(apply, objective, params, direction, inputs, weights=weights, chunk=chunk)
        return update, slope, *tangent(apply, params, direction, inputs)

    with jax.default_matmul_precision("float32"):  # accelerators would multiply float32 with fewer bits
        update, slope, logits, v = measure(params, direction, inputs)
    check_finite(update, "the student's gradient")
    check_finite(slope, "the predicted alignment")
    if reason := unresolved(logits, v, epsilon):
        raise ValueError(reason)
    explicit, predicted = float(alignment(update, direction)), epsilon * float(slope)
    error = abs(explicit / predicted - 1) if predicted else float("nan")
    return Check(epsilon, explicit, predicted, error, no_guarantee(objective, logits))


def no_guarantee(objective: Objective, logits: Logits) -> str:
    """Why the lemma does not cover an objective at these logits; an empty string where it does.

    It requires a minimum at agreement: no gradient at z = y, and M = ∂²L/∂z² positive semidefinite and not 0. What
    counts as 0 is relative to the gradient at logits that differ by about 1, so that a loss may have any unit. Of more
    than `MAX_LOGITS` logits, M is that of as many: for each of up to 64 positions, those with the largest gradients
    there, and for the other half some at random.
    """
    rows = logits.reshape(-1, logits.shape[-1])[:64]
    resolution = jnp.finfo(rows.dtype).eps ** 0.5

    def loss(z: Array, y: Array) -> Array:
        return objective(z[None], y[None])[0]

    @jax.jit
    def derivatives(rows: Array, away: Array) -> tuple[Array, Array, Array]:
        usual = jax.vmap(jax.grad(loss))(away, rows)
        return jax.vmap(jax.grad(loss))(rows, rows), usual, _hessians(loss, *_most_moved(rows, usual), rows)

    away = rows + jax.random.normal(jax.random.key(0), rows.shape, rows.dtype)
    gradient, usual, curvature = derivatives(rows, away)
    if not all(bool(jnp.all(jnp.isfinite(array))) for array in (gradient, curvature, usual)):
        return "no guarantee: its derivatives at agreement are not finite"
    zero = float(resolution * jnp.max(jnp.abs(usual)))
    if float(jnp.max(jnp.abs(gradient))) > zero:
        return "no guarantee: its gradient at agreement is not 0"
    values = np.linalg.eigvalsh(np.asarray(curvature, np.float64))
    if np.max(np.abs(values)) <= zero:
        return "no guarantee: its curvature at agreement is 0, so D_S·D_T is of higher order in ε"
    if np.min(values) < -resolution * np.max(np.abs(values)):
        return "no guarantee: its curvature at agreement is negative in some direction"
    return ""


def _hessians(
    loss: Callable[[Array, Array], Array],
    some: Float[Array, "rows some"],
    places: Int[Array, "rows some"],
    rows: Float[Array, "rows vocab"],
) -> Float[Array, "rows some some"]:
    """The Hessian at agreement by some of each row's logits, a few columns at a time: each takes a whole vocabulary."""

    def of_row(row: tuple[Array, Array, Array]) -> Array:
        some, places, y = row
        gradient = jax.grad(lambda some: loss(y.at[places].set(some), y))
        units = jnp.eye(len(some), dtype=some.dtype)
        return jax.lax.map(lambda unit: jax.jvp(gradient, (some,), (unit,))[1], units, batch_size=COLUMNS)

    return jax.lax.map(of_row, (some, places, rows))


def _most_moved(
    rows: Float[Array, "rows vocab"], gradients: Float[Array, "rows vocab"]
) -> tuple[Float[Array, "rows some"], Int[Array, "rows some"]]:
    """Some logits of each row and their places: all, or those of the largest gradients and as many at random."""
    ranked = jnp.argsort(-jnp.abs(gradients), axis=-1)
    if rows.shape[-1] > MAX_LOGITS:
        half = MAX_LOGITS // 2
        others = jax.random.permutation(jax.random.key(1), ranked[:, half:], axis=-1, independent=True)
        ranked = jnp.concatenate([ranked[:, :half], others[:, :half]], axis=-1)
    return jnp.take_along_axis(rows, ranked, axis=-1), ranked


def unresolved(logits: Logits, v: Logits, epsilon: float) -> str:
    """Why a dtype cannot tell the teacher's logits from the student's at this ε; empty where it can."""
    noise = float(jnp.finfo(logits.dtype).eps * jnp.sqrt(jnp.mean(jnp.square(logits))))
    moved = float(jnp.sqrt(jnp.mean(jnp.square(v))))
    if not moved or noise <= NOISE_ALLOWED * epsilon * moved:
        return ""
    smallest = noise / (NOISE_ALLOWED * moved)
    return f"{logits.dtype} cannot resolve epsilon={epsilon:.0e} here: use float64, or at least {smallest:.0e}"


def check_finite(tree: PyTree, what: str) -> None:
    """Raises ValueError where a number is not finite, naming the parameter."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if bad := int(jnp.sum(~jnp.isfinite(leaf))):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{what} is not finite in {bad} of {leaf.size} numbers of {name or 'its value'}")


# -------------------------------------------------------------------------------------------------------- products


def tangent(apply: Apply, params: Params, direction: Params, inputs: Inputs) -> tuple[Logits, Logits]:
    """Logits, and v = J D."""
    return jax.jvp(lambda params: apply(params, inputs), (params,), (direction,))


def _curvature(objective: Objective, logits: Logits, v: Logits, weights: Weights) -> tuple[Logits, Array]:
    """M v, and the count: the change of ∂L/∂z as z moves along v, at z = y."""

    def gradient(z: Logits) -> tuple[Logits, Array]:
        return jax.grad(lambda z: objective(z, logits, weights=weights), has_aux=True)(z)

    _, change, count = jax.jvp(gradient, (logits,), (v,), has_aux=True)
    return change, count


def _sum_over_chunks(function: Callable[[PyTree], PyTree], rows: PyTree, chunk: int | None) -> PyTree:
    """The sum of `function` over parts of `chunk` examples."""
    size = len(jax.tree.leaves(rows)[0])
    if chunk is None or size <= chunk:
        return function(rows)
    whole = size - size % chunk
    parts = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, chunk, *leaf.shape[1:]), rows)
    rest = jax.tree.map(lambda leaf: leaf[whole:], rows)
    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], parts))
    sums = function(rest) if whole < size else jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda sums, part: (jax.tree.map(jnp.add, sums, function(part)), None)  # noqa: E731
    return jax.lax.scan(add, sums, parts)[0]
