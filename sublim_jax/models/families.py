"""Families of open language models: each one small declaration, a transformers config to `Settings`, and names.

To add a family: say how its config sets the decoder (`FAMILIES`), and which of its tensors are which of our parameters
(a tuple of `Rule`). The decoder itself knows no family. `docs/decoder.md` walks through an example.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sublim_jax.errors import UserError
from sublim_jax.models.decoder import Rotary, Settings

Config = Any  # a transformers PretrainedConfig


class Layout(NamedTuple):
    """How one tensor of a checkpoint holds some of our parameters, both ways."""

    split: Callable[[np.ndarray, Settings], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray], Settings], np.ndarray]


class Rule(NamedTuple):
    """A tensor's name, `{i}` for the layer, and our parameters in it, by path."""

    tensor: str
    ours: tuple[str, ...]
    layout: Layout


class Family(NamedTuple):
    settings: Callable[[Config], Settings]
    rules: Callable[[Settings], tuple[Rule, ...]]


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


# --------------------------------------------------------------------------------------------------------- rotary


def rotary(config: Config, parameters: Mapping[str, Any], head_size: int) -> Rotary:
    """The table of `rope_parameters`, in transformers' terms.

    Raises UserError for a kind that is not known here.
    """
    kind = parameters.get("rope_type", "default")
    size = int(head_size * parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1))
    theta = parameters["rope_theta"]
    base = theta ** -(np.arange(0, size, 2) / size)
    if kind in ("default", "dynamic"):  # dynamic differs beyond the trained length only
        return Rotary(tuple(base))
    if kind == "linear":
        return Rotary(tuple(base / parameters["factor"]))
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "llama3":
        turns = original * base / (2 * math.pi)  # over the original length
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return Rotary(tuple(base * (keep + (1 - keep) / parameters["factor"])))
    if kind == "yarn":
        return _yarn(parameters, base, theta, size, original, config.max_position_embeddings)
    if kind == "longrope":
        factor = config.max_position_embeddings / original
        scale = parameters.get("attention_factor") or math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
        short, long = (tuple(base / np.asarray(parameters[f"{name}_factor"])) for name in ("short", "long"))
        return Rotary(short, scale, original, long)
    raise UserError(f"rope_type {kind!r} is not known; known: default, dynamic, linear, llama3, yarn, longrope")


def _yarn(
    parameters: Mapping[str, Any], base: np.ndarray, theta: float, size: int, original: int, longest: int
) -> Rotary:
    factor = parameters.get("factor") or longest / original

    def entry(turns: float) -> float:
        """Which frequency turns so often over the original length."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = entry(parameters.get("beta_fast") or 32.0), entry(parameters.get("beta_slow") or 1.0)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    scale = parameters.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return Rotary(tuple(base / factor * ramp + base * (1 - ramp)), scale)


# ------------------------------------------------------------------------------------------------------- settings

ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _base(config: Config, **more: Any) -> dict[str, Any]:
    """What the configs of llama's descendants have in common."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATION_NAMES:
        raise UserError(f"activation {activation!r} is not known; known: {', '.join(ACTIVATION_NAMES)}")
    settings = {
        "vocab": config.vocab_size,
        "width": config.hidden_size,
        "layers": layers,
        "heads": config.num_attention_heads,
        "key_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_size": head_size,
        "mlp_width": config.intermediate_size,
        "activation": ACTIVATION_NAMES[activation],
        "norm_eps": getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_eps", None) or 1e-5,
        "windows": tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
        "tied": config.tie_word_embeddings,
    }
    parameters = config.rope_parameters
    if "rope_theta" in parameters:
        settings["rotaries"] = (rotary(config, parameters, head_size),)
    else:  # one table for each kind of layer
        names = sorted(parameters)
        settings["rotaries"] = tuple(rotary(config, parameters[name], head_size) for name in names)
        settings["rotary_of"] = tuple(names.index(kind) for kind in kinds)
    return {**settings, **more}


def _llama(config: Config) -> Settings:
    bias = getattr(config, "attention_bias", False)
    return Settings(**_base(config, qkv_bias=bias, out_bias=bias, mlp_bias=getattr(config, "mlp_bias", False)))


def _smollm3(config: Config) -> Settings:
    s = _base(config, qkv_bias=config.attention_bias, out_bias=config.attention_bias, mlp_bias=config.mlp_bias)
    turns = s["rotaries"][0]
    still = Rotary((0.0,) * len(turns.frequencies))
    return Settings(**{**s, "rotaries": (still, turns), "rotary_of": tuple(config.no_rope_layers)})


def _qwen2(config: Config) -> Settings:
    return Settings(**_base(config, qkv_bias=True))


def _qwen3(config: Config) -> Settings:
    return Settings(**_base(config, qkv_bias=config.attention_bias, out_bias=config.attention_bias, head_norm="head"))


def _gemma(config: Config, head_norm: str = "") -> Settings:
    return Settings(
        **_base(
            config,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            norm_offset=1.0,
            post_norm=True,
            head_norm=head_norm,
            score_scale=config.query_pre_attn_scalar**-0.5,
            score_cap=config.attn_logit_softcapping or 0.0,
            logit_cap=config.final_logit_softcapping or 0.0,
            embed_scale=config.hidden_size**0.5,
        )
    )


def _olmo2(config: Config) -> Settings:
    bias = config.attention_bias
    return Settings(**_base(config, qkv_bias=bias, out_bias=bias, head_norm="all", pre_norm=False, post_norm=True))


def _phi3(config: Config) -> Settings:
    return Settings(**_base(config))


def _gpt_neox(config: Config) -> Settings:
    return Settings(
        **_base(
            config,
            key_heads=config.num_attention_heads,
            norm="layer",
            gated=False,
            parallel=config.use_parallel_residual,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            mlp_bias=True,
        )
    )


def _gpt2(config: Config) -> Settings:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise UserError("GPT-2 with unusual scaling of its scores is not known here")
    return Settings(
        vocab=config.vocab_size,
        width=config.n_embd,
        layers=config.n_layer,
        heads=config.n_head,
        key_heads=config.n_head,
        head_size=config.n_embd // config.n_head,
        mlp_width=config.n_inner or 4 * config.n_embd,
        activation=ACTIVATION_NAMES[config.activation_function],
        positions=config.n_positions,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
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


def _linear(tensor: str, ours: str, bias: bool) -> list[Rule]:
    rules = [Rule(f"{tensor}.weight", (f"{ours}/kernel",), TRANSPOSED)]
    return rules + [Rule(f"{tensor}.bias", (f"{ours}/bias",), AS_IS)] * bias


def _norm(tensor: str, ours: str, s: Settings) -> list[Rule]:
    rules = [Rule(f"{tensor}.weight", (f"{ours}/weight",), AS_IS)]
    return rules + [Rule(f"{tensor}.bias", (f"{ours}/bias",), AS_IS)] * (s.norm == "layer")


def _ends(s: Settings, embed: str, norm: str, head: str) -> list[Rule]:
    rules = [Rule(f"{embed}.weight", ("embedding",), AS_IS), *_norm(norm, "norm", s)]
    return rules + (_linear(head, "unembedding", False) if not s.tied else [])


def _llama_rules(norms: Mapping[str, str]) -> Callable[[Settings], tuple[Rule, ...]]:
    def rules(s: Settings) -> tuple[Rule, ...]:
        layer, attention, mlp = "model.layers.{i}", "layers/attention", "layers/mlp"
        found = _ends(s, "model.embed_tokens", "model.norm", "lm_head")
        for ours, name in norms.items():
            found += _norm(f"{layer}.{name}", f"layers/{ours}", s)
        for ours, name in {"query": "q_proj", "key": "k_proj", "value": "v_proj"}.items():
            found += _linear(f"{layer}.self_attn.{name}", f"{attention}/{ours}", s.qkv_bias)
        found += _linear(f"{layer}.self_attn.o_proj", f"{attention}/out", s.out_bias)
        for ours, name in {"query_norm": "q_norm", "key_norm": "k_norm"}.items() if s.head_norm else ():
            found += _norm(f"{layer}.self_attn.{name}", f"{attention}/{ours}", s)
        for name in ("gate", "up", "down"):
            found += _linear(f"{layer}.mlp.{name}_proj", f"{mlp}/{name}", s.mlp_bias)
        return tuple(found)

    return rules


QKV = tuple(f"layers/attention/{name}" for name in ("query", "key", "value"))
QKV_KERNELS, QKV_BIASES = (tuple(f"{path}/{what}" for path in QKV) for what in ("kernel", "bias"))


def _phi3_rules(s: Settings) -> tuple[Rule, ...]:
    layer = "model.layers.{i}"
    found = _ends(s, "model.embed_tokens", "model.norm", "lm_head")
    for ours, name in IN_PLACE.items():
        found += _norm(f"{layer}.{name}", f"layers/{ours}", s)
    found.append(Rule(f"{layer}.self_attn.qkv_proj.weight", QKV_KERNELS, QKV_ROWS))
    found += _linear(f"{layer}.self_attn.o_proj", "layers/attention/out", False)
    gate_up = ("layers/mlp/gate/kernel", "layers/mlp/up/kernel")
    found.append(Rule(f"{layer}.mlp.gate_up_proj.weight", gate_up, GATE_UP))
    return (*found, *_linear(f"{layer}.mlp.down_proj", "layers/mlp/down", False))


def _gpt_neox_rules(s: Settings) -> tuple[Rule, ...]:
    layer = "gpt_neox.layers.{i}"
    found = _ends(s, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
    for ours, name in IN_PLACE.items():
        found += _norm(f"{layer}.{name}", f"layers/{ours}", s)
    found.append(Rule(f"{layer}.attention.query_key_value.weight", QKV_KERNELS, QKV_BY_HEAD))
    if s.qkv_bias:
        found.append(Rule(f"{layer}.attention.query_key_value.bias", QKV_BIASES, QKV_BY_HEAD))
    found += _linear(f"{layer}.attention.dense", "layers/attention/out", s.out_bias)
    found += _linear(f"{layer}.mlp.dense_h_to_4h", "layers/mlp/up", True)
    return (*found, *_linear(f"{layer}.mlp.dense_4h_to_h", "layers/mlp/down", True))


def _gpt2_rules(s: Settings) -> tuple[Rule, ...]:
    def conv(tensor: str, ours: str) -> list[Rule]:  # Conv1D is (inputs, outputs)
        return [Rule(f"{tensor}.{name}", (f"{ours}/{kind}",), AS_IS) for name, kind in WEIGHT_KINDS]

    layer = "transformer.h.{i}"
    found = _ends(s, "transformer.wte", "transformer.ln_f", "lm_head")
    found.append(Rule("transformer.wpe.weight", ("position_embedding",), AS_IS))
    found += _norm(f"{layer}.ln_1", "layers/attention_norm", s) + _norm(f"{layer}.ln_2", "layers/mlp_norm", s)
    found.append(Rule(f"{layer}.attn.c_attn.weight", QKV_KERNELS, QKV_LAST))
    found.append(Rule(f"{layer}.attn.c_attn.bias", QKV_BIASES, QKV_LAST))
    found += conv(f"{layer}.attn.c_proj", "layers/attention/out")
    return (*found, *conv(f"{layer}.mlp.c_fc", "layers/mlp/up"), *conv(f"{layer}.mlp.c_proj", "layers/mlp/down"))


WEIGHT_KINDS = (("weight", "kernel"), ("bias", "bias"))

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, _llama_rules(IN_PLACE)),  # Llama 2 and 3, SmolLM2
    "mistral": Family(_llama, _llama_rules(IN_PLACE)),
    "smollm3": Family(_smollm3, _llama_rules(IN_PLACE)),
    "qwen2": Family(_qwen2, _llama_rules(IN_PLACE)),
    "qwen3": Family(_qwen3, _llama_rules(IN_PLACE)),
    "gemma2": Family(_gemma, _llama_rules(GEMMA_NORMS)),
    "gemma3_text": Family(lambda config: _gemma(config, "head"), _llama_rules(GEMMA_NORMS)),
    "olmo2": Family(_olmo2, _llama_rules(OLMO_NORMS)),
    "phi3": Family(_phi3, _phi3_rules),
    "gpt_neox": Family(_gpt_neox, _gpt_neox_rules),  # Pythia
    "gpt2": Family(_gpt2, _gpt2_rules),
}


def family(config: Config) -> Family:
    """The family of a transformers config. Raises UserError for one that is not known here."""
    if config.model_type not in FAMILIES:
        raise UserError(f"model_type {config.model_type!r} is no known family; known: {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]
