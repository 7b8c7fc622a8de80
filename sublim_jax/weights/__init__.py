"""Reads and writes parameters in common formats, only in those that cannot run code."""

from pathlib import Path
from typing import cast

import jax.numpy as jnp
import transformers
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sublim_jax import assets, digests, storage
from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.digests import Source
from sublim_jax.errors import UserError, one_line
from sublim_jax.models.decoder import decoder
from sublim_jax.models.families import family
from sublim_jax.models.language import Model
from sublim_jax.models.settings import Settings
from sublim_jax.sharding import check_same, one_device
from sublim_jax.weights import gguf, huggingface
from sublim_jax.weights.shapes import SHAPES


def float_type(name: str) -> jnp.dtype:
    """The dtype of parameters by its name. Raises UserError for any other name."""
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype={name!r}: choose float32, bfloat16 or float16")
    return jnp.dtype(name)


def load(name: str | Path, mesh: Mesh | None = None, dtype: DTypeLike = jnp.float32) -> Model:
    """A model by a name that `assets` knows or that the hub has, a folder of safetensors, or a GGUF file.

    Files may be in a bucket.

    Args:
      dtype: of the weights: float32, bfloat16 or float16.

    Raises UserError where it is missing, damaged, of not a known family, or not the same on all processes.
    """
    dtype = float_type(jnp.dtype(dtype).name)
    path = assets.model(str(name))
    source = Source(str(name), str(path), digests.of_model(path))
    check_same(source.digest, f"model {name}")
    if path.is_dir():
        settings, params = huggingface.load(path, mesh, dtype)
        config = huggingface.load_config(path)
        tokenizer = _tokenizer(path)
    else:
        settings, params, config = gguf.load(path, mesh, dtype)
        tokenizer = gguf.load_tokenizer(path)
    return Model(settings, decoder(settings), params, tokenizer, config, mesh or one_device(), source)


def save(folder: str | Path, model: Model) -> None:
    """Writes a folder that transformers, and tools for its models, can load: weights, config and tokenizer.

    Adapters are not written: merge them first (`peft.merged`, `Model.merged`). Raises UserError where the folder holds
    an adapter, or a multimodal model, which would be lost.
    """
    huggingface.save(folder, model.params, model.settings, model.config, model.tokenizer)


def _tokenizer(folder: Path) -> Tokenizer:
    """A folder's tokenizer. Raises UserError where transformers reads none, or only with the folder's own code."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return cast(Tokenizer, tokenizer)
    except Exception as error:  # tokenizer classes raise anything for files that are not a tokenizer's
        reason = one_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, by auto_map in tokenizer_config.json, which is never run"
        raise UserError(
            f"{folder} has no tokenizer that transformers reads ({reason}); put the model's there"
        ) from error


def shape_of(name: str) -> Settings:
    """A model's settings without its weights, from the config.json of a folder or a name in `shapes`."""
    if storage.in_bucket(name) and not name.endswith(".gguf"):  # whose weights are not needed
        config = huggingface.load_config(storage.local(name, ["config.json"]))
    elif assets.is_folder(name):
        config = huggingface.load_config(Path(name).expanduser())
    elif name in SHAPES:
        kind, values = SHAPES[name]
        config = transformers.AutoConfig.for_model(kind, **values)
    else:
        raise UserError(f"the shape of model {name!r} is not supported; give a folder with its config.json")
    return family(config).settings(config)
