"""Families of open language models: each maps a transformers config to `Settings`, and tensors to our parameters.

To add a family to `FAMILIES`: write a function from its config to `Settings`, and one that returns the rules from its
tensors to our parameters (a tuple of `Rule`). The decoder itself is the same for all. `docs/extending.md` has
the steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedConfig

from sublim_jax.errors import UserError
from sublim_jax.models.activations import ACTIVATIONS
from sublim_jax.models.rope import Rotary, Shape, rotary
from sublim_jax.models.settings import Settings

Config = PreTrainedConfig


class Layout(NamedTuple):
    """How one tensor of a checkpoint is split into our parameters, and joined from them."""

    split: Callable[[np.ndarray, Settings], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray], Settings], np.ndarray]


class Rule(NamedTuple):
    """A tensor's name, `{i}` for the layer, and our parameters in it, by path."""

    tensor: str
    paths: tuple[str, ...]
    layout: Layout


class Family(NamedTuple):
    settings: Callable[[Config], Settings]
    rules: Callable[[Settings], tuple[Rule, ...]]
    fields: set[str]  # of config.json that the settings depend on; no other may change the computation


# ------------------------------------------------------------------------------------------------------- layouts

AS_IS = Layout(lambda x, _: (x,), lambda xs, _: xs[0])
TRANSPOSED = Layout(lambda x, _: (x.T,), lambda xs, _: xs[0].T)  # torch's Linear is (outputs, inputs)


def _qkv_sizes(s: Settings) -> list[int]:
    return [s.heads * s.head_size, s.key_heads * s.head_size, s.key_heads * s.head_size]


def _cuts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:end]) for end in range(1, len(sizes))]


# Queries, keys and values one after another along the outputs: of a Linear, of a Conv1D, of a bias.
QKV_ROWS = Layout(
    lambda x, s: [part.T for part in np.split(x, _cuts(_qkv_sizes(s)), 0)],
    lambda xs, s: np.concatenate([part.T for part in xs], 0),
)
QKV_LAST = Layout(
    lambda x, s: np.split(x, _cuts(_qkv_sizes(s)), -1),
    lambda xs, s: np.concatenate(xs, -1),
)
GATE_UP = Layout(
    lambda x, s: [part.T for part in np.split(x, 2, 0)],
    lambda xs, s: np.concatenate([part.T for part in xs], 0),
)


def _heads_split(x: np.ndarray, s: Settings) -> list[np.ndarray]:
    parts = x.reshape(s.heads, 3, s.head_size, *x.shape[1:])
    return [parts[:, i].reshape(-1, *x.shape[1:]).T for i in range(3)]


def _heads_join(xs: Sequence[np.ndarray], s: Settings) -> np.ndarray:
    rows = [x.T.reshape(s.heads, s.head_size, *x.T.shape[1:]) for x in xs]
    return np.stack(rows, 1).reshape(-1, *xs[0].T.shape[1:])


QKV_BY_HEAD = Layout(_heads_split, _heads_join)  # GPT-NeoX: each head's query, key and value together


# ------------------------------------------------------------------------------------------------------- settings


MAX_SIZE = 2**24  # more than any axis of a model has


def _size(config: Config, *names: str) -> int:
    """The first of some fields that is set. Raises UserError where it is not a size."""
    name = next((name for name in names if getattr(config, name, None) is not None), names[0])
    value = getattr(config, name, None)
    if value is None or not 1 <= value <= MAX_SIZE:
        raise UserError(f"{config.model_type}: {name}={value!r} is not a size")
    return value


class Heads(NamedTuple):
    queries: int
    keys: int
    size: int


def _heads(config: Config, key_heads: int | None = None) -> Heads:
    """How many heads there are, of which size. Raises UserError where they do not fit."""
    heads, width = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    key_heads = key_heads or heads
    if heads % key_heads:
        raise UserError(f"{config.model_type}: {heads} heads of queries cannot share {key_heads} heads of keys")
    if width < heads:
        raise UserError(f"{config.model_type}: hidden_size={width} is too small for {heads} heads")
    return Heads(heads, key_heads, width // heads)


def _activation(config: Config, name: str) -> str:
    activation = getattr(config, name)
    if activation not in ACTIVATIONS:
        raise UserError(f"{config.model_type}: {name}={activation!r} is not known; known: {', '.join(ACTIVATIONS)}")
    return activation


def _windows(config: Config, kinds: Sequence[str]) -> tuple[int, ...]:
    """Each layer's window, 0 for full attention. Raises UserError for an unknown kind of layer or an invalid window."""
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{config.model_type}: layer_types has {min(unknown)!r}, which is not supported")
    if "sliding_attention" not in kinds:
        return (0,) * len(kinds)
    window = config.sliding_window
    if window is None or window < 1:
        raise UserError(f"{config.model_type}: sliding_window={window!r} in layers that see a window")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _rotaries(
    config: Config, kinds: Sequence[str], head_size: int, by_kind: bool, partial_rotary: bool
) -> tuple[tuple[Rotary, ...], tuple[int, ...]]:
    """One table, or one for each kind of layer, and which of them each layer uses."""
    config.standardize_rope_params()  # again, as transformers does before it computes a table
    parameters = config.rope_parameters
    # transformers reads `truncate` beside the tables even where there is one for each kind.
    shape = Shape(head_size, config.max_position_embeddings, partial_rotary, bool(parameters.get("truncate", True)))
    if not by_kind:
        return (rotary(parameters, shape),), ()
    names = sorted(set(kinds))
    for name in (*names, *parameters):
        if not isinstance(parameters.get(name), Mapping):
            given = f"{name}={parameters.get(name)!r}"
            raise UserError(f"{config.model_type}: rope_parameters has {given}; each kind of layer has its own")
    return tuple(rotary(parameters[name], shape) for name in names), tuple(names.index(kind) for kind in kinds)


def _base(
    config: Config,
    *,
    kinds: Sequence[str] | None = None,
    activation: str = "hidden_act",
    norm_eps: str = "rms_norm_eps",
    grouped: bool = True,
    rope_by_kind: bool = False,
    partial_rotary: bool = False,
) -> Settings:
    """What the configs of llama's descendants have in common.

    Args:
      kinds: each layer's kind of attention; full attention where left out.
      activation, norm_eps: the fields that hold them.
      grouped: heads of queries may share those of keys, and have a size that the config sets.
      rope_by_kind: each kind of layer has its own rotary table.
      partial_rotary: a part of each head may be rotated.
    """
    layers = _size(config, "num_hidden_layers")
    kinds = kinds or ["full_attention"] * layers
    heads = _heads(config, _size(config, "num_key_value_heads", "num_attention_heads") if grouped else None)
    if grouped and getattr(config, "head_dim", None) is not None:
        heads = heads._replace(size=_size(config, "head_dim"))
    if (eps := getattr(config, norm_eps)) < 0:
        raise UserError(f"{config.model_type}: {norm_eps}={eps} is below zero")
    vocab, width = _size(config, "vocab_size"), _size(config, "hidden_size")
    mlp_width, known = _size(config, "intermediate_size"), _activation(config, activation)
    windows = _windows(config, kinds)
    rotaries, rotary_of = _rotaries(config, kinds, heads.size, rope_by_kind, partial_rotary)
    return Settings(
        vocab=vocab,
        width=width,
        layers=layers,
        heads=heads.queries,
        key_heads=heads.keys,
        head_size=heads.size,
        mlp_width=mlp_width,
        activation=known,
        rotaries=rotaries,
        rotary_of=rotary_of,
        windows=windows,
        norm_eps=float(eps),
        tied=config.tie_word_embeddings,
    )


def _with_biases(config: Config, settings: Settings) -> Settings:
    """Of attention, where the config has them."""
    return replace(settings, qkv_bias=config.attention_bias, out_bias=config.attention_bias)


def _llama(config: Config) -> Settings:
    return replace(_with_biases(config, _base(config)), mlp_bias=config.mlp_bias)


def _windowed(config: Config) -> Settings:
    """A window in every layer, or in none."""
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return _base(config, kinds=[kind] * config.num_hidden_layers, partial_rotary=config.model_type == "phi3")


def _smollm3(config: Config) -> Settings:
    s = _with_biases(config, _base(config, kinds=config.layer_types))
    turns = s.rotaries[0]
    still = replace(turns, frequencies=(0.0,) * len(turns.frequencies), scale=1.0, until=0, beyond=())
    if len(config.no_rope_layers) < s.layers:
        raise UserError(f"smollm3: no_rope_layers has {len(config.no_rope_layers)} entries for {s.layers} layers")
    return replace(
        s,
        mlp_bias=config.mlp_bias,
        rotaries=(still, turns),
        rotary_of=tuple(int(bool(turning)) for turning in config.no_rope_layers[: s.layers]),
    )


def _qwen2(config: Config) -> Settings:
    return replace(_base(config, kinds=config.layer_types), qkv_bias=True)


def _qwen3(config: Config) -> Settings:
    return replace(_with_biases(config, _base(config, kinds=config.layer_types)), head_norm="head")


def _cap(config: Config, name: str) -> float:
    cap = getattr(config, name)
    if cap == 0:
        raise UserError(f"{config.model_type}: {name}=0 leaves nothing; null means no cap")
    return cap or 0.0


def _gemma(config: Config, head_norm: str = "", rope_by_kind: bool = False) -> Settings:
    if config.query_pre_attn_scalar <= 0:
        raise UserError(f"{config.model_type}: query_pre_attn_scalar={config.query_pre_attn_scalar} is not above zero")
    base = _base(config, kinds=config.layer_types, activation="hidden_activation", rope_by_kind=rope_by_kind)
    return replace(
        _with_biases(config, base),
        norm_offset=1.0,
        post_norm=True,
        head_norm=head_norm,
        score_scale=config.query_pre_attn_scalar**-0.5,
        score_cap=_cap(config, "attn_logit_softcapping"),
        logit_cap=_cap(config, "final_logit_softcapping"),
        embed_scale=config.hidden_size**0.5,
    )


def _olmo2(config: Config) -> Settings:
    return replace(_with_biases(config, _base(config)), head_norm="all", pre_norm=False, post_norm=True)


def _gpt_neox(config: Config) -> Settings:
    base = _base(config, norm_eps="layer_norm_eps", grouped=False, partial_rotary=True)
    return replace(
        _with_biases(config, base),
        norm="layer",
        gated=False,
        parallel=config.use_parallel_residual,
        mlp_bias=True,
    )


def _gpt2(config: Config) -> Settings:
    if config.scale_attn_by_inverse_layer_idx:
        raise UserError("gpt2: scale_attn_by_inverse_layer_idx=True is not supported")
    heads = _heads(config)
    width = _size(config, "n_embd")
    return Settings(
        vocab=_size(config, "vocab_size"),
        width=width,
        layers=_size(config, "n_layer"),
        heads=heads.queries,
        key_heads=heads.keys,
        head_size=heads.size,
        mlp_width=4 * width if config.n_inner is None else _size(config, "n_inner"),
        activation=_activation(config, "activation_function"),
        positions=_size(config, "n_positions"),
        norm="layer",
        norm_eps=float(config.layer_norm_epsilon),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        score_scale=0.0 if config.scale_attn_weights else 1.0,
        tied=config.tie_word_embeddings,
    )


# ---------------------------------------------------------------------------------------------------------- names

IN_PLACE = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
OLMO_NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}


def _linear(tensor: str, path: str, bias: bool) -> list[Rule]:
    rules = [Rule(f"{tensor}.weight", (f"{path}/kernel",), TRANSPOSED)]
    return [*rules, Rule(f"{tensor}.bias", (f"{path}/bias",), AS_IS)] if bias else rules


def _norm(tensor: str, path: str, s: Settings) -> list[Rule]:
    rules = [Rule(f"{tensor}.weight", (f"{path}/weight",), AS_IS)]
    return [*rules, Rule(f"{tensor}.bias", (f"{path}/bias",), AS_IS)] if s.norm == "layer" else rules


def _ends(s: Settings, embed: str, norm: str, head: str) -> list[Rule]:
    rules = [Rule(f"{embed}.weight", ("embedding",), AS_IS), *_norm(norm, "norm", s)]
    return rules + (_linear(head, "unembedding", False) if not s.tied else [])


def _llama_rules(norms: Mapping[str, str]) -> Callable[[Settings], tuple[Rule, ...]]:
    def rules(s: Settings) -> tuple[Rule, ...]:
        layer, attention, mlp = "model.layers.{i}", "layers/attention", "layers/mlp"
        tensor_rules = _ends(s, "model.embed_tokens", "model.norm", "lm_head")
        for module, name in norms.items():
            tensor_rules += _norm(f"{layer}.{name}", f"layers/{module}", s)
        for module, name in {"query": "q_proj", "key": "k_proj", "value": "v_proj"}.items():
            tensor_rules += _linear(f"{layer}.self_attn.{name}", f"{attention}/{module}", s.qkv_bias)
        tensor_rules += _linear(f"{layer}.self_attn.o_proj", f"{attention}/out", s.out_bias)
        for module, name in {"query_norm": "q_norm", "key_norm": "k_norm"}.items() if s.head_norm else ():
            tensor_rules += _norm(f"{layer}.self_attn.{name}", f"{attention}/{module}", s)
        for name in ("gate", "up", "down"):
            tensor_rules += _linear(f"{layer}.mlp.{name}_proj", f"{mlp}/{name}", s.mlp_bias)
        return tuple(tensor_rules)

    return rules


QKV = tuple(f"layers/attention/{name}" for name in ("query", "key", "value"))
QKV_KERNELS, QKV_BIASES = (tuple(f"{path}/{what}" for path in QKV) for what in ("kernel", "bias"))


def _phi3_rules(s: Settings) -> tuple[Rule, ...]:
    layer = "model.layers.{i}"
    rules = _ends(s, "model.embed_tokens", "model.norm", "lm_head")
    for module, name in IN_PLACE.items():
        rules += _norm(f"{layer}.{name}", f"layers/{module}", s)
    rules.append(Rule(f"{layer}.self_attn.qkv_proj.weight", QKV_KERNELS, QKV_ROWS))
    rules += _linear(f"{layer}.self_attn.o_proj", "layers/attention/out", False)
    gate_up = ("layers/mlp/gate/kernel", "layers/mlp/up/kernel")
    rules.append(Rule(f"{layer}.mlp.gate_up_proj.weight", gate_up, GATE_UP))
    return (*rules, *_linear(f"{layer}.mlp.down_proj", "layers/mlp/down", False))


def _gpt_neox_rules(s: Settings) -> tuple[Rule, ...]:
    layer = "gpt_neox.layers.{i}"
    rules = _ends(s, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
    for module, name in IN_PLACE.items():
        rules += _norm(f"{layer}.{name}", f"layers/{module}", s)
    rules.append(Rule(f"{layer}.attention.query_key_value.weight", QKV_KERNELS, QKV_BY_HEAD))
    if s.qkv_bias:
        rules.append(Rule(f"{layer}.attention.query_key_value.bias", QKV_BIASES, QKV_BY_HEAD))
    rules += _linear(f"{layer}.attention.dense", "layers/attention/out", s.out_bias)
    rules += _linear(f"{layer}.mlp.dense_h_to_4h", "layers/mlp/up", True)
    return (*rules, *_linear(f"{layer}.mlp.dense_4h_to_h", "layers/mlp/down", True))


def _gpt2_rules(s: Settings) -> tuple[Rule, ...]:
    def conv(tensor: str, path: str) -> list[Rule]:  # Conv1D is (inputs, outputs)
        return [Rule(f"{tensor}.{name}", (f"{path}/{kind}",), AS_IS) for name, kind in WEIGHT_KINDS]

    layer = "transformer.h.{i}"
    rules = _ends(s, "transformer.wte", "transformer.ln_f", "lm_head")
    rules.append(Rule("transformer.wpe.weight", ("position_embedding",), AS_IS))
    rules += _norm(f"{layer}.ln_1", "layers/attention_norm", s) + _norm(f"{layer}.ln_2", "layers/mlp_norm", s)
    rules.append(Rule(f"{layer}.attn.c_attn.weight", QKV_KERNELS, QKV_LAST))
    rules.append(Rule(f"{layer}.attn.c_attn.bias", QKV_BIASES, QKV_LAST))
    rules += conv(f"{layer}.attn.c_proj", "layers/attention/out")
    return (*rules, *conv(f"{layer}.mlp.c_fc", "layers/mlp/up"), *conv(f"{layer}.mlp.c_proj", "layers/mlp/down"))


WEIGHT_KINDS = (("weight", "kernel"), ("bias", "bias"))

# The fields of config.json that each family's settings depend on, in transformers' config or the functions above.
ROPE = {
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "max_position_embeddings",
    "original_max_position_embeddings",
}
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
PLAIN = ROPE | SIZES | {"tie_word_embeddings"}
COMMON = PLAIN | {"num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"}
LAYER_KINDS = {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
GEMMA = (COMMON - {"hidden_act"}) | {
    "hidden_activation",
    "attention_bias",
    "query_pre_attn_scalar",
    "layer_types",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, _llama_rules(IN_PLACE), COMMON | {"attention_bias", "mlp_bias"}),  # Llama 2, 3, SmolLM2
    "mistral": Family(_windowed, _llama_rules(IN_PLACE), COMMON | {"sliding_window"}),
    "smollm3": Family(
        _smollm3,
        _llama_rules(IN_PLACE),
        COMMON | LAYER_KINDS | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
    ),
    "qwen2": Family(_qwen2, _llama_rules(IN_PLACE), COMMON | LAYER_KINDS),
    "qwen3": Family(_qwen3, _llama_rules(IN_PLACE), COMMON | LAYER_KINDS | {"attention_bias"}),
    "gemma2": Family(_gemma, _llama_rules(GEMMA_NORMS), GEMMA),
    "gemma3_text": Family(
        partial(_gemma, head_norm="head", rope_by_kind=True),
        _llama_rules(GEMMA_NORMS),
        # transformers' Gemma 3 does not cap scores, whatever its config says.
        (GEMMA - {"attn_logit_softcapping"}) | {"rope_local_base_freq", "sliding_window_pattern"},
    ),
    "olmo2": Family(_olmo2, _llama_rules(OLMO_NORMS), COMMON | {"attention_bias"}),
    "phi3": Family(_windowed, _phi3_rules, COMMON | {"sliding_window"}),
    "gpt_neox": Family(  # Pythia
        _gpt_neox,
        _gpt_neox_rules,
        PLAIN
        | {"hidden_act", "layer_norm_eps", "attention_bias", "use_parallel_residual", "rotary_pct", "rotary_emb_base"},
    ),
    "gpt2": Family(
        _gpt2,
        _gpt2_rules,
        {
            "vocab_size",
            "n_embd",
            "n_layer",
            "n_head",
            "n_inner",
            "n_positions",
            "activation_function",
            "layer_norm_epsilon",
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "tie_word_embeddings",
        },
    ),
}


def family(config: Config) -> Family:
    """The family of a transformers config. Raises UserError for one that is not supported."""
    if config.model_type not in FAMILIES:
        raise UserError(f"model_type {config.model_type!r} is not a known family; known: {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]
