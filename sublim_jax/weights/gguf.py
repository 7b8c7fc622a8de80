"""GGUF files: parameters dequantised by the `gguf` package; settings, tokenizer and chat template from the file.

A model computes what llama.cpp computes, or is refused: every tensor is read, and every field that affects logits or
tokens is supported. `docs/parity.md` lists the fields that are refused, and those that are ignored as harmless.
"""

from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.errors import UserError
from sublim_jax.models.families import Config, Rule, family
from sublim_jax.models.functional import Params
from sublim_jax.models.settings import Settings
from sublim_jax.weights import gguf_tokenizer
from sublim_jax.weights.gguf_config import ARCHITECTURES, ROPE_FREQS, config_of
from sublim_jax.weights.gguf_file import File, open_model
from sublim_jax.weights.huggingface import Index, place


def load(path: str | Path, mesh: Mesh | None = None, dtype: DTypeLike = jnp.float32) -> tuple[Settings, Params, Config]:
    """Settings, parameters and the equivalent transformers config.

    Args:
      mesh: where to put the parameters; the default device if left out.
      dtype: of the parameters, dequantised in float32 first.

    Raises:
      UserError: the file is truncated or no GGUF, of an architecture that is not supported, or holds a tensor or a
        field that is not understood.
    """
    file = open_model(path)
    config = config_of(file)
    settings = family(config).settings(config)
    architecture = ARCHITECTURES[file.fields.text("general.architecture")]
    rules = _renamed(family(config).rules(settings), file.fields.text("general.architecture"))
    _check_names(file, rules, settings.layers, architecture.frequencies)

    def shape(name: str) -> tuple[int, ...]:
        if name in file.tensors:
            return file.tensors[name].shape
        return file.tensors[_weight_of(name)].shape[:1]

    def read(name: str, index: Index) -> np.ndarray:
        rows = index if isinstance(index, tuple) else (index,)
        if name not in file.tensors:
            return np.zeros(shape(name), np.float32)[rows]
        tensor = file.tensors[name]
        rows = (*rows, *(slice(None),) * (len(tensor.shape) - len(rows)))
        if architecture.paired and (".attn_q." in name or ".attn_k." in name):
            heads = settings.heads if ".attn_q." in name else settings.key_heads
            return _unpaired(tensor.read((slice(None),) * len(rows)), heads)[rows]
        values = tensor.read(rows)
        # llama.cpp stores Gemma's norms with the offset of 1 added in.
        return values - settings.norm_offset if name.endswith("norm.weight") else values

    return settings, place(settings, rules, shape, read, mesh, dtype, Path(path).name), config


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The file's tokenizer, as transformers' fast tokenizer, with its chat template.

    Raises UserError for one that is not supported.
    """
    return gguf_tokenizer.tokenizer_of(open_model(path))


def _renamed(rules: tuple[Rule, ...], architecture: str) -> tuple[Rule, ...]:
    """The rules with llama.cpp's names of the tensors."""
    known_as = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known_as[architecture], 1)

    def renamed(name: str) -> str:
        stem, _, kind = name.format(i=0).rpartition(".")
        return f"{names.get_name(stem)}.{kind}".replace("blk.0.", "blk.{i}.")

    return tuple(rule._replace(tensor=renamed(rule.tensor)) for rule in rules)


def _check_names(file: File, rules: tuple[Rule, ...], layers: int, frequencies: bool) -> None:
    """Raises UserError for a tensor that is not read, or is missing. Missing biases are zero."""
    wanted = dict.fromkeys(rule.tensor.format(i=layer) for rule in rules for layer in range(layers))
    read = {*wanted, *([ROPE_FREQS] if frequencies else [])}
    if others := [name for name in file.tensors if name not in read]:
        raise UserError(f"{file.path}: tensor {others[0]} is not supported, and would be left out of what is computed")
    for name in wanted:
        if name not in file.tensors and _weight_of(name) not in file.tensors:
            raise UserError(f"{file.path} has no tensor {_weight_of(name)}; use a GGUF file of a whole model")


def _weight_of(name: str) -> str:
    return f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name


def _unpaired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in transformers' order; llama.cpp interleaves the two halves of a rotation."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
