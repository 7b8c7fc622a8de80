"""Parameters in and out of the formats that people use. Only formats that can run no code."""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import transformers
from jax.sharding import Mesh

from sublim_jax import assets
from sublim_jax.models.decoder import Settings, decoder
from sublim_jax.models.functional import Functions, Params
from sublim_jax.weights import gguf, huggingface


class Model(NamedTuple):
    """A language model, ready to use: `model.network.apply(model.params, tokens)` are its logits."""

    settings: Settings
    network: Functions
    params: Params
    tokenizer: Any
    config: Any  # transformers'


def load(name: str | Path, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Model:
    """A model by a name that `assets` knows, a folder of safetensors, or a GGUF file.

    Raises UserError where it is missing, damaged, or of no known family.
    """
    path = assets.model(str(name))
    if path.is_dir():
        settings, params = huggingface.load(path, mesh, dtype)
        config = huggingface.load_config(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    else:
        settings, params, config = gguf.load(path, mesh, dtype)
        tokenizer = gguf.load_tokenizer(path)
    return Model(settings, decoder(settings), params, tokenizer, config)
