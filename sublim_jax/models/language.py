"""A loaded language model: its network, parameters and tokenizer, and where on the machine they are."""

import dataclasses
import hashlib
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.digests import Source, of_array
from sublim_jax.errors import UserError
from sublim_jax.models import lora
from sublim_jax.models.decoder import Decoder, Placement, decoder, on_mesh
from sublim_jax.models.functional import Functions, Params
from sublim_jax.models.settings import Settings
from sublim_jax.sharding import everywhere, fetch, parameter_shardings

if TYPE_CHECKING:  # transformers takes seconds, and an experiment without language models needs none of it
    from transformers import PreTrainedConfig


class Model(NamedTuple):
    """A language model, ready to use: `model.network.apply(model.params, tokens)` are its logits.

    Attributes:
      params: of the base, without adapters.
      config: transformers'.
      mesh: where its parameters are.
      decoding: the mesh, over the same devices, for sampling and scoring; `mesh` where left out. There a layer is split
        over `tensor` alone, and each device decodes its own rows.
      source: the files that it was read from; empty for a model that was made in memory.
      changes: changes to the weights after they were read.
      precision: of products of float32, in which an experiment computes: a part of what the model is.
    """

    settings: Settings
    network: Functions[Decoder]
    params: Params
    tokenizer: Tokenizer
    config: "PreTrainedConfig"
    mesh: Mesh
    source: Source = Source("", "", "")
    changes: str = ""
    decoding: Mesh | None = None
    precision: str = "float32"

    @property
    def digest(self) -> str:
        """Identifies what the model computes: by its files, dtype, adapters' spec, later changes and precision."""
        dtype = jax.tree.leaves(self.params)[0].dtype
        text = f"{self.source.digest or _digest_of(self.params)} {dtype} {self.settings.lora} {self.changes}"
        if self.precision != "float32":
            text += f" {self.precision}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def placement(self) -> Placement:
        """`place` and `attend` of the network for the model's mesh."""
        return on_mesh(self.settings, self.mesh)

    def merged(self, adapters: Params, spec: lora.Lora) -> "Model":
        """The same model with adapters added into its kernels.

        Raises UserError for a stack of several, such as that of students; take one of them.
        """
        if any(leaf.ndim != 3 for leaf in jax.tree.leaves(adapters)):  # layers, inputs, rank
            raise UserError(
                "these adapters are not those of one model; take one of the stack: "
                "jax.tree.map(lambda leaf: leaf[0], adapters)"
            )
        shardings = parameter_shardings(self.params, self.mesh)
        merge = jax.jit(partial(lora.merge, scale=spec.scale), out_shardings=shardings)
        return self._replace(
            params=merge(self.params, everywhere(adapters, self.mesh)),
            changes=f"{self.changes} {spec} {_digest_of(adapters)}",
        )

    def adapted(self, spec: lora.Lora | None) -> "Model":
        """The same model with adapters beside its kernels (None: without); `params` stay those of the base.

        Raises UserError for modules or layers that the model does not have.
        """
        if spec:
            lora.check(spec, self.params, self.settings.layers)
            # "All" are those of the layers here: a decoder has no adapter of its unembedding.
            spec = dataclasses.replace(spec, modules=spec.modules or lora.EVERY_LINEAR)
        settings = dataclasses.replace(self.settings, lora=spec)
        return self._replace(settings=settings, network=decoder(settings))

    def for_adapters(self, stacked: Params | None) -> tuple["Model", int]:
        """The model that takes these adapters, and their number. None: the model without any, and 1.

        Raises UserError for adapters of another model, and for one that is not in a stack.
        """
        if stacked is None:
            return self.adapted(None), 1
        expected = jax.eval_shape(partial(_untrained, self.settings.lora), jax.random.key(0), self.params)
        if str(jax.tree.structure(stacked)) != str(jax.tree.structure(expected)):
            raise UserError(f"these adapters are not of this model, whose adapters are {self.settings.lora}")
        shapes = [leaf.shape for leaf in jax.tree.leaves(stacked)]
        count = shapes[0][0] if shapes[0] else 0
        if shapes != [(count, *leaf.shape) for leaf in jax.tree.leaves(expected)]:
            raise UserError(
                f"adapters of shapes such as {shapes[0]} are not a stack of this model's, whose shape is "
                f"{jax.tree.leaves(expected)[0].shape} after one more axis; for one teacher, give **teacher.where"
            )
        return self, count

    def noisy(self, relative: float, key: Key[Array, ""]) -> "Model":
        """With Gaussian noise on all weights, `relative` times the standard deviation of each array."""
        shardings = parameter_shardings(self.params, self.mesh)
        change = jax.jit(partial(_with_noise, relative=relative), out_shardings=shardings)
        changes = f"{self.changes} noise {relative} {np.asarray(jax.random.key_data(key)).tolist()}"
        return self._replace(params=change(self.params, key), changes=changes)

    def untrained(self, key: Key[Array, ""]) -> Params:
        """Initial trainable parameters, in float32, to be `lora.join`ed to the base; they do not change it yet.

        Adapters, A random and B zero; or without adapters in the settings, all weights of the layers as they are.
        """
        return _untrained(self.settings.lora, key, self.params)


@partial(jax.jit, static_argnums=0)
def _untrained(spec: lora.Lora | None, key: Key[Array, ""], base: Params) -> Params:
    if spec:
        return lora.init(key, base, spec)
    return {"layers": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base["layers"])}


def _with_noise(params: Params, key: Key[Array, ""], relative: float) -> Params:
    leaves, structure = jax.tree.flatten(params)
    keys = [jax.random.fold_in(key, number) for number in range(len(leaves))]
    noise = [
        relative * jnp.std(leaf.astype(jnp.float32)) * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)
    ]
    return jax.tree.unflatten(structure, [(leaf + n).astype(leaf.dtype) for leaf, n in zip(leaves, noise)])


def _digest_of(params: Params) -> str:
    return " ".join(of_array(fetch(leaf)) for leaf in jax.tree.leaves(params))
