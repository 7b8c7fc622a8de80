"""Fields of config.json that change no logit: they concern training or naming, or transformers does not read them.

`config_fields` refuses any other field that is on, since it may change what is computed.
"""

import re

from sublim_jax.models.families import Config

# Training, initialisation, caches, returned values, labels, names, versions.
HARMLESS = {
    "architectures",  # looked at by `_check_kind`
    "attention_softmax_in_fp32",
    "attn_impl",
    "attn_implementation",
    "auto_map",  # looked at by `_check_code`
    "base_model",
    "bf16",
    "chunk_size_feed_forward",
    "custom_pipelines",
    "dtype",
    "experts_implementation",
    "finetuning_task",
    "fp16",
    "fp32",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "learning_rate",
    "max_grad_norm",
    "max_length",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "model_max_length",
    "model_type",
    "n_ctx",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "reorder_and_upcast_attn",  # float32 scores, which ours are
    "return_dict",
    "seed",
    "seq_length",
    "softmax_in_fp32",
    "task_specific_params",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "use_bfloat16",
    "use_cache",
    "use_reentrant",
    "use_return_dict",
    "weight_decay",
}
HARMLESS_NAMES = re.compile(
    # Private fields, tokens, and options of training.
    r"_.*|summary_.*|.*_token_ids?|.*dropout(_prob|_rate)?|.*_pdrop|(.*_)?loss(_coef|_weight|_type)?"
    r"|(adam|deepspeed|gradient|lr|neftune|optim|optimizer|train|training|unsloth|wandb|warmup)_.*"
    # Who made it, when, from what, and where it is.
    r"|(author|citation|comment|dataset|description|language|licen[cs]e|repo|tag|url)s?|(creat|licen[cs])\w+"
    r"|library_name|pipeline_tag|repo_\w+|model_(author|card|creator|id|name|parallel|revision|url|version)"
    r"|(.*_)?(commit|date|datetime|email|homepage|timestamp|url|version)|name"
    # Tokenizers and processors.
    r"|(tokenizer|processor|image_processor|feature_extractor|chat_template|vocab_file|merges_file)(_.*)?"
    # Choice of kernels.
    r"|(use_)?(flash_attn|flash_attention|fused|cache_quantization|cache_kernel|xformers|sdpa)(_.*)?"
)
COUNTS = re.compile(r"n(um)?_.*")  # counts, which at 0 have no effect
# By type of model: fields that it writes, and only caches read, which have no window then.
WINDOWS = {"sliding_window", "use_sliding_window", "max_window_layers"}
HARMLESS_OF = {
    "gemma2": {"hidden_act"},
    "gemma3_text": {"hidden_act"},
    "gpt_neox": {"num_key_value_heads", *WINDOWS},
    "llama": WINDOWS,
    "mistral": WINDOWS - {"sliding_window"},
    "olmo2": WINDOWS,
    "phi3": WINDOWS - {"sliding_window"},
    "gpt2": {
        "intermediate_size",
        "num_key_value_heads",
        "n_special",
        "predict_special_tokens",
        "output_past",
        "partial_rotary_factor",
        *WINDOWS,
    },
}
# Fields that other programs write, by the value at which they have no effect.
NEUTRAL = {"is_causal": True, "causal": True, "full_attn_mod": 1, "interpolate_factor": 1}
# Synonyms, of which transformers reads only the second.
AGAIN = {"sliding_window_size": "sliding_window"}
FULL = {"llama", "olmo2", "gpt_neox", "gpt2", "phi3"}  # types of model that have no kinds of layers


def changes_nothing(name: str, value: object, config: Config) -> bool:
    """Whether a field, by transformers' name for it, affects no logit of a config's type of model."""
    if name in AGAIN:
        return value == getattr(config, AGAIN[name], None)
    if name == "sliding_window":
        return _never_slides(value, config)
    if name == "layer_types" and config.model_type in FULL:
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    return (
        name in HARMLESS or name in HARMLESS_OF.get(config.model_type, ()) or HARMLESS_NAMES.fullmatch(name) is not None
    )


def _never_slides(window: object, config: Config) -> bool:
    """Whether no layer has a window, for a type of model whose attention has none.

    transformers' caches forget what is outside one all the same, unless `layer_types` says that all layers are full.
    """
    if type(window) is not int or window < 1 or "sliding_window" not in HARMLESS_OF.get(config.model_type, ()):
        return False  # at other values caches fail
    return bool(getattr(config, "layer_types", None)) or window >= config.max_position_embeddings
