"""The multilayer perceptron of the MNIST experiment (paper §6.2)."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from sublim_jax.models.functional import Functions, Params, functions

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,  # by tanh; models/activations.py has the exact one
    "silu": jax.nn.silu,
    "tanh": jax.numpy.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}


class MLP(nnx.Module):
    """Affine layers with an activation between them; weights N(0, 1/fan_in), biases 0."""

    def __init__(self, widths: Sequence[int], activation: str, biases: bool, *, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[activation]
        self.layers = nnx.List(
            nnx.Linear(
                inputs,
                outputs,
                use_bias=biases,
                kernel_init=nnx.initializers.variance_scaling(1.0, "fan_in", "normal"),
                rngs=rngs,
            )
            for inputs, outputs in zip(widths, widths[1:])
        )

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch logits"]:
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))
        return last(x)


def mlp(widths: Sequence[int], activation: str = "relu", biases: bool = True) -> Functions[MLP]:
    """The MLP with layer sizes `widths`, inputs and logits included."""
    return functions(lambda rngs: MLP(widths, activation, biases, rngs=rngs))


def perturb(params: Params, key: Key[Array, ""], distance: float) -> Params:
    """Weights moved by `distance` times their own initial standard deviation, in a random direction.

    Biases start at 0 without spread and stay there.
    """

    def move(path: tuple[jax.tree_util.DictKey, ...], leaf: Array, leaf_key: Array) -> Array:
        if path[-1].key != "kernel":
            return leaf
        return leaf + distance * leaf.shape[0] ** -0.5 * jax.random.normal(leaf_key, leaf.shape)

    leaves, structure = jax.tree.flatten(params)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    return jax.tree_util.tree_map_with_path(move, params, keys)
