"""Every model family against transformers: logits, padding, gradients, round trips."""

import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_kit import random_model
from pages_kit import write_section

from sublim_jax.models.decoder import decoder
from sublim_jax.models.families import FAMILIES, family
from sublim_jax.weights import huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, LENGTH = 97, 520
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 30_000.0, "factor": 4.0, "original_max_position_embeddings": 256}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.1 * i for i in range(8)],
    "original_max_position_embeddings": 600,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "head_dim": 16}),
    "llama 3 (scaled RoPE)": ("llama", {"rope_parameters": LLAMA3, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "llama (linear RoPE, biases)": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0},
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "mistral (window)": ("mistral", {"sliding_window": 37, "head_dim": 16}),
    "smollm3 (layers without RoPE)": (
        "smollm3",
        {"no_rope_layers": [1, 1, 0, 1], "rope_parameters": {"rope_type": "default", "rope_theta": 2e6}},
    ),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True}),
    "qwen2 (windows above)": ("qwen2", {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 2}),
    "qwen3 (yarn)": ("qwen3", {"head_dim": 20, "rope_parameters": YARN}),
    "gemma2 (caps, alternating windows)": (
        "gemma2",
        {
            "head_dim": 20,
            "sliding_window": 41,
            "query_pre_attn_scalar": 30,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3 (5:1, two RoPEs)": (
        "gemma3_text",
        {
            "head_dim": 20,
            "sliding_window": 41,
            "query_pre_attn_scalar": 30,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "olmo2": ("olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "phi3": ("phi3", {"sliding_window": 60}),
    "phi3 (longrope)": ("phi3", {"rope_parameters": LONG}),
    "phi3 (longrope, beyond)": ("phi3", {"rope_parameters": {**LONG, "original_max_position_embeddings": 500}}),
    "gpt-neox (partial rotary, parallel)": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.25}},
    ),
    "gpt-neox (sequential)": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 48,
            "n_head": 3,
            "n_layer": 4,
            "n_positions": 1024,
            "n_inner": 100,
        },
    ),
}


def peer(name):
    """A small transformers model with random parameters, so that no norm or bias is trivial."""
    kind, changes = CASES[name]
    base = {k: v for k, v in BASE.items() if kind != "gpt2" or k in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = transformers.AutoConfig.for_model(kind, **{**base, **changes, "attn_implementation": "eager"})
    model = random_model(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "embed" in path:
                parameter.mul_(0.5)
    return model, config


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            model, config = peer(name)
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            made[name] = (model, config, folder, *huggingface.load(folder))
        return made[name]

    return make


def tokens(rows, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(3, VOCAB, (rows, LENGTH)), jnp.int32)


@pytest.fixture(scope="session")
def seen(request):
    """Largest differences by (family, column); `--parity=FILE` writes them as a table."""
    differences: dict[tuple[str, str], Any] = {}
    yield differences
    if file := request.config.getoption("parity"):
        columns = ["logits", "padded left", "padded right", "gradients", "round trip"]
        lines = [
            f"`make parity`, {datetime.date.today()}: jax {jax.__version__}, transformers {transformers.__version__}, "
            f"torch {torch.__version__}, float32. Small models with every parameter random, {LENGTH} tokens; largest "
            "absolute difference over the largest absolute value. The tests allow 1e-4 for logits, 1e-3 for gradients.",
            "",
            f"| family and setting | {' | '.join(columns)} |",
            "|---" * (1 + len(columns)) + "|",
        ]
        for name in CASES:
            cells = [differences.get((name, column), "not run") for column in columns]
            lines.append(f"| {name} | {' | '.join(c if isinstance(c, str) else f'{c:.0e}' for c in cells)} |")
        write_section(Path(file), "# Parity with transformers, by family", lines)


def difference(actual, expected):
    return float(np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected)))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, pair, seen):
    model, _, _, settings, params = pair(name)
    text = tokens(2)
    with torch.no_grad():
        expected = model(torch.tensor(np.asarray(text)).long()).logits.numpy()
    seen[name, "logits"] = difference(jax.jit(decoder(settings).apply)(params, text), expected)
    assert seen[name, "logits"] <= 1e-4


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side, pair, seen):
    model, _, _, settings, params = pair(name)
    text, keep = tokens(2), np.ones((2, LENGTH), np.int32)
    keep[1, slice(0, 150) if side == "left" else slice(LENGTH - 150, None)] = 0
    positions = np.maximum(np.cumsum(keep, 1) - 1, 0)
    arguments = {"attention_mask": torch.tensor(keep), "position_ids": torch.tensor(positions)}
    with torch.no_grad():
        expected = model(torch.tensor(np.asarray(text)).long(), **arguments).logits.numpy()
    where = {"positions": jnp.asarray(positions), "segments": jnp.asarray(keep)}
    logits = jax.jit(decoder(settings).apply)(params, text, **where)
    seen[name, f"padded {side}"] = difference(np.asarray(logits)[keep == 1], expected[keep == 1])
    assert seen[name, f"padded {side}"] <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_transformers(name, pair, seen):
    model, config, _, settings, params = pair(name)
    text = tokens(2)[:, :64]
    target = torch.tensor(np.asarray(text[:, 1:])).long()
    model.zero_grad()
    logits = model(torch.tensor(np.asarray(text)).long()).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    hf_gradients = {path: p.grad.numpy() for path, p in model.named_parameters()}

    def loss(params):
        log_p = jax.nn.log_softmax(decoder(settings).apply(params, text)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, text[:, 1:, None], -1))

    gradient = jax.jit(jax.grad(loss))(params)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
    }
    gradients = dict(huggingface._tensors(settings, family(config).rules(settings), flat))
    differences = {
        # embed_out.weight: GPT-NeoX's name for lm_head.
        path: difference(gradients[path if path in gradients else "embed_out.weight"], expected)
        for path, expected in hf_gradients.items()
    }
    seen[name, "gradients"] = max(differences.values())
    assert seen[name, "gradients"] <= 1e-3, max(differences, key=lambda path: differences[path])


@pytest.mark.parametrize("name", CASES)
def test_a_round_trip_is_bit_identical_and_transformers_loads_it(name, pair, tmp_path, seen):
    model, config, _, settings, params = pair(name)
    huggingface.save(tmp_path, params, settings, config)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    before, after = model.state_dict(), again.state_dict()
    assert set(before) == set(after)
    for path in before:
        assert torch.equal(before[path], after[path]), path
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(tmp_path)[1], params)
    seen[name, "round trip"] = "same bits"


def test_every_family_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)
