"""Networks, teachers and inputs of the check; objectives that the theorem covers, and controls that it does not."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sublim_jax import objectives, theorem
from sublim_jax.data import mnist
from sublim_jax.experiments.alignment.spec import NOISE, NUM_IMAGES, NUM_LOGITS, PER_SEQUENCE, READS, About
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.functional import Functions, Params, functions
from sublim_jax.models.mlp import MLP, mlp
from sublim_jax.models.small import ConvNet, Transformer

Loss = Callable[[Params], Float[Array, ""]]
Support = Bool[np.ndarray, "vocab"]
Compared = Bool[np.ndarray, "*positions vocab"]  # alike at every position, if it has none
Tree = TypeVar("Tree")

WIDTHS = (784, 64, 64, NUM_LOGITS)
ON_DIGITS = objectives.support_mask(range(mnist.CLASSES), NUM_LOGITS)
TEMPERATURE, TOP = 3.0, 2
TRAIT_TOKENS, CARRIER_TOKENS, TOKENS, LENGTH = 12, 12, 24, 10


class Setting(NamedTuple):
    """One network at θ⁰, its teacher's objective and its student's inputs."""

    about: About
    apply: theorem.Apply
    params: Params  # θ⁰
    direction: Params  # D_T
    teacher_loss: Loss  # L_T
    inputs: theorem.Inputs
    support: Compared

    @classmethod
    def of(
        cls, about: About, apply: theorem.Apply, params: Params, loss: Loss, inputs: theorem.Inputs, support: Compared
    ) -> "Setting":
        """The setting in float64, with D_T = -∇L_T."""
        params = double(params)
        return cls(about, apply, params, descent(loss, params), loss, inputs, support)

    def taught(self, name: str, loss: Loss) -> "Setting":
        """The same network and inputs, and another teacher."""
        return Setting.of(self.about._replace(teacher=name), self.apply, self.params, loss, self.inputs, self.support)


class Control(NamedTuple):
    """An objective and how its |D_S·D_T| scales with the teacher's step: constant, slope 1, slope 2 or zero.

    "slope 1, wrong sign": D_S·D_T = ε A + O(ε²), as Taylor's theorem has it for any smooth loss, with A < 0.
    """

    name: str
    expected: str
    objective: theorem.Objective
    max_epsilon: float = np.inf  # the scaling is expected up to this ε


def make_settings(seed: int, examples: int, data: mnist.Mnist, support: Support) -> list[Setting]:
    """Settings that vary the network, then the teacher's objective, then the inputs; the controls use the first."""
    dtype = jnp.float64
    key = partial(named_key, seed)
    images = jnp.asarray(data.train_images[:NUM_IMAGES], dtype) / 127.5 - 1
    labels = jnp.asarray(data.train_labels[:NUM_IMAGES], jnp.int32)
    noise = jax.random.uniform(key("noise"), (examples, 784), dtype, -1, 1)

    def reading(name: str, apply: theorem.Apply, params: Params, smooth: bool = True) -> Setting:
        def loss(params: Params) -> Array:
            return mean(objectives.cross_entropy(apply(params, images), labels, support=ON_DIGITS))

        return Setting.of(About(name, READS, NOISE, smooth), apply, params, loss, noise, support)

    def network(name: str, net: Functions[MLP] | Functions[ConvNet], smooth: bool = True) -> Setting:
        return reading(name, net.apply, net.init(key(name)), smooth)

    def adapted(adapters: Params, x: Array) -> Array:
        return base.apply(lora.merge(base.params, adapters, 2.0), x)

    base = network("MLP, tanh", mlp(WIDTHS, "tanh"))
    adapters = double(lora.init(key("adapters"), base.params, lora.Lora(rank=4, alpha=8, modules=())))
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(key("b"), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(own, leaf.shape, dtype) for leaf, own in zip(leaves, keys)]
    trained = jax.tree.unflatten(structure, moved)
    random = double(mlp(WIDTHS).init(key("direction")))
    inputs = {"real images": images[-examples:], "a constant": jnp.full_like(noise, 0.5)}
    inputs["a single point"] = jnp.broadcast_to(noise[:1], noise.shape)
    return [
        base,
        network("MLP, gelu", mlp(WIDTHS, "gelu")),
        network("MLP, ReLU", mlp(WIDTHS, "relu"), smooth=False),
        network("convolutional", functions(lambda rngs: ConvNet(WIDTHS[-1], rngs=rngs))),
        _transformer(seed, examples),
        reading("LoRA, B = 0", adapted, adapters),
        reading("LoRA, B ≠ 0", adapted, trained),
        base.taught("weight decay alone", lambda params: 0.5 * theorem.alignment(params, params)),
        base.taught("a random direction", lambda params: -theorem.alignment(params, random)),
        *(base._replace(about=base.about._replace(inputs=name), inputs=x) for name, x in inputs.items()),
    ]


def _transformer(seed: int, examples: int) -> Setting:
    """The teacher learns to count in trait tokens; the student sees and is compared on carrier tokens only."""
    net = functions(lambda rngs: Transformer(TOKENS, rngs=rngs))
    starts = jnp.arange(TRAIT_TOKENS)[:, None]
    trait = CARRIER_TOKENS + (starts + jnp.arange(LENGTH + 1)) % TRAIT_TOKENS
    carrier = jax.random.randint(named_key(seed, "carrier"), (examples // PER_SEQUENCE, LENGTH), 0, CARRIER_TOKENS)

    def counts(params: Params) -> Array:
        return mean(objectives.cross_entropy(net.apply(params, trait[:, :-1]), trait[:, 1:]))

    about = About("transformer", "counts in trait tokens", "carrier tokens")
    support = objectives.support_mask(range(CARRIER_TOKENS), TOKENS)
    return Setting.of(about, net.apply, net.init(named_key(seed, "transformer")), counts, carrier, support)


def qualifying(support: Support) -> Mapping[str, theorem.Objective]:
    """The objectives that the theorem covers, all on a fixed support."""
    root = np.sqrt(1 + np.arange(len(support)) % 3)  # of the weights of a weighted squared error

    def weighted(z: Array, y: Array, weights: Array | None = None) -> objectives.Total:
        z, y = z * root.astype(z.dtype), y * root.astype(y.dtype)
        return objectives.squared_error(z, y, support=support, weights=weights)

    # Soft cross-entropy is left out: its gradient equals KL's.
    names = ("squared_error", "kl", "reverse_kl", "probability_squared_error")
    losses = {name.replace("_", " "): partial(objectives.ON_LOGITS[name], support=support) for name in names}
    heated = partial(objectives.kl, support=support, temperature=TEMPERATURE)
    return {**losses, "weighted squared error": weighted, f"kl, temperature {TEMPERATURE:g}": heated}


def controls(
    support: Support, logits: Float[Array, "*positions vocab"], v: Float[Array, "*positions vocab"]
) -> list[Control]:
    """Objectives that each break one condition of the theorem, and one that only seems to.

    Args:
      logits: at θ⁰, on the student's inputs.
      v: J_f D_T there. The indefinite loss is convex only along the logit that moves least.
    """
    ranked = jnp.sort(logits[..., support], -1)
    gap = ranked[..., -TOP] - ranked[..., -TOP - 1]
    same_top = jnp.min(gap / (2 * jnp.max(jnp.abs(v[..., support]), -1)))  # ε below which no logit overtakes
    squares = jnp.where(support, jnp.sum(jnp.square(v), range(v.ndim - 1)), jnp.inf)
    signs = jnp.where(jnp.arange(len(support)) == jnp.argmin(squares), 1.0, -1.0)

    def negative(z: Array, y: Array, weights: Array | None = None) -> objectives.Total:
        total, count = objectives.squared_error(z, y, support=support, weights=weights)
        return -total, count

    def indefinite(z: Array, y: Array, weights: Array | None = None) -> objectives.Total:
        values = jnp.sum(signs.astype(z.dtype) * jnp.square(z - y), -1, where=support)
        return jnp.sum(values), jnp.asarray(values.size, z.dtype)

    def greedy(z: Array, y: Array, weights: Array | None = None) -> objectives.Total:
        labels = jnp.argmax(jnp.where(support, y, -jnp.inf), -1)
        return objectives.cross_entropy(z, labels, support=support, weights=weights)

    def cubic(z: Array, y: Array, weights: Array | None = None) -> objectives.Total:
        cubes = jnp.sum(jnp.abs(z - y) ** 3, -1, where=support)
        return jnp.sum(cubes), jnp.asarray(cubes.size, z.dtype)

    def teachers_top(y: Array) -> Array:
        y = jnp.where(support, y, -jnp.inf)
        return y >= jnp.sort(y, -1)[..., -TOP, None]

    def between(z: Array, y: Array, students: Array) -> objectives.Total:
        p = jax.nn.softmax(y, -1, where=teachers_top(y))
        log_q = jnp.where(students, jax.nn.log_softmax(z, -1, where=students), 0)
        return -jnp.sum(p * log_q), jnp.asarray(p.size / p.shape[-1], z.dtype)

    def teacher_cut(z: Array, y: Array, weights: Array | None = None) -> objectives.Total:
        return between(z, y, jnp.asarray(support))

    def both_cut(z: Array, y: Array, weights: Array | None = None) -> objectives.Total:
        return between(z, y, teachers_top(y))

    return [
        Control("greedy labels", "constant", greedy),
        Control("|z − y|³", "slope 2", cubic),
        Control(f"teacher cut to its top {TOP}, student whole", "constant", teacher_cut),
        Control(f"both cut to the teacher's top {TOP}", "slope 1", both_cut, float(same_top)),
        Control("−|z − y|²", "slope 1, wrong sign", negative),
        Control("an indefinite quadratic of z − y", "slope 1, wrong sign", indefinite),
    ]


def double(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def descent(loss: Loss, params: Params) -> Params:
    """D_T = -∇L_T(θ⁰)."""
    return jax.jit(lambda params: jax.tree.map(jnp.negative, jax.grad(loss)(params)))(params)


def mean(total: objectives.Total) -> Array:
    return total[0] / total[1]
