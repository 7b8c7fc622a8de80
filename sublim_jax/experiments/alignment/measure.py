"""All measurements of the check."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from sublim_jax import objectives, theorem
from sublim_jax.data import mnist
from sublim_jax.errors import UserError
from sublim_jax.experiments.alignment.settings import ON_DIGITS, WIDTHS, Setting, controls, descent, double, mean
from sublim_jax.experiments.alignment.spec import NUM_LOGITS, AlignmentSpec, LanguageSpec
from sublim_jax.keys import named_key
from sublim_jax.measurements import Measurement, from_array
from sublim_jax.models.functional import Params
from sublim_jax.models.mlp import mlp

SMALL_WIDTHS = (49, 24, 24, NUM_LOGITS)  # on images of 7 × 7 pixels, for many draws

# Names of the arms that are not settings, and of the measures.
SINGLE, SIGNS, LABELS, OPTIMIZERS = "kl in float32", "signs", "labels sampled at T = 1", "optimizers"
MOVED, EPSILON, MAX_EPSILON, LOSS = "step of the teacher", "epsilon", "largest epsilon that is judged", "L_T"
INNER, CHANGE, A, A_BY_GRADIENTS = "D_S·D_T", "change of L_T", "A", "A by gradients"
POSITIVE, FALLS, SIGNED = "share of D_S·D_T > 0", "share of L_T falls", "share of sign(D_S)·D_T > 0"
COSINE = "cos(update, D_T)"

Note = dict[str, str]


def measure(
    arm: str,
    setting: Setting,
    objectives: Mapping[str, theorem.Objective],
    spec: AlignmentSpec | LanguageSpec,
    student: Params | None = None,
) -> list[Measurement]:
    """Every objective at every step of the teacher; the student starts at θ⁰ unless `student` is given.

    Raises UserError where a number is not finite.
    """
    moved = np.logspace(spec.steps.min, spec.steps.max, spec.steps.num)
    _, v = jax.jit(partial(theorem.tangent, setting.apply))(setting.params, setting.direction, setting.inputs)
    compared = v[np.broadcast_to(setting.support, v.shape)]
    epsilons = moved / float(jnp.sqrt(jnp.mean(compared**2)) or jnp.sqrt(jnp.mean(v**2)))
    start = setting.params if student is None else student
    names, branches = list(objectives), list(objectives.values())

    @jax.jit
    def all_of(
        params: Params, start: Params, direction: Params, inputs: theorem.Inputs, epsilons: Array
    ) -> tuple[Array, Array, Array, Array]:
        before = setting.teacher_loss(start)

        def student_step(pair: tuple[Array, Array]) -> tuple[Array, Array]:
            targets = setting.apply(theorem.shifted(params, direction, pair[1]), inputs)
            update = theorem.student_update(setting.apply, chosen(pair[0]), start, inputs, targets)
            after = setting.teacher_loss(theorem.shifted(start, update, spec.learning_rate))
            return theorem.alignment(update, direction), after - before

        def limit(index: Array) -> tuple[Array, Array]:
            def inner(epsilon: Array) -> Array:
                return student_step((index, epsilon))[0]

            # A by two independent ways: vᵀ M v of the logits, and the derivative of D_S·D_T with respect to ε.
            explicit = jax.jvp(inner, (jnp.zeros_like(epsilons[0]),), (jnp.ones_like(epsilons[0]),))[1]
            return theorem.predicted_alignment(setting.apply, chosen(index), params, direction, inputs), explicit

        def chosen(index: Array) -> theorem.Objective:
            calls = [lambda z, y, objective=objective: objective(z, y, weights=None) for objective in branches]
            return lambda z, y, weights: jax.lax.switch(index, calls, z, y)

        every = jnp.arange(len(names))
        pairs = (jnp.repeat(every, len(epsilons)), jnp.tile(epsilons, len(names)))
        inner, change = jax.tree.map(lambda leaf: leaf.reshape(len(names), -1), jax.lax.map(student_step, pairs))
        return inner, change, *jax.lax.map(limit, every)

    quantities = all_of(setting.params, start, setting.direction, setting.inputs, jnp.asarray(epsilons, v.dtype))
    by_measure = dict(zip((INNER, CHANGE, A, A_BY_GRADIENTS), (np.asarray(value, np.float64) for value in quantities)))
    try:
        theorem.check_finite(by_measure, setting.about.network)
    except ValueError as error:
        raise UserError(f"{error}; choose another --config.seed or a smaller --config.steps.max") from error
    rows = from_array(moved, "step", arm=arm, measure=MOVED) + from_array(epsilons, "step", arm=arm, measure=EPSILON)
    rows.append(Measurement(arm, LOSS, float(jax.jit(setting.teacher_loss)(setting.params))))
    axes = {"subject": names, "step": range(len(moved))}
    for what, values in by_measure.items():
        rows += from_array(values, axes if values.ndim == 2 else {"subject": names}, arm=arm, measure=what)
    return rows


def controls_of(spec: AlignmentSpec, base: Setting) -> tuple[list[Note], list[Callable[[], list[Measurement]]]]:
    """Controls in the base setting, each of which breaks one condition of the theorem.

    Returns notes (for each control its name, why the theorem does not cover it, "" if it does, and the expected
    scaling) and functions that return measurements.
    """
    logits, v = jax.jit(partial(theorem.tangent, base.apply))(base.params, base.direction, base.inputs)
    notes: list[Note] = []
    makes: list[Callable[[], list[Measurement]]] = []
    kl = {"kl": partial(objectives.kl, support=base.support)}

    def add(name: str, reason: str, expected: str, setting: Setting, *start: Params) -> None:
        notes.append({"name": name, "reason": reason, "expected": expected})
        makes.append(partial(measure, f"control: {name}", setting, kl, spec, *start))

    others = controls(base.support, logits, v)

    def of_other_objectives() -> list[Measurement]:
        """All of them in one program, since compiling takes longer than computing."""
        rows = measure("", base, {control.name: control.objective for control in others}, spec)
        named = []
        for control in others:
            arm = f"control: {control.name}"
            named += [row._replace(arm=arm) for row in rows if row.subject in ("", control.name)]
            named.append(Measurement(arm, MAX_EPSILON, control.max_epsilon))
        return named

    makes.append(of_other_objectives)
    for control in others:
        reason = theorem.no_guarantee(partial(control.objective, weights=None), logits)
        notes.append({"name": control.name, "reason": reason, "expected": control.expected})

    other = double(mlp(WIDTHS, "tanh").init(named_key(spec.seed, "another start")))
    add("another initialisation", "no guarantee: the student starts elsewhere", "constant", base, other)

    def unseen(params: Params) -> Array:  # weights of the last layer for logits outside the support
        return 0.5 * jnp.sum(jnp.square(params["layers"][len(WIDTHS) - 2]["kernel"][:, ~base.support]))

    add("a teacher that moves unseen parameters", "", "zero", base.taught("", unseen))
    return notes, makes


def measure_single(spec: AlignmentSpec, base: Setting) -> list[Measurement]:
    """The base setting's KL in float32, over all steps, to show where it breaks."""
    arrays = {"params": base.params, "direction": base.direction, "inputs": base.inputs}
    setting = base._replace(**jax.tree.map(lambda leaf: leaf.astype(jnp.float32), arrays))
    return measure(SINGLE, setting, {"kl": partial(objectives.kl, support=base.support)}, spec)


def measure_signs(spec: AlignmentSpec, data: mnist.Mnist) -> list[Measurement]:
    """How often D_S·D_T > 0 and how often the step lowers L_T, over random networks, data and noise.

    The student's learning rates are given in units of 1 / the teacher's step.
    """
    net = mlp(SMALL_WIDTHS, "tanh")
    images = data.train_images.reshape(-1, 7, 4, 7, 4)[:10_000].mean((2, 4)).reshape(-1, 49)
    images, labels = jnp.asarray(images) / 127.5 - 1, jnp.asarray(data.train_labels[:10_000], jnp.int32)
    mask = objectives.support_mask(spec.support, SMALL_WIDTHS[-1])
    moved = jnp.logspace(-4, 2, 13)
    rates = jnp.asarray([0.1, 1.0, 10.0])

    def draw(key: Array) -> tuple[Array, Array, Array]:
        keys = jax.random.split(key, 3)
        params = jax.tree.map(lambda leaf: leaf.astype(moved.dtype), net.init(keys[0]))
        noise = jax.random.uniform(keys[1], (32, 49), moved.dtype, -1, 1)
        rows = jax.random.randint(keys[2], (32,), 0, len(images))

        def loss(params: Params) -> Array:
            return mean(objectives.cross_entropy(net.apply(params, images[rows]), labels[rows], support=ON_DIGITS))

        direction = descent(loss, params)
        _, v = theorem.tangent(net.apply, params, direction, noise)
        scale = jnp.sqrt(jnp.mean(jnp.square(v), where=jnp.asarray(mask)))

        def at(moved: Array) -> tuple[Array, Array, Array]:
            targets = net.apply(theorem.shifted(params, direction, moved / scale), noise)
            kl = partial(objectives.kl, support=mask)
            update = theorem.student_update(net.apply, kl, params, noise, targets)
            # D_S is proportional to the teacher's step; dividing by it keeps the student's step constant.
            lower = jax.vmap(lambda rate: loss(theorem.shifted(params, update, rate / moved)) < loss(params))(rates)
            signs = jax.tree.map(jnp.sign, update)
            return theorem.alignment(update, direction) > 0, lower, theorem.alignment(signs, direction) > 0

        return jax.lax.map(at, moved)

    keys = jax.random.split(named_key(spec.seed, "draws"), spec.num_draws)
    flags = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=10))(keys)
    positive, lower, signed = (np.asarray(jnp.mean(flag, 0)) for flag in flags)
    axes = {"step": range(len(moved)), "item": [f"{rate:g}" for rate in np.asarray(rates)]}
    rows = from_array(lower, axes, arm=SIGNS, measure=FALLS)
    for what, values in ((MOVED, moved), (POSITIVE, positive), (SIGNED, signed)):
        rows += from_array(values, "step", arm=SIGNS, measure=what)
    return rows


def measure_labels(spec: AlignmentSpec, base: Setting) -> list[Measurement]:
    """D_S·D_T for each draw of labels sampled from the teacher at temperature 1, and for its probabilities."""
    soft = partial(objectives.soft_cross_entropy, support=base.support)
    hard = partial(objectives.cross_entropy, support=base.support)

    @jax.jit
    def inner(params: Params, direction: Params, inputs: Array, keys: Array) -> tuple[Array, Array]:
        _, v = theorem.tangent(base.apply, params, direction, inputs)
        epsilon = 0.3 / jnp.sqrt(jnp.mean(jnp.square(v[..., base.support])))
        teacher = base.apply(theorem.shifted(params, direction, epsilon), inputs)

        def sampled_alignment(key: Array) -> Array:
            labels = objectives.sample_labels(key, teacher, support=base.support)
            return theorem.alignment(theorem.student_update(base.apply, hard, params, inputs, labels), direction)

        update = theorem.student_update(base.apply, soft, params, inputs, teacher)
        return theorem.alignment(update, direction), jax.lax.map(sampled_alignment, keys)

    keys = jax.random.split(named_key(spec.seed, "labels"), spec.num_label_draws)
    exact, sampled = inner(base.params, base.direction, base.inputs, keys)
    rows = [Measurement(LABELS, INNER, float(exact), subject="probabilities")]
    return rows + from_array(sampled, arm=LABELS, measure=INNER, subject="labels")


def measure_optimizers(base: Setting) -> list[Measurement]:
    """cos(update, D_T) of the gradient, its sign, and Adam's first step, for a small step of the teacher."""
    kl = partial(objectives.kl, support=base.support)

    @jax.jit
    def updated(params: Params, direction: Params, inputs: theorem.Inputs) -> Params:
        targets = base.apply(theorem.shifted(params, direction, 1e-3), inputs)
        return theorem.student_update(base.apply, kl, params, inputs, targets)

    update, adam = updated(base.params, base.direction, base.inputs), optax.adam(1.0)
    step, _ = adam.update(jax.tree.map(jnp.negative, update), adam.init(base.params))
    updates = {"gradient": update, "sign of the gradient": jax.tree.map(jnp.sign, update), "Adam's first step": step}
    return [
        Measurement(OPTIMIZERS, COSINE, float(theorem.coverage(value, base.direction)), subject=name)
        for name, value in updates.items()
    ]
