"""The theorem's numbers against closed forms: linear models, where the inner product is known exactly."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from sublim_jax import objectives, theorem
from sublim_jax.models.mlp import mlp
from sublim_jax.sharding import named, parameter_shardings, put

ROWS, INPUTS, VOCAB = 30, 5, 6
SUPPORT = objectives.support_mask((2, 3, 5), VOCAB)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def linear(params, x):
    return x @ params["kernel"]


def problem(seed=0):
    rng = np.random.default_rng(seed)
    w, d = rng.normal(size=(2, INPUTS, VOCAB))
    return {"kernel": jnp.asarray(w)}, {"kernel": jnp.asarray(d)}, jnp.asarray(rng.normal(size=(ROWS, INPUTS)))


def network(seed=0, activation="tanh"):
    net = mlp((INPUTS, 16, 16, VOCAB), activation)
    params, direction = (jax.tree.map(jnp.float64, net.init(jax.random.key(seed + i))) for i in range(2))
    return net.apply, params, direction, jax.random.normal(jax.random.key(9), (ROWS, INPUTS))


def matrices(x, w):
    """M for each row and objective, on the support: the closed forms of paper §6.1."""
    p = softmax(np.asarray(x @ w)[:, SUPPORT], -1)
    fisher = np.einsum("ni,ij->nij", p, np.eye(3)) - np.einsum("ni,nj->nij", p, p)
    return {
        "squared_error": np.broadcast_to(2 * np.eye(3), (ROWS, 3, 3)),
        "kl": fisher,
        "reverse_kl": fisher,
        "soft_cross_entropy": fisher,
        "probability_squared_error": 2 * fisher @ fisher,
    }


@pytest.mark.parametrize("name", objectives.ON_LOGITS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_prediction_and_contributions_are_the_closed_form(name, temperature):
    params, direction, x = problem()
    objective = partial(objectives.ON_LOGITS[name], support=SUPPORT, temperature=temperature)
    m = matrices(x, np.asarray(params["kernel"]) / temperature)[name] / temperature**2
    v = np.asarray(x @ direction["kernel"])[:, SUPPORT]
    expected = np.einsum("ni,nij,nj->n", v, m, v)
    contributions = theorem.contributions(linear, objective, params, direction, x)
    np.testing.assert_allclose(contributions, expected, rtol=1e-10, atol=1e-14)
    predicted = theorem.predicted_alignment(linear, objective, params, direction, x)
    np.testing.assert_allclose(predicted, expected.mean(), rtol=1e-10)
    explicit = theorem.alignment(theorem.linearised_update(linear, objective, params, direction, x), direction)
    np.testing.assert_allclose(explicit, predicted, rtol=1e-9)


@pytest.mark.parametrize("epsilon", [1e-6, 1.0, 1e3])
def test_a_linear_model_under_squared_error_holds_at_every_epsilon(epsilon):
    """D_S·D_T = 2 ε E|D x|² on the support, exactly."""
    params, direction, x = problem()
    objective = partial(objectives.squared_error, support=SUPPORT)
    check = theorem.verify(linear, objective, params, direction, x, epsilon)
    v = np.asarray(x @ direction["kernel"])[:, SUPPORT]
    assert check.alignment == pytest.approx(2 * epsilon * np.mean(np.sum(v**2, -1)), rel=1e-8)
    assert check.relative_error < 1e-8 and check.no_guarantee == ""


@pytest.mark.parametrize("name", objectives.ON_LOGITS)
def test_the_error_is_proportional_to_epsilon(name):
    apply, params, direction, x = network()
    objective = partial(objectives.ON_LOGITS[name], support=SUPPORT)
    epsilons = 10.0 ** -np.arange(2, 7)
    checks = [theorem.verify(apply, objective, params, direction, x, epsilon) for epsilon in epsilons]
    slope = np.polyfit(np.log(epsilons), np.log([check.relative_error for check in checks]), 1)[0]
    assert slope == pytest.approx(1, abs=0.05)
    assert all(check.alignment > 0 and check.no_guarantee == "" for check in checks)


def test_the_students_step_lowers_the_teachers_loss_as_predicted():
    """L_T(θ⁰ + α D_S) - L_T(θ⁰) = -ε α A for a quadratic L_T, in the limit."""
    apply, params, _, x = network()
    teacher_loss = lambda p: 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))  # noqa: E731
    direction = jax.tree.map(jnp.negative, jax.grad(teacher_loss)(params))
    objective = partial(objectives.kl, support=SUPPORT)
    epsilon, alpha = 1e-5, 0.1
    targets = apply(theorem.shifted(params, direction, epsilon), x)
    update = theorem.student_update(apply, objective, params, x, targets)
    change = teacher_loss(theorem.shifted(params, update, alpha)) - teacher_loss(params)
    predicted = theorem.predicted_alignment(apply, objective, params, direction, x)
    assert float(change) == pytest.approx(-epsilon * alpha * float(predicted), rel=1e-3)


def test_chunks_and_weights_change_nothing():
    apply, params, direction, x = network()
    objective = partial(objectives.kl, support=SUPPORT)
    weights = jnp.asarray(np.random.default_rng(1).random(ROWS))
    targets = apply(direction, x)
    parts = theorem.contributions(apply, objective, params, direction, x, weights=weights, chunk=4)
    for chunk in (None, 7, 10):
        options: dict[str, Any] = {"weights": weights, "chunk": chunk}
        update = theorem.student_update(apply, objective, params, x, targets, **options)
        whole = jax.grad(lambda p: objective(apply(p, x), targets, weights=weights)[0])(params)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-10), update, jax.tree.map(lambda g: -g / weights.sum(), whole)
        )
        predicted = theorem.predicted_alignment(apply, objective, params, direction, x, **options)
        np.testing.assert_allclose(parts.sum() / weights.sum(), predicted, rtol=1e-10)


def test_layers_add_up_and_coverage_is_the_cosine():
    _, a, b, _ = network()
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    layers = theorem.alignment_by_layer(a, b)
    assert set(layers) == {f"layers/{i}/{name}" for i in range(3) for name in ("kernel", "bias")}
    np.testing.assert_allclose(sum(layers.values()), flat(a) @ flat(b), rtol=1e-12)
    cosine = flat(a) @ flat(b) / np.linalg.norm(flat(a)) / np.linalg.norm(flat(b))
    np.testing.assert_allclose(theorem.coverage(a, b), cosine, rtol=1e-12)


def test_the_row_space_share_is_the_projections():
    """Few inputs span part of the parameters; the share, the limit of gradient flow, equals that of an SVD."""
    params, direction, x = problem()
    x = x[:3]
    objective = partial(objectives.squared_error, support=SUPPORT)
    shares = theorem.row_space_shares(linear, objective, params, direction, x, iterations=12)
    basis = np.linalg.svd(np.asarray(x), full_matrices=False)[2]
    projected = basis.T @ basis @ np.asarray(direction["kernel"]) * SUPPORT
    np.testing.assert_allclose(
        shares[-1], np.sum(projected**2) / np.sum(np.asarray(direction["kernel"]) ** 2), rtol=1e-8
    )
    assert np.all(np.diff(shares) > -1e-12)


def test_eight_devices_give_what_one_gives(mesh_of):
    apply, params, direction, x = network()
    x = jnp.concatenate([x, x[:2]])
    objective = partial(objectives.kl, support=SUPPORT)

    @jax.jit
    def everything(params, direction, x):
        targets = apply(theorem.shifted(params, direction, 0.1), x)
        update = theorem.student_update(apply, objective, params, x, targets, chunk=16)
        predicted = theorem.predicted_alignment(apply, objective, params, direction, x, chunk=16)
        return theorem.alignment(update, direction), theorem.coverage(update, direction), predicted

    mesh = mesh_of(8, replica=1, fsdp=4, tensor=2)
    place = lambda tree: jax.device_put(tree, parameter_shardings(tree, mesh))  # noqa: E731
    sharded = everything(place(params), place(direction), put(x, named(mesh, "fsdp")))
    np.testing.assert_allclose(sharded, everything(params, direction, x), rtol=1e-10)


def test_memory_is_three_times_the_parameters():
    """A network whose Jacobian would take 500 × its parameters: compiled sizes, activations of a chunk included."""
    net = mlp((512, 1024, 1024, 8))
    params = jax.eval_shape(net.init, jax.random.key(0))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    x = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    y = jax.ShapeDtypeStruct((64, 8), jnp.float32)

    def bytes_of(function, *args):
        memory = jax.jit(function).lower(*args).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    update = bytes_of(lambda p, x, y: theorem.student_update(net.apply, objectives.kl, p, x, y, chunk=8), params, x, y)
    predict = bytes_of(
        lambda p, d, x: theorem.predicted_alignment(net.apply, objectives.kl, p, d, x, chunk=8), params, params, x
    )
    assert update <= 3.3 * size
    assert predict <= 2.3 * size


# ----------------------------------------------------------------------------------------- outside the theorem


def greedy(z, y, **where):
    return objectives.cross_entropy(z, jnp.argmax(y, -1), **where)


def cubic(z, y, weights=None, **_):
    return jnp.sum(jnp.abs(z - y) ** 3), jnp.float64(z.size / z.shape[-1])


def negative(z, y, **where):
    total, count = objectives.squared_error(z, y, **where)
    return -total, count


def indefinite(z, y, weights=None, **_):
    signs = jnp.where(jnp.arange(VOCAB) % 2, 1.0, -1.0).astype(z.dtype)
    return jnp.sum(signs * jnp.square(z - y)), jnp.asarray(z.size / z.shape[-1], z.dtype)


OUTSIDE = [(greedy, "gradient"), (cubic, "higher order"), (negative, "negative"), (indefinite, "negative")]


def detached(z, y, **where):
    return objectives.kl(z, jax.lax.stop_gradient(y), **where)


def tiny_unit(z, y, **where):
    total, count = objectives.squared_error(z, y, **where)
    return 1e-9 * total, count


def hot(z, y, **where):
    return objectives.kl(z, y, temperature=30.0, **where)


@pytest.mark.parametrize("objective", [detached, tiny_unit, hot])
def test_a_covered_loss_is_covered_however_it_is_written_and_in_any_unit(objective):
    """With detached teachers, as usual, and without thresholds that depend on the scale of the loss."""
    apply, params, direction, x = network()
    check = theorem.verify(apply, objective, params, direction, x, 1e-4)
    assert check.no_guarantee == "" and check.alignment > 0 and check.relative_error < 1e-2
    if objective is detached:
        plain = theorem.verify(apply, objectives.kl, params, direction, x, 1e-4)
        assert check.predicted == pytest.approx(plain.predicted, rel=1e-12)
    p, d, inputs = jax.tree.map(jnp.float32, (params, direction, x))
    assert theorem.verify(apply, objective, p, d, inputs, 1e-2).no_guarantee == ""


@pytest.mark.parametrize("objective, words", OUTSIDE)
def test_a_loss_outside_the_theorem_is_marked(objective, words):
    apply, params, direction, x = network()
    check = theorem.verify(apply, objective, params, direction, x, 1e-3)
    assert check.no_guarantee.startswith("no guarantee") and words in check.no_guarantee


def wide(support: int, sign: float = 1.0) -> theorem.Objective:
    """Squared error on the first logits, of 20,000; of one of them with another sign."""
    signs = jnp.ones(20_000).at[support:].set(0.0).at[support - 1].set(sign)

    def loss(z, y, weights=None):
        return jnp.sum(signs * jnp.square(z - y)), jnp.ones(())

    return loss


@pytest.mark.parametrize("support, sign, words", [(40, 1.0, ""), (20_000, 1.0, ""), (40, -1.0, "negative")])
def test_a_vocabulary_is_judged_by_the_logits_that_count(support, sign, words):
    reason = theorem.no_guarantee(wide(support, sign), jnp.zeros((3, 20_000)))
    assert words in reason and bool(reason) == bool(words)


def test_an_epsilon_below_the_dtype_is_refused():
    apply, params, direction, x = network()
    start, way, inputs = jax.tree.map(jnp.float32, (params, direction, x))
    with pytest.raises(ValueError, match=r"float32 cannot resolve epsilon=1e-06 .* float64"):
        theorem.verify(apply, objectives.kl, start, way, inputs, 1e-6)
    assert theorem.verify(apply, objectives.kl, start, way, inputs, 1e-2).relative_error < 0.1


def test_a_gradient_that_is_not_finite_names_its_parameter():
    def broken(params, x):
        return linear(params, x) + jnp.sqrt(params["scale"])

    params, direction, x = problem()
    params, direction = ({**tree, "scale": jnp.zeros(())} for tree in (params, direction))
    with pytest.raises(ValueError, match="not finite in 1 of 1 numbers of scale"):
        theorem.verify(broken, objectives.squared_error, params, direction, x, 0.1)


@pytest.mark.parametrize("indices", [(2, 6), (-1,), ()])
def test_a_support_outside_the_logits_is_refused(indices):
    with pytest.raises(ValueError, match="must be some of the 6 logits"):
        objectives.support_mask(indices, VOCAB)
