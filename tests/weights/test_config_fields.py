"""Equal to transformers, or refused: every field of every config that we read, set to another value."""

import contextlib
import json
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from config_kit import LAYERS, TOKENS, config_of, difference, edited, expected_logits, logits, random_model

from sublim_jax import weights
from sublim_jax.errors import UserError
from sublim_jax.models.activations import ACTIVATIONS
from sublim_jax.models.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

THETA = {"rope_theta": 5e3}
SHORT_AND_LONG = {"short_factor": [1.5] * 8, "long_factor": [3.0 + i for i in range(8)]}
OVER_128 = {"rope_type": "longrope", "original_max_position_embeddings": 128, **SHORT_AND_LONG, **THETA}
OVER_32 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **THETA}
ROPES = {
    "another base": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0, **THETA},
    "legacy linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **THETA},
    "yarn": OVER_32,
    "yarn, mscale": {**OVER_32, "mscale": 2.0, "mscale_all_dim": 0.5},
    "yarn, mscale alone": {**OVER_32, "mscale": 2.0},
    "yarn, attention factor": {**OVER_32, "attention_factor": 1.7},
    "yarn, attention factor 0": {**OVER_32, "attention_factor": 0.0},
    "yarn, betas, no truncation": {**OVER_32, "truncate": False, "beta_fast": 8, "beta_slow": 2},
    "yarn, betas the other way": {**OVER_32, "beta_fast": 1, "beta_slow": 8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        **THETA,
    },
    "longrope": OVER_128,
    "longrope, factor": {**OVER_128, "factor": 8.0},
    "longrope, attention factor": {**OVER_128, "attention_factor": 1.3},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0, **THETA},
    "a part of each head": {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA},
    "linear, a part of each head": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5, **THETA},
    "no part of any head": {"rope_type": "default", "partial_rotary_factor": 0.0, **THETA},
    "a factor that default does not read": {"rope_type": "default", "factor": 8.0, **THETA},
    "by sections": {"rope_type": "default", "mrope_section": [2, 3, 3], **THETA},
    "of no kind": {"rope_type": "ntk", "factor": 4.0, **THETA},
    "without a factor": {"rope_type": "linear", **THETA},
    "a factor of 0": {"rope_type": "linear", "factor": 0.0, **THETA},
    "a base of 0": {"rope_type": "default", "rope_theta": 0.0},
}
# Values of fields that transformers reads in some family, mask, cache or rotary table. Other fields of a config class
# get another value of the same type.
KINDS_OF_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
VALUES = {
    "activation_function": ["relu", "gelu_10", "prelu", "none"],
    "add_cross_attention": [True],
    "architectures": [["LlamaForSequenceClassification"], ["Qwen2Model"]],
    "attention_bias": [True],
    "attention_chunk_size": [8],
    "attn_logit_softcapping": [2.0, 0.0],
    "auto_map": [{"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}],
    "bos_token_id": [5],
    "clip_qkv": [0.1],
    "dtype": ["bfloat16"],
    "eos_token_id": [[1, 2], "two"],
    "final_logit_softcapping": [3.0, 0.0],
    "head_dim": [24, 8],
    "hidden_act": ["relu", "quick_gelu", "xielu"],
    "hidden_activation": ["relu", "silu"],
    "hidden_size": [32],
    "id2label": [{"0": "no", "1": "yes", "2": "maybe"}],
    "intermediate_size": [50],
    "is_causal": [False, None, True],
    "is_encoder_decoder": [True],
    "label2id": [{"no": 0}],
    "layer_norm_eps": [0.0, 0.1],
    "layer_norm_epsilon": [0.0, 0.1],
    "layer_types": [KINDS_OF_LAYERS, ["full_attention"] * LAYERS, ["chunked_attention"] * LAYERS, ["full_attention"]],
    "max_position_embeddings": [200, 1024],
    "max_window_layers": [1],
    "mlp_bias": [True],
    "n_embd": [32],
    "n_head": [2],
    "n_inner": [80],
    "n_layer": [2],
    "n_positions": [350],
    "no_rope_layer_interval": [2],
    "no_rope_layers": [[1, 0, 1], [0, 0, 0], [1, 0]],
    "num_attention_heads": [2, 3],
    "num_experts": [4],
    "num_hidden_layers": [2, 4],
    "num_key_value_heads": [1, 3, None],
    "original_max_position_embeddings": [64],
    "pad_token_id": [None, 5],
    "partial_rotary_factor": [0.5, 0, 1.0],
    "per_layer_config": [{"1": {"sliding_window": 4}}],
    "problem_type": ["regression"],
    "pruned_heads": [{"0": [1]}],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    "query_pre_attn_scalar": [30, 0],
    "return_dict": [True],  # False gives the same logits in another form
    "rms_norm_eps": [0.0, 0.1],
    "rope_local_base_freq": [500.0],
    "rope_parameters": [[], {"full_attention": ROPES["another base"]}, {"rope_theta": "ten"}],
    "rope_scaling": [ROPES["legacy linear"], {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}],
    "rope_theta": [500.0],
    "rotary_emb_base": [500],
    "rotary_pct": [0.5, 0.0, 1.0],
    "sliding_window": [16, None, 0, -1],
    "sliding_window_pattern": [2],
    "summary_activation": ["tanh"],
    "transformers_version": ["4.0.0"],
    "use_bidirectional_attention": [True],
    "use_sliding_window": [True],
    "vocab_size": [110, 0],
    "something_new": [1, "on", True],
}
TOGETHER = {
    "windows above": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "windows by layer": {"use_sliding_window": True, "sliding_window": 16, "layer_types": KINDS_OF_LAYERS},
    "the original length outside, yarn": {"original_max_position_embeddings": 64, "rope_parameters": OVER_32},
    "the original length outside, longrope": {"original_max_position_embeddings": 64, "rope_parameters": OVER_128},
    "both activations": {"hidden_act": "gelu", "hidden_activation": "relu"},
}


def other_values(name, default):
    if name in VALUES:
        return VALUES[name]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int | float):
        return [default * 2 or 1]
    return ["other"] if isinstance(default, str) else []


def settings_of(kind):
    """{name: changes} for a model type: every field, every rotary table."""
    known = transformers.AutoConfig.for_model(kind).to_dict()
    settings: dict[str, dict[str, Any]] = {}
    for name in sorted({*known, *VALUES} - {"model_type", "attribute_map"}):
        settings |= {f"{name}={value}": {name: value} for value in other_values(name, known.get(name))}
    local = {"sliding_attention": {"rope_type": "default", "rope_theta": 700.0}}
    for name, rope in ROPES.items():
        settings[f"rope: {name}"] = {
            "rope_parameters": {"full_attention": rope, **local} if kind == "gemma3_text" else rope
        }
    return settings | TOGETHER


def written(kind, changes, plain, folder):
    """A checkpoint with changed fields: of a model with that config if transformers can make it, else edited."""
    with contextlib.suppress(Exception):
        random_model(config_of(kind, changes)).save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())
        if all(saved.get(name) == value for name, value in changes.items() if value is None or name in saved):
            return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(plain, folder)
    return edited(folder, **changes)


def verdict(folder, lengths=(40, 300)):
    """The problem, or "" if every length equals transformers or is refused."""
    for length in lengths:
        try:
            actual = logits(folder, TOKENS[:, :length])
        except UserError as error:
            assert "\n" not in str(error)
            return ""
        try:
            expected = expected_logits(folder, TOKENS[:, :length])
        except Exception as error:
            return f"{length} tokens: computed, and transformers does not ({error!r})"
        if not difference(actual, expected) <= 1e-4:
            return f"{length} tokens: {difference(actual, expected):.1e}"
    return ""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An unchanged checkpoint of each kind."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            random_model(config_of(kind, {})).save_pretrained(made[kind])
        return made[kind]

    return make


QUICK = {
    "llama": [
        "is_causal=False",
        "sliding_window=16",
        "sliding_window=0",
        "layer_types=" + str(["full_attention"] * LAYERS),
        "rope: yarn, mscale",
        "rope: dynamic",
        "something_new=on",
    ],
    "mistral": ["sliding_window=16", f"layer_types={KINDS_OF_LAYERS}", "rms_norm_eps=0.0"],
    "smollm3": ["no_rope_layers=[1, 0, 1]", "windows by layer"],
    "qwen2": ["is_causal=False", "windows above", "the original length outside, yarn"],
    "qwen3": ["head_dim=24", "rope: longrope, factor"],
    "gemma2": ["attn_logit_softcapping=0.0", "both activations", "use_bidirectional_attention=True"],
    "gemma3_text": [
        "rope: yarn, betas, no truncation",
        "attn_logit_softcapping=2.0",
        "query_pre_attn_scalar=30",
        "rope_theta=500.0",
    ],
    "olmo2": ["partial_rotary_factor=0.5", "rope: llama3", "clip_qkv=0.1"],
    "phi3": ["partial_rotary_factor=0.5", "rope: longrope, factor", "sliding_window=0"],
    "gpt_neox": ["rotary_pct=0.0", "layer_norm_eps=0.0", "is_causal=False"],
    "gpt2": ["activation_function=relu", "scale_attn_weights=False", "scale_attn_by_inverse_layer_idx=True"],
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_changed_field_is_computed_as_transformers_does_or_refused(kind, plain, tmp_path):
    every, wrong = settings_of(kind), {}
    for name in QUICK[kind]:
        folder = written(kind, every[name], plain(kind), tmp_path / "model")
        if problem := verdict(folder, (300,)):
            wrong[name] = problem
        shutil.rmtree(folder)
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_changed_field_is_computed_as_transformers_does_or_refused(kind, plain, tmp_path):
    wrong = {}
    for name, changes in settings_of(kind).items():
        folder = tmp_path / "model"
        if problem := verdict(written(kind, changes, plain(kind), folder)):
            wrong[name] = problem
        shutil.rmtree(folder)
    assert not wrong


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rope_scaling": -1}, "rope_"),
        ({"rope_parameters": {"rope_type": ["x"], "rope_theta": 1e4}}, "rope_"),
        ({"num_hidden_layers": 10**20}, "num_hidden_layers=100000000000000000000"),
    ],
)
def test_a_field_of_another_kind_is_one_line(changes, words, plain, tmp_path):
    folder = written("llama", {}, plain("llama"), tmp_path / "model")
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | changes))
    with pytest.raises(UserError, match=words) as error:
        weights.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", transformers.activations.ACT2CLS)
def test_an_activation_is_that_of_transformers_or_not_known(name):
    if name in ("prelu", "xielu"):  # adds parameters
        assert name not in ACTIVATIONS
        return
    x = np.linspace(-12, 12, 1001).astype(np.float32)
    expected = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)
