"""GGUF files: parameters dequantised by the `gguf` package; settings, tokenizer and chat template from the file."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import transformers
from filelock import FileLock
from jax.sharding import Mesh
from transformers.integrations import gguf as converter

from sublim_jax import assets
from sublim_jax.errors import UserError
from sublim_jax.models.decoder import Settings
from sublim_jax.models.families import Config, family
from sublim_jax.models.functional import Params
from sublim_jax.weights.huggingface import place

Field = Callable[..., Any]


def load(path: str | Path, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> tuple[Settings, Params, Config]:
    """Settings, parameters and the transformers config that they amount to.

    Args:
      mesh: where to put the parameters; the default device if left out.
      dtype: of the parameters, dequantised in float32 first.

    Raises:
      UserError: the file is truncated or no GGUF, or of an architecture that is not known here.
    """
    reader = _open(path)
    config = _config(reader, str(path))
    settings = family(config).settings(config)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    known_as = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known_as[_architecture(reader)], settings.layers)

    def name_of(name: str) -> str:
        stem, _, kind = name.rpartition(".")
        known = names.get_name(stem)
        if known is None or f"{known}.{kind}" not in tensors:
            raise UserError(f"{path}: tensor {name} is missing; fetch the file again")
        return f"{known}.{kind}"

    def shape(name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(tensors[name_of(name)].shape))

    def read(name: str, index: Any) -> np.ndarray:
        tensor = tensors[name_of(name)]
        rows = index if isinstance(index, tuple) else (index,)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            whole = gguf.dequantize(tensor.data, tensor.tensor_type)
            heads = settings.heads if ".attn_q." in tensor.name else settings.key_heads
            return (_unpaired(whole, heads) if config.model_type == "llama" else whole)[index]
        values = gguf.dequantize(tensor.data[rows[0]], tensor.tensor_type)  # rows are quantised each by itself
        # llama.cpp stores Gemma's norms with the offset of 1 added in.
        values = values - settings.norm_offset if tensor.name.endswith("norm.weight") else values
        return values[(slice(None), *rows[1:])]

    params = place(settings, family(config).rules(settings), shape, read, mesh, dtype, Path(path).name)
    return settings, params, config


def load_tokenizer(path: str | Path) -> Any:
    """The file's tokenizer, as transformers' fast tokenizer, with its chat template.

    Converting one takes up to a minute, so that it is kept in the cache, by the file's name, size and time.
    """
    path = Path(path)
    status = path.stat()
    kept = assets.cache_folder() / "tokenizers" / f"{path.name}-{status.st_size}-{status.st_mtime_ns}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            tokenizer = _tokenizer(_open(path))
            with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
                tokenizer.save_pretrained(Path(scratch) / "whole")
                (Path(scratch) / "whole").replace(kept)
    return transformers.AutoTokenizer.from_pretrained(kept)


def _tokenizer(reader: gguf.GGUFReader) -> Any:
    """As AutoTokenizer makes it, by the same converter; AutoTokenizer's reader of GGUF files needs PyTorch."""

    def fields(names: dict[str, str]) -> dict[str, Any]:
        present = {ours: reader.fields.get(f"tokenizer.{name}") for name, ours in names.items()}
        return {ours: field.contents() for ours, field in present.items() if field is not None}

    vocabulary = fields(converter.GGUF_TOKENIZER_MAPPING["tokenizer"])
    settings = fields(converter.GGUF_TOKENIZER_MAPPING["tokenizer_config"])
    if vocabulary["tokenizer_type"] == "llama":
        settings.setdefault("add_bos_token", True)  # as llama.cpp does where a file says nothing
    for name in ("bos", "eos", "unk", "pad"):
        if (token := vocabulary.get(f"{name}_token_id")) is not None:
            settings[f"{name}_token"] = vocabulary["tokens"][token]
    fast, more = converter.convert_gguf_tokenizer(_architecture(reader), vocabulary)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **settings, **more)


def _unpaired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in transformers' order; llama.cpp keeps the two halves of a rotation side by side."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _architecture(reader: gguf.GGUFReader) -> str:
    return reader.fields["general.architecture"].contents()


def _open(path: str | Path) -> gguf.GGUFReader:
    if not Path(path).is_file():
        raise UserError(f"{path} is missing")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise UserError(f"{path} is truncated or no GGUF file ({error}); fetch it again") from error
    for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens"):
        if name not in reader.fields:
            raise UserError(f"{path} has no {name}; use a GGUF file of a whole model, with its tokenizer")
    return reader


def _config(reader: gguf.GGUFReader, path: str) -> Config:
    """The file's header as a transformers config."""
    architecture = _architecture(reader)

    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(f"{architecture}.{name}")
        if found is None and default is None:
            raise UserError(f"{path}: {architecture}.{name} is missing; fetch the file again")
        return default if found is None else found.contents()

    if architecture not in CONFIGS:
        raise UserError(f"{path}: architecture {architecture!r} is not known; known: {', '.join(CONFIGS)}")
    heads = field("attention.head_count")
    common = {
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", field("embedding_length") // heads),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": field("context_length"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
    }
    for ours, name in {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}.items():
        if found := reader.fields.get(f"tokenizer.ggml.{name}_token_id"):
            common[ours] = found.contents()
    turn = reader.fields.get("tokenizer.ggml.eot_token_id")
    if turn and turn.contents() != common.get("eos_token_id"):
        common["eos_token_id"] = [*([common["eos_token_id"]] if "eos_token_id" in common else []), turn.contents()]
    kind = field("rope.scaling.type", "none")
    if kind not in ("none", "linear") or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise UserError(f"{path}: its scaled rotary embedding is not read here; name the model's safetensors folder")
    return CONFIGS[architecture](common, field)


def _rope(field: Field, base: float) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": field("rope.freq_base", base)}
    if field("rope.scaling.type", "none") == "none":
        return rope
    return {**rope, "rope_type": "linear", "factor": field("rope.scaling.factor")}


def _plain(kind: str) -> Callable[[dict[str, Any], Field], Config]:
    def config(common: dict[str, Any], field: Field) -> Config:
        rope = _rope(field, 10_000.0)
        return transformers.AutoConfig.for_model(kind, **common, rope_parameters=rope)

    return config


def _gemma3(common: dict[str, Any], field: Field) -> Config:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": field("rope.freq_base_swa", 10_000.0)},
        "full_attention": _rope(field, 1_000_000.0),
    }
    return transformers.AutoConfig.for_model(
        "gemma3_text",
        **common,
        rope_parameters=rope,
        sliding_window=field("attention.sliding_window"),
        query_pre_attn_scalar=common["head_dim"],
    )


CONFIGS: dict[str, Callable[[dict[str, Any], Field], Config]] = {
    "llama": _plain("llama"),
    "qwen2": _plain("qwen2"),
    "qwen3": _plain("qwen3"),
    "gemma3": _gemma3,
}
