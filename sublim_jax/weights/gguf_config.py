"""The header of a GGUF file as a transformers config: what llama.cpp would compute, or refused by name.

Defaults, and the meaning of a field for an architecture, are those of llama.cpp's loader.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import transformers
from huggingface_hub.errors import StrictDataclassError

from sublim_jax.errors import UserError
from sublim_jax.models.families import Config
from sublim_jax.weights import gguf_tokenizer
from sublim_jax.weights.gguf_file import Fields, File, Value

Values: TypeAlias = dict[str, Any]  # of a transformers config

ROPE_FREQS = "rope_freqs.weight"

# Fields of an architecture that change no logits, whatever they hold.
HARMLESS = (
    "vocab_size",  # the tokens are counted
    "tensor_data_layout",
    "attention.layer_norm_epsilon",  # of norms that these architectures do not have
    "attention.group_norm_*",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",  # read where YaRN asks for it
    "rope.freq_base_swa",  # read where layers have windows
    "expert_weights_scale",  # of experts, of which there are none
    "expert_gating_func",
    "moe_every_n_layers",
    "mm.*",  # of images, whose tensors are refused
    "vision.*",
    "interleave_moe_layer_step",
)
# Values other than zero at which a field changes nothing.
NEUTRAL: dict[str, tuple[Value, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
}
WHY = {
    "attention.causal": "layers that look ahead",
    "pooling_type": "an embedding model",
    "classifier.output_labels": "a classifier",
    "expert_count": "a mixture of experts",
    "nextn_predict_layers": "layers that predict further tokens",
    "rope.dimension_count": "only a part of each head turns",
}


class Architecture(NamedTuple):
    """One of GGUF's architectures.

    Attributes:
      kind: transformers' model_type.
      theta: the base of the rotary frequencies where a file does not say.
      more: the values specific to this architecture, given the common ones.
      biases: the config's flag for biases, and the tensors that it stands for.
      paired: whether rows of queries and keys interleave the two halves of a rotation.
      frequencies: whether a tensor may divide the rotary frequencies.
    """

    kind: str
    theta: float
    more: Callable[[Fields, str, Values], Values]
    biases: Mapping[str, Collection[str]]
    paired: bool = False
    frequencies: bool = False


def config_of(file: File) -> Config:
    """The config of a file. Raises UserError for an unknown architecture or an unknown field of it."""
    fields = file.fields
    architecture = fields.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: architecture {architecture!r} is not supported; these are: {', '.join(ARCHITECTURES)}"
        )
    gguf_tokenizer.split_of(fields)  # before the weights are read
    known, prefix = ARCHITECTURES[architecture], f"{architecture}."
    values = _common(file, prefix, known.theta)
    values |= known.more(fields, prefix, values)
    for flag, stems in known.biases.items():
        values[flag] = any(name.rpartition(".")[0].split(".")[-1] in stems for name in file.tensors if _is_bias(name))
    if known.frequencies and ROPE_FREQS in file.tensors:
        values["rope_parameters"] = _divided(file, values)
    fields.refuse_others(prefix, HARMLESS, _neutral(values), WHY)
    try:
        return transformers.AutoConfig.for_model(known.kind, **values)
    except (StrictDataclassError, ValueError) as error:
        raise UserError(f"{file.path}: transformers refuses its config ({' '.join(str(error).split())})") from error


def _is_bias(name: str) -> bool:
    return name.startswith("blk.") and name.endswith(".bias")


def _common(file: File, prefix: str, theta: float) -> Values:
    fields = file.fields
    layers = _positive(fields, f"{prefix}block_count")
    if layers > len(file.tensors):
        raise UserError(f"{file.path}: {prefix}block_count is {layers}, and there are {len(file.tensors)} tensors")
    width = _positive(fields, f"{prefix}embedding_length")
    heads = _positive(fields, f"{prefix}attention.head_count")
    groups = _positive(fields, f"{prefix}attention.head_count_kv", heads)
    if heads % groups:
        raise UserError(f"{file.path}: {heads} heads cannot share {groups} keys ({prefix}attention.head_count_kv)")
    size = _positive(fields, f"{prefix}attention.key_length", width // heads)
    if size % 2:
        raise UserError(
            f"{file.path}: heads of {size} entries cannot be rotated in halves ({prefix}attention.key_length)"
        )
    texts = gguf_tokenizer.tokens(fields)
    values: Values = {
        "vocab_size": len(texts),
        "hidden_size": width,
        "intermediate_size": _positive(fields, f"{prefix}feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": size,
        "rms_norm_eps": _rate(fields, f"{prefix}attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": _positive(fields, f"{prefix}context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    values["rope_parameters"] = _rope(fields, prefix, theta, values["max_position_embeddings"])
    named = gguf_tokenizer.special_tokens(fields, texts)
    values |= {f"{name}_token_id": named[name] for name in ("bos", "pad") if name in named}
    stops = gguf_tokenizer.stops(fields, texts)
    return values | {"eos_token_id": stops if len(stops) > 1 else next(iter(stops), None)}


def _neutral(values: Values) -> dict[str, Collection[Value]]:
    """By field, the values that have no effect, given all others."""
    size = values["head_dim"]
    heads = ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa")
    sizes = dict.fromkeys((*heads, "rope.dimension_count", "rope.dimension_count_swa"), (size,))
    return {**NEUTRAL, **sizes, "embedding_length_out": (0, values["hidden_size"])}


def _positive(fields: Fields, name: str, default: int | None = None) -> int:
    value = fields.every_layer(name, default)
    if value < 1:
        raise UserError(f"{fields.path}: {name} is {value}, and must be positive")
    return value


def _rate(fields: Fields, name: str, default: float | None = None) -> float:
    value = fields.number(name, default)
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{fields.path}: {name} is {value}, and must be positive")
    return value


def _scale(fields: Fields, prefix: str) -> float:
    """The factor that positions are divided by; 1 where it is missing or 0."""
    older, newer = f"{prefix}rope.scale_linear", f"{prefix}rope.scaling.factor"
    values = {name: fields.number(name, 0.0) for name in (older, newer)}
    name = newer if newer in fields else older
    return _rate(fields, name) if values[name] else 1.0


def _rope(fields: Fields, prefix: str, theta: float, length: int) -> Values:
    """`rope_parameters`. Where a file names no type of scaling, a factor scales linearly."""
    base = {"rope_type": "default", "rope_theta": _rate(fields, f"{prefix}rope.freq_base", theta)}
    kind, factor = fields.text(f"{prefix}rope.scaling.type", "linear"), _scale(fields, prefix)
    if kind not in ("none", "linear", "yarn"):
        raise UserError(
            f"{fields.path}: {prefix}rope.scaling.type is {kind!r}, which is not read from GGUF; known: none, linear, "
            "yarn; name the model's safetensors folder"
        )
    if kind == "none" or factor == 1.0:
        return base
    scaled = {**base, "rope_type": kind, "factor": factor}
    if kind == "linear":
        return scaled
    original = fields.whole(f"{prefix}rope.scaling.original_context_length", length)
    return {**scaled, "original_max_position_embeddings": original}


def _divided(file: File, values: Values) -> Values:
    """`rope_parameters` where a tensor divides each frequency (Llama 3): LongRoPE with one table for all lengths."""
    rope = values["rope_parameters"]
    size = values["head_dim"] // 2
    if rope["rope_type"] == "yarn" or file.tensors[ROPE_FREQS].shape != (size,):
        raise UserError(
            f"{file.path}: {ROPE_FREQS} is not {size} numbers beside an unscaled or linearly scaled rotation"
        )
    divisors = (file.tensors[ROPE_FREQS].read((slice(None),)) * np.float64(rope.get("factor", 1.0))).tolist()
    if not all(math.isfinite(divisor) and divisor > 0 for divisor in divisors):
        raise UserError(f"{file.path}: {ROPE_FREQS} holds numbers that are not positive")
    return {
        "rope_type": "longrope",
        "rope_theta": rope["rope_theta"],
        "short_factor": divisors,
        "long_factor": divisors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": values["max_position_embeddings"],
    }


def _full_attention(fields: Fields, prefix: str, values: Values) -> Values:
    """Raises UserError for a window that is shorter than the longest text: llama.cpp computes none here."""
    window = fields.whole(f"{prefix}attention.sliding_window", 0)
    if 0 < window < values["max_position_embeddings"]:
        raise UserError(
            f"{fields.path}: {prefix}attention.sliding_window is {window}, and llama.cpp computes no windows for this "
            "architecture; name the model's safetensors folder"
        )
    return {}


def _gemma3(fields: Fields, prefix: str, values: Values) -> Values:
    layers, width, heads = (values[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    window = fields.whole(f"{prefix}attention.sliding_window", 0)
    local = _pattern(fields, f"{prefix}attention.sliding_window_pattern", layers)
    theta = _rate(fields, f"{prefix}rope.freq_base_swa", 10_000.0)
    return {
        "layer_types": ["sliding_attention" if window and slides else "full_attention" for slides in local],
        "sliding_window": window or values["max_position_embeddings"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
            "full_attention": values["rope_parameters"],
        },
        # Files do not say how scores are scaled: llama.cpp knows the 27B model by its depth.
        "query_pre_attn_scalar": width // heads if layers == 62 else values["head_dim"],
        "final_logit_softcapping": fields.number(f"{prefix}final_logit_softcapping", 0.0) or None,
    }


def _pattern(fields: Fields, name: str, layers: int) -> list[bool]:
    """Which layers have a window: as listed, or all but every n-th."""
    if isinstance(fields.get(name), list):
        return [bool(slides) for slides in fields.numbers(name, layers)]
    period = fields.whole(name, 6)
    return [period == 0 or layer % period < period - 1 for layer in range(layers)]


ATTENTION_BIAS = {"attention_bias": ["attn_q", "attn_k", "attn_v", "attn_output"]}
MLP_BIAS = {"mlp_bias": ["ffn_gate", "ffn_up", "ffn_down"]}

ARCHITECTURES: dict[str, Architecture] = {
    # Llama, Mistral, SmolLM2
    "llama": Architecture("llama", 10_000.0, _full_attention, ATTENTION_BIAS | MLP_BIAS, paired=True, frequencies=True),
    "qwen2": Architecture("qwen2", 10_000.0, _full_attention, {}),
    "qwen3": Architecture("qwen3", 10_000.0, _full_attention, ATTENTION_BIAS),
    # The base that Gemma 3 was trained with. llama.cpp would take 10,000; its converter always writes one.
    "gemma3": Architecture("gemma3_text", 1_000_000.0, _gemma3, ATTENTION_BIAS),
}
