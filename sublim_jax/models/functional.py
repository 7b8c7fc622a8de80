"""NNX modules as pure functions of plain parameter dicts."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Key

Params = dict[Any, Any]  # by names; layers of a list by their numbers


class Functions(NamedTuple):
    """A network: `init(key) -> params`, `apply(params, inputs, …) -> logits`, and `bind(params)`, the module itself."""

    init: Callable[[Key[Array, ""]], Params]
    apply: Callable[..., Array]
    bind: Callable[[Params], Any]


def functions(make: Callable[[nnx.Rngs], nnx.Module]) -> Functions:
    """The functions of the module that `make` builds."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)), nnx.Param)[1])

    def bind(params: Params) -> Any:
        return nnx.merge(graphdef, params)

    def apply(params: Params, inputs: Any, **options: Any) -> Array:
        return bind(params)(inputs, **options)

    return Functions(init, apply, bind)
