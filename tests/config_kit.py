"""Checkpoints of any config class, saved by transformers, and the logits of both implementations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sublim_jax.models.decoder import decoder
from sublim_jax.weights import huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, LAYERS = 97, 3
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_KIND = {
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
}
TOKENS = np.random.default_rng(0).integers(3, 90, (1, 300))


def config_of(kind, changes):
    # Copied, because config classes modify their arguments.
    return transformers.AutoConfig.for_model(
        kind, **json.loads(json.dumps({**BASE, **OF_KIND.get(kind, {}), **changes}))
    )


def random_model(config):
    """A transformers model with random parameters, so that no norm or bias is trivial."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def logits(folder, tokens):
    settings, params = huggingface.load(folder, dtype=jnp.float32)
    return np.asarray(jax.jit(decoder(settings).apply)(params, jnp.asarray(tokens)))


def expected_logits(folder, tokens):
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits.numpy()


def difference(a, b):
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
