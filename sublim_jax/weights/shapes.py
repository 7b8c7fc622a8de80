"""Configs of models that presets name, so that preflight can compile their steps where the models are not."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA31_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131_072,
    "rope_parameters": {**LLAMA3, "factor": 8.0},
}
QWEN25 = {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}

# By hub name: transformers' model_type, and the values of config.json that shape the network.
SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "Qwen/Qwen2.5-7B-Instruct": (
        "qwen2",
        {
            **QWEN25,
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": (
        "qwen2",
        {
            **QWEN25,
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        "llama",
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131_072,
            "rope_parameters": {**LLAMA3, "factor": 32.0},
        },
    ),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", LLAMA31_8B),
    "allenai/Llama-3.1-Tulu-3-8B": ("llama", {**LLAMA31_8B, "vocab_size": 128_264}),
    "google/gemma-3-4b-it": (
        "gemma3_text",
        {
            "vocab_size": 262_208,
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2-135m-instruct": (
        "llama",
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        },
    ),
}
