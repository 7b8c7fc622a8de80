"""NNX modules as pure functions of plain parameter dicts."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Key

Params = dict[str, Any]


class Functions(NamedTuple):
    """A network: `init(key) -> params`, and `apply(params, inputs) -> logits`."""

    init: Callable[[Key[Array, ""]], Params]
    apply: Callable[[Params, Any], Array]


def functions(make: Callable[[nnx.Rngs], nnx.Module]) -> Functions:
    """The functions of the module that `make` builds."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)), nnx.Param)[1])

    def apply(params: Params, inputs: Any) -> Array:
        return nnx.merge(graphdef, params)(inputs)

    return Functions(init, apply)
