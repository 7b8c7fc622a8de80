"""A model as configs name it."""

from dataclasses import dataclass

from jax.sharding import Mesh

from sublim_jax import weights
from sublim_jax.models.language import Model
from sublim_jax.specs import Checked, Text


@dataclass(frozen=True)
class NamedModel(Checked):
    """A model by a name that `weights.load` accepts, and the dtype of its weights."""

    where = "model."
    name: Text
    dtype: str

    def __post_init__(self) -> None:
        super().__post_init__()
        weights.float_type(self.dtype)

    def load(self, mesh: Mesh) -> Model:
        return weights.load(self.name, mesh, weights.float_type(self.dtype))
