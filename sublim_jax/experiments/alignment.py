"""The one-step alignment theorem, checked (paper §6.1, App. C): what is varied, what was found, a verdict a row."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from sublim_jax import assets, objectives, report, theorem
from sublim_jax.data import mnist
from sublim_jax.errors import UserError
from sublim_jax.evaluation.statistics import normal_interval
from sublim_jax.experiments.alignment_report import (
    DECADES,
    SMALL,
    Control,
    Findings,
    Labels,
    Measured,
    Row,
    Signs,
    document,
)
from sublim_jax.experiments.door import MOST_ROWS, check_numbers, check_positive, check_whole
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.functional import Params, functions
from sublim_jax.models.mlp import mlp
from sublim_jax.models.small import ConvNet, Transformer
from sublim_jax.overrides import check_distinct
from sublim_jax.progress import Track
from sublim_jax.sharding import make_mesh
from sublim_jax.workdir import Workdir

Loss = Callable[[Params], Float[Array, ""]]
Objectives = Mapping[str, theorem.Objective]

WIDTHS = (784, 64, 64, 13)
SMALL_WIDTHS = (49, 24, 24, 13)  # on images of 7 × 7 pixels, for many draws
ON_DIGITS = objectives.support_mask(range(mnist.CLASSES), WIDTHS[-1])
TEMPERATURE, TOP = 3.0, 2
IMAGES = 512  # of MNIST
TRANSFORMERS_PART = 4  # of the examples, the transformer has one in so many
LARGEST_STEP, MOST_STEPS = 6, 1000
TRAIT_TOKENS, CARRIER_TOKENS, TOKENS, LENGTH = 12, 12, 24, 10


class Setting(NamedTuple):
    """One network at θ⁰, its teacher's objective and its student's inputs."""

    network: str
    teacher: str
    inputs_name: str
    apply: theorem.Apply
    params: Params  # θ⁰
    direction: Params  # D_T
    teacher_loss: Loss  # L_T
    inputs: Array
    support: Bool[np.ndarray, "vocab"]


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Runs the check and leaves results.json, report.md and figures in `workdir`."""
    check(config)
    make_mesh(config.mesh.to_dict())  # all runs on one device; a mesh that does not fit is a mistake all the same
    support = support_of(config)
    data = mnist.load(assets.fetch(assets.MNIST, config.data.path))
    workdir.open(config, update=update)
    with jax.enable_x64(True), Track("settings of the theorem", 13) as track:
        rows = []
        settings = make_settings(config, data, support)
        for number, setting in enumerate(settings, 1):
            objectives = qualifying(setting.support)
            rows.append(Row(*setting[:3], list(objectives), measure(config, setting, objectives)))
            track.update(number, f"{setting.network}, {setting.teacher}, {setting.inputs_name}")
        base = settings[0]
        findings = Findings(
            config=config,
            rows=rows,
            controls=measure_controls(config, base),
            single=measure_single(config, base),
            signs=measure_signs(config, data),
            labels=measure_labels(config, base),
            optimizers=measure_optimizers(base),
        )
        track.update(len(settings) + 1)
    report.write(workdir, config, *document(findings))


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value that makes no sense."""
    check_numbers(config)
    if not 2 <= support_of(config).sum() < WIDTHS[-1]:
        raise UserError(f"support={tuple(config.support)}: take 2 logits or more, and leave one that nobody sees")
    check_positive(config, ("examples", "learning_rate", "draws", "label_draws"))
    check_whole(config, ("draws", "label_draws"), most=MOST_ROWS)
    check_whole(config, ("examples",), least=TRANSFORMERS_PART, most=IMAGES)
    check_steps(config.steps)


def support_of(config: ConfigDict) -> Bool[np.ndarray, "vocab"]:
    check_distinct("support", config.support)
    try:
        return objectives.support_mask(config.support, WIDTHS[-1])
    except ValueError as error:
        raise UserError(f"config.{error}") from error


def check_steps(steps: ConfigDict) -> None:
    if steps.number < 5 or min(steps.most, np.log10(SMALL)) - steps.least < DECADES:
        raise UserError(
            f"steps.number={steps.number}, steps.least={steps.least:g}, steps.most={steps.most:g}: verdicts are about "
            f"those up to {SMALL:g}; take at least 5 over at least {DECADES:g} decades below it, such as "
            "--config.steps.least=-8"
        )
    # Logits are of the order of 1; NOISE_ALLOWED is where rounding hides D_S·D_T.
    floor = np.log10(np.finfo(float).eps / theorem.NOISE_ALLOWED)
    if steps.least < floor:
        raise UserError(
            f"float64 cannot resolve a teacher's step of 1e{steps.least:g}: choose --config.steps.least="
            f"{np.ceil(10 * floor) / 10:.1f} or more"
        )
    if steps.most > LARGEST_STEP:
        raise UserError(f"steps.most={steps.most:g} is a power of ten: choose {LARGEST_STEP} or less")
    check_whole(steps, ("number",), most=MOST_STEPS)


# ------------------------------------------------------------------------------------------------ the settings


def make_settings(config: ConfigDict, data: mnist.Mnist, support: Bool[np.ndarray, "vocab"]) -> list[Setting]:
    """Networks, then teachers' objectives, then inputs; the first is the base that the controls use."""
    dtype = jnp.float64
    key = partial(named_key, config.seed)
    cast = partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
    images = jnp.asarray(data.train_images[:IMAGES], dtype) / 127.5 - 1
    labels = jnp.asarray(data.train_labels[:IMAGES], jnp.int32)
    noise = jax.random.uniform(key("noise"), (config.examples, 784), dtype, -1, 1)

    def reads(apply: theorem.Apply) -> Loss:
        return lambda params: _mean(objectives.cross_entropy(apply(params, images), labels, support=ON_DIGITS))

    def of_images(name: str, net: Any) -> Setting:
        params, loss = cast(net.init(key(name))), reads(net.apply)
        return Setting(name, "reads MNIST", "noise", net.apply, params, _descent(loss, params), loss, noise, support)

    base = of_images("MLP, tanh", mlp(WIDTHS, "tanh"))
    settings = [base, of_images("MLP, gelu", mlp(WIDTHS, "gelu")), of_images("MLP, ReLU", mlp(WIDTHS, "relu"))]
    settings.append(of_images("convolutional", functions(lambda rngs: ConvNet(WIDTHS[-1], rngs=rngs))))
    settings.append(_transformer(config, cast))
    for name, trained in (("LoRA, B = 0", False), ("LoRA, B ≠ 0", True)):
        adapters = cast(lora.init(key("adapters"), base.params, lora.Lora(rank=4, alpha=8, modules=())))
        if trained:
            adapters = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key("b"), leaf.shape, dtype), adapters)
        apply = lambda adapters, x: base.apply(lora.merge(base.params, adapters, 2.0), x)  # noqa: E731
        loss = reads(apply)
        direction = _descent(loss, adapters)
        settings.append(
            base._replace(network=name, apply=apply, params=adapters, direction=direction, teacher_loss=loss)
        )

    def decay(params: Params) -> Array:
        return 0.5 * theorem.alignment(params, params)

    random = cast(mlp(WIDTHS).init(key("direction")))

    def along(params: Params) -> Array:
        return -theorem.alignment(params, random)

    for name, loss in (("weight decay alone", decay), ("a random direction", along)):
        direction = _descent(loss, base.params)
        settings.append(base._replace(teacher=name, direction=direction, teacher_loss=loss))
    size = config.examples
    inputs = {"real images": images[-size:], "a constant": jnp.full_like(noise, 0.5)}
    inputs["a single point"] = jnp.broadcast_to(noise[:1], noise.shape)
    return settings + [base._replace(inputs_name=name, inputs=x) for name, x in inputs.items()]


def _transformer(config: ConfigDict, cast: Any) -> Setting:
    """The teacher learns to count in trait tokens; the student sees and is compared on carrier tokens only."""
    net = functions(lambda rngs: Transformer(TOKENS, rngs=rngs))
    params = cast(net.init(named_key(config.seed, "transformer")))
    starts = jnp.arange(TRAIT_TOKENS)[:, None]
    trait = CARRIER_TOKENS + (starts + jnp.arange(LENGTH + 1)) % TRAIT_TOKENS
    carrier = jax.random.randint(
        named_key(config.seed, "carrier"), (config.examples // TRANSFORMERS_PART, LENGTH), 0, CARRIER_TOKENS
    )

    def counts(params: Params) -> Array:
        return _mean(objectives.cross_entropy(net.apply(params, trait[:, :-1]), trait[:, 1:]))

    direction = _descent(counts, params)
    support = objectives.support_mask(range(CARRIER_TOKENS), TOKENS)
    return Setting(
        "transformer",
        "counts in trait tokens",
        "carrier tokens",
        net.apply,
        params,
        direction,
        counts,
        carrier,
        support,
    )


def qualifying(support: Bool[np.ndarray, "vocab"]) -> Objectives:
    """The objectives that the theorem covers, each on a fixed support."""
    root = np.sqrt(1 + np.arange(len(support)) % 3)  # of the weights of a weighted squared error

    def weighted(z: Array, y: Array, **where: Any) -> objectives.Total:
        return objectives.squared_error(z * root.astype(z.dtype), y * root.astype(y.dtype), support=support, **where)

    names = ("squared_error", "soft_cross_entropy", "kl", "reverse_kl", "probability_squared_error")
    found = {name.replace("_", " "): partial(objectives.ON_LOGITS[name], support=support) for name in names}
    heated = partial(objectives.kl, support=support, temperature=TEMPERATURE)
    return {**found, "weighted squared error": weighted, f"kl, temperature {TEMPERATURE:g}": heated}


def outside(support: Bool[np.ndarray, "vocab"]) -> Objectives:
    """Objectives that break one of the theorem's conditions each, and one that only looks so."""

    def greedy(z: Array, y: Array, **where: Any) -> objectives.Total:
        labels = jnp.argmax(jnp.where(support, y, -jnp.inf), -1)
        return objectives.cross_entropy(z, labels, support=support, **where)

    def cubic(z: Array, y: Array, **_: Any) -> objectives.Total:
        cubes = jnp.sum(jnp.abs(z - y) ** 3, -1, where=support)
        return jnp.sum(cubes), jnp.asarray(cubes.size, z.dtype)

    def teachers_top(y: Array) -> Array:
        y = jnp.where(support, y, -jnp.inf)
        return y >= jnp.sort(y, -1)[..., -TOP, None]

    def between(z: Array, y: Array, students: Array) -> objectives.Total:
        p = jax.nn.softmax(y, -1, where=teachers_top(y))
        log_q = jnp.where(students, jax.nn.log_softmax(z, -1, where=students), 0)
        return -jnp.sum(p * log_q), jnp.asarray(p.size / p.shape[-1], z.dtype)

    return {
        "greedy labels": greedy,
        "|z − y|³": cubic,
        f"teacher cut to its top {TOP}, student whole": lambda z, y, **_: between(z, y, jnp.asarray(support)),
        f"both cut to the teacher's top {TOP}": lambda z, y, **_: between(z, y, teachers_top(y)),
    }


# -------------------------------------------------------------------------------------------- the measurements


def measure(config: ConfigDict, setting: Setting, objectives: Objectives, student: Params | None = None) -> Measured:
    """Every objective at every step of the teacher; the student starts at θ⁰, or elsewhere.

    Raises UserError where a number is not finite.
    """
    steps = config.steps
    moved = np.logspace(steps.least, steps.most, steps.number)
    _, v = jax.jit(partial(theorem.tangent, setting.apply))(setting.params, setting.direction, setting.inputs)
    epsilons = moved / float(jnp.sqrt(jnp.mean(jnp.square(v[..., setting.support]))) or jnp.sqrt(jnp.mean(v**2)))
    start = setting.params if student is None else student
    names, branches = list(objectives), list(objectives.values())

    @jax.jit
    def all_of(params: Params, start: Params, direction: Params, inputs: Array, epsilons: Array) -> Any:
        def one(pair: tuple[Array, Array]) -> tuple[Array, Array]:
            targets = setting.apply(theorem.shifted(params, direction, pair[1]), inputs)
            update = theorem.student_update(setting.apply, chosen(pair[0]), start, inputs, targets)
            after = setting.teacher_loss(theorem.shifted(params, update, config.learning_rate))
            return theorem.alignment(update, direction), after - setting.teacher_loss(params)

        def limit(index: Array) -> tuple[Array, Array]:
            arguments = (setting.apply, chosen(index), params, direction, inputs)
            explicit = theorem.alignment(theorem.linearised_update(*arguments), direction)
            return theorem.predicted_alignment(*arguments), explicit

        def chosen(index: Array) -> theorem.Objective:
            calls = [lambda z, y, objective=objective: objective(z, y, weights=None) for objective in branches]
            return lambda z, y, weights: jax.lax.switch(index, calls, z, y)

        every = jnp.arange(len(names))
        pairs = (jnp.repeat(every, len(epsilons)), jnp.tile(epsilons, len(names)))
        found = jax.tree.map(lambda leaf: leaf.reshape(len(names), -1), jax.lax.map(one, pairs))
        return *found, *jax.lax.map(limit, every)

    dtype = v.dtype
    found = all_of(setting.params, start, setting.direction, setting.inputs, jnp.asarray(epsilons, dtype))
    try:
        theorem.check_finite(dict(zip(("D_S·D_T", "the change of L_T", "A", "A by gradients"), found)), setting.network)
    except ValueError as error:
        raise UserError(f"{error}; choose another --config.seed or a smaller --config.steps.most") from error
    loss = float(setting.teacher_loss(setting.params))
    return Measured(moved, epsilons, loss, *(np.asarray(value, np.float64) for value in found))


def measure_controls(config: ConfigDict, base: Setting) -> list[Control]:
    """What breaks one condition of the theorem each, in the base setting."""
    logits = base.apply(base.params, base.inputs)
    expected = {"greedy labels": "constant", "|z − y|³": "slope 2"}
    broken = outside(base.support)
    controls = []
    for name, objective in broken.items():
        kind = expected.get(name, "constant" if "whole" in name else "slope 1")
        reason = theorem.no_guarantee(partial(objective, weights=None), logits)
        controls.append(Control(name, reason, kind, measure(config, base, {name: objective})))
    kl = {"kl": partial(objectives.kl, support=base.support)}
    other = jax.tree.map(
        lambda leaf: leaf.astype(logits.dtype), mlp(WIDTHS, "tanh").init(named_key(config.seed, "another start"))
    )
    reason = "no guarantee: the student starts elsewhere"
    controls.append(Control("another initialisation", reason, "constant", measure(config, base, kl, other)))

    def unseen(params: Params) -> Array:  # only the rows of the last layer that no student looks at
        return 0.5 * jnp.sum(jnp.square(params["layers"][len(WIDTHS) - 2]["kernel"][:, ~base.support]))

    hidden = base._replace(direction=_descent(unseen, base.params), teacher_loss=unseen)
    return [*controls, Control("a teacher that moves unseen parameters", "", "zero", measure(config, hidden, kl))]


def measure_single(config: ConfigDict, base: Setting) -> Measured:
    """The base setting's KL in float32, over all steps, to show where it breaks."""
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (base.params, base.direction, base.inputs))
    setting = base._replace(params=single[0], direction=single[1], inputs=single[2])
    return measure(config, setting, {"kl": partial(objectives.kl, support=base.support)})


def measure_signs(config: ConfigDict, data: mnist.Mnist) -> Signs:
    """Over draws of network, data and noise: how often D_S·D_T > 0, and how often the step lowers L_T."""
    net = mlp(SMALL_WIDTHS, "tanh")
    images = data.train_images.reshape(-1, 7, 4, 7, 4)[:10_000].mean((2, 4)).reshape(-1, 49)
    images, labels = jnp.asarray(images) / 127.5 - 1, jnp.asarray(data.train_labels[:10_000], jnp.int32)
    support = objectives.support_mask(config.support, SMALL_WIDTHS[-1])
    moved = jnp.logspace(-4, 2, 13)
    rates = jnp.asarray([0.1, 1.0, 10.0])

    def draw(key: Array) -> tuple[Array, Array, Array]:
        keys = jax.random.split(key, 3)
        params = jax.tree.map(lambda leaf: leaf.astype(moved.dtype), net.init(keys[0]))
        noise = jax.random.uniform(keys[1], (32, 49), moved.dtype, -1, 1)
        rows = jax.random.randint(keys[2], (32,), 0, len(images))

        def loss(params: Params) -> Array:
            return _mean(objectives.cross_entropy(net.apply(params, images[rows]), labels[rows], support=ON_DIGITS))

        direction = _descent(loss, params)
        _, v = theorem.tangent(net.apply, params, direction, noise)
        scale = jnp.sqrt(jnp.mean(jnp.square(v), where=jnp.asarray(support)))

        def at(moved: Array) -> tuple[Array, Array, Array]:
            targets = net.apply(theorem.shifted(params, direction, moved / scale), noise)
            kl = partial(objectives.kl, support=support)
            update = theorem.student_update(net.apply, kl, params, noise, targets)
            # D_S is of the order of the teacher's step, so that the student's own step stays the same.
            lower = jax.vmap(lambda rate: loss(theorem.shifted(params, update, rate / moved)) < loss(params))(rates)
            signs = jax.tree.map(jnp.sign, update)
            return theorem.alignment(update, direction) > 0, lower, theorem.alignment(signs, direction) > 0

        return jax.lax.map(at, moved)

    keys = jax.random.split(named_key(config.seed, "draws"), config.draws)
    positive, lower, signed = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=10))(keys)
    mean = lambda flags: np.asarray(jnp.mean(flags, 0))  # noqa: E731
    return Signs(np.asarray(moved), np.asarray(rates), mean(positive), mean(lower), mean(signed))


def measure_labels(config: ConfigDict, base: Setting) -> Labels:
    """Labels drawn from the teacher at T = 1: the mean inner product over draws against that of soft labels."""
    soft = partial(objectives.soft_cross_entropy, support=base.support)
    hard = partial(objectives.cross_entropy, support=base.support)

    @jax.jit
    def inner(params: Params, direction: Params, inputs: Array, keys: Array) -> tuple[Array, Array]:
        _, v = theorem.tangent(base.apply, params, direction, inputs)
        epsilon = 0.3 / jnp.sqrt(jnp.mean(jnp.square(v[..., base.support])))
        teacher = base.apply(theorem.shifted(params, direction, epsilon), inputs)

        def one(key: Array) -> Array:
            labels = objectives.sample_labels(key, teacher, support=base.support)
            return theorem.alignment(theorem.student_update(base.apply, hard, params, inputs, labels), direction)

        update = theorem.student_update(base.apply, soft, params, inputs, teacher)
        return theorem.alignment(update, direction), jax.lax.map(one, keys)

    keys = jax.random.split(named_key(config.seed, "labels"), config.label_draws)
    exact, drawn = inner(base.params, base.direction, base.inputs, keys)
    return Labels(float(exact), normal_interval(np.asarray(drawn)))


def measure_optimizers(base: Setting) -> dict[str, float]:
    """cos(update, D_T) of the gradient, its sign, and Adam's first step, for a small step of the teacher."""
    kl = partial(objectives.kl, support=base.support)
    targets = base.apply(theorem.shifted(base.params, base.direction, 1e-3), base.inputs)
    update = theorem.student_update(base.apply, kl, base.params, base.inputs, targets)
    adam = optax.adam(1.0)
    step, _ = adam.update(jax.tree.map(jnp.negative, update), adam.init(base.params))
    updates = {"gradient": update, "sign of the gradient": jax.tree.map(jnp.sign, update), "Adam's first step": step}
    return {name: float(theorem.coverage(value, base.direction)) for name, value in updates.items()}


def _descent(loss: Loss, params: Params) -> Params:
    """D_T = -∇L_T(θ⁰)."""
    return jax.tree.map(jnp.negative, jax.jit(jax.grad(loss))(params))


def _mean(total: objectives.Total) -> Array:
    return total[0] / total[1]
