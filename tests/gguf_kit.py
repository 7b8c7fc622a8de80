"""Small GGUF files of transformers models, and llama.cpp as the reference that reads them."""

import http.client
import json

import gguf
import numpy as np
import pytest
from config_kit import random_model
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sublim_jax import assets
from sublim_jax.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = [*bytes_to_unicode().values(), "ab", "<|end|>"]
SIZE = len(VOCABULARY)
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": VOCABULARY,
    "tokenizer.ggml.token_type": [1] * (SIZE - 1) + [3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": SIZE - 1,
}
SHAPE = {
    "vocab_size": SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": SIZE - 1,
}


def peer(kind, without=(), **changes):
    """A small transformers model with random parameters; those whose names end in one of `without` are zero."""
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **changes, "attn_implementation": "eager"})
    model = random_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(tuple(without)):
                parameter.zero_()
    return model


def fields_of(model, architecture):
    """The fields that llama.cpp's converter writes for a model."""
    config = model.config
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
    }
    return {f"{architecture}.{name}": value for name, value in values.items()} | TOKENIZER


def tensors_of(model, architecture):
    """A model's tensors under llama.cpp's names; zero biases are left out."""
    config = model.config
    known_as = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known_as[architecture], config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if (stem == "lm_head" and config.tie_word_embeddings) or (kind == "bias" and not tensor.any()):
            continue
        gguf_name, values = f"{names.get_name(stem)}.{kind}", tensor.numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):  # interleaved rotation halves
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if architecture == "gemma3" and gguf_name.endswith("norm.weight"):
            values = values + 1
        tensors[gguf_name] = np.ascontiguousarray(values, np.float32)
    return tensors


def write(path, architecture, fields, tensors, kinds=None):
    """Writes a GGUF file; fields that are None are left out, and `kinds` are the types of quantised tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            number = "UINT32" if isinstance(value, str) or value >= 0 else "INT32"
            types = {bool: "BOOL", int: number, float: "FLOAT32", str: "STRING"}
            writer.add_key_value(name, value, gguf.GGUFValueType[types[type(value)]])
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def real(name):
    """Path of a real model's GGUF file; skips the test without one."""
    try:
        path = assets.model(name)
    except UserError as error:
        pytest.skip(str(error))
    if path.is_dir():
        pytest.skip("the hub gives a folder of safetensors")
    return path


class Llama:
    """llama.cpp with a GGUF file, in this process, in float32."""

    def __init__(self, path):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel, params.n_ctx, params.n_batch, params.n_ubatch = 1, 512, 512, 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup, params.verbosity = False, -1
        self._server = xllamacpp.Server(params)
        self._connection = http.client.HTTPConnection(self._server.listening_address.removeprefix("http://"))

    def tokens(self, text):
        body = {"content": text, "add_special": True, "parse_special": True}
        self._connection.request("POST", "/tokenize", json.dumps(body), {"Content-Type": "application/json"})
        return json.load(self._connection.getresponse())["tokens"]

    def log_probabilities(self, tokens, vocabulary):
        """Log-probabilities of the next token, (vocabulary,)."""
        # The server reports log-probabilities only if the sampled token is a whole character, hence the bias;
        # the reported log-probabilities do not include it.
        request = {
            "prompt": tokens,
            "max_tokens": 1,
            "logprobs": vocabulary,
            "logit_bias": [["a", 1e4]],
        }
        (choice,) = self._server.handle_completions(request)["choices"]
        known = {entry["id"]: entry["logprob"] for entry in choice["logprobs"]["content"][0]["top_logprobs"]}
        assert len(known) == vocabulary
        return np.array([known[token] for token in range(vocabulary)])
