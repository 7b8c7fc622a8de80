"""NNX modules as pure functions of plain parameter dicts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from flax import nnx
from jaxtyping import Array, Key

Params = dict[Any, Any]  # by names; layers of a list by their numbers


Module = TypeVar("Module", bound=Callable[..., Array])


@dataclass(frozen=True)
class Functions(Generic[Module]):
    """A network: `init(key) -> params`, `apply(params, inputs, …) -> logits`, and `bind(params)`, the module itself."""

    init: Callable[[Key[Array, ""]], Params]
    apply: Callable[..., Array]
    bind: Callable[[Params], Module]


def functions(make: Callable[[nnx.Rngs], Module]) -> Functions[Module]:
    """The functions of the module that `make` builds."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)), nnx.Param)[1])

    def bind(params: Params) -> Module:
        return nnx.merge(graphdef, params)

    def apply(params: Params, inputs: object, **options: object) -> Array:
        return bind(params)(inputs, **options)

    return Functions(init, apply, bind)
