"""Fields of config.json that change no logit: they trained or name a model, or transformers does not read them.

A name that is not here is refused by `config_fields` where it is on: it may stand for something that is computed.
"""

import re

from sublim_jax.models.families import Config

# What changes no logit: training, initialisation, caches, what is returned, labels, names, versions.
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
    # Private ones, tokens, and what only trains.
    r"_.*|summary_.*|.*_token_ids?|.*dropout(_prob|_rate)?|.*_pdrop|(.*_)?loss(_coef|_weight|_type)?"
    r"|(adam|deepspeed|gradient|lr|neftune|optim|optimizer|train|training|unsloth|wandb|warmup)_.*"
    # Who made it, when, from what, and where it is.
    r"|(author|citation|comment|dataset|description|language|licen[cs]e|repo|tag|url)s?|(creat|licen[cs])\w+"
    r"|library_name|pipeline_tag|repo_\w+|model_(author|card|creator|id|name|parallel|revision|url|version)"
    r"|(.*_)?(commit|date|datetime|email|homepage|timestamp|url|version)|name"
    # What reads its text and its images.
    r"|(tokenizer|processor|image_processor|feature_extractor|chat_template|vocab_file|merges_file)(_.*)?"
    # Which kernel computes it.
    r"|(use_)?(flash_attn|flash_attention|fused|cache_quantization|cache_kernel|xformers|sdpa)(_.*)?"
)
COUNTS = re.compile(r"n(um)?_.*")  # of what there is none, at 0
# Of one type of model: written there, and read by nothing but caches.
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
# What other programs write, by the value at which it does nothing.
NEUTRAL = {"is_causal": True, "causal": True, "full_attn_mod": 1, "interpolate_factor": 1}
# Names of the same thing, which transformers reads under the second alone.
AGAIN = {"sliding_window_size": "sliding_window"}
FULL = {"llama", "olmo2", "gpt_neox", "gpt2", "phi3"}  # types of model in which no layer has a kind


def changes_nothing(name: str, value: object, config: Config) -> bool:
    """Whether a field, by the name that transformers has for it, bears on no logit of a config's type of model."""
    if name in AGAIN:
        return value == getattr(config, AGAIN[name], None)
    if name == "sliding_window" and (type(value) is not int or value < 1):
        return False  # transformers' caches fail at it
    if name == "layer_types" and config.model_type in FULL:
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    return (
        name in HARMLESS or name in HARMLESS_OF.get(config.model_type, ()) or HARMLESS_NAMES.fullmatch(name) is not None
    )
