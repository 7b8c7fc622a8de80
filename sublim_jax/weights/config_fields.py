"""A folder's config.json: read whole, and refused by name where a field may change what a model computes unnoticed.

A field passes where its family's settings are made of it, where it is at the default of transformers' config for that
type of model, where it is off (null, false, empty) and no default is on, or where it is on the lists of this file.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers

from sublim_jax.errors import UserError
from sublim_jax.models.families import Config, family

# What changes no logit: training, initialisation, caches, what is returned, labels, names, versions.
HARMLESS = {
    "architectures",  # looked at by `_check_kind`
    "attn_implementation",
    "auto_map",  # looked at by `_check_kind`
    "chunk_size_feed_forward",
    "custom_pipelines",
    "dtype",
    "experts_implementation",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
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
    "task_specific_params",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "transformers.js_config",
    "use_bfloat16",
    "use_cache",
    "use_reentrant",
    "use_return_dict",
}
HARMLESS_NAMES = re.compile(r"_.*|summary_.*|unsloth_.*|.*_token_id|.*dropout(_prob)?|.*_pdrop")
# Of one type of model: written there, and read by nothing.
HARMLESS_OF = {
    "gemma2": {"hidden_act"},
    "gemma3_text": {"hidden_act"},
    "gpt_neox": {"num_key_value_heads"},
    "gpt2": {"intermediate_size", "num_key_value_heads"},
}
# What other programs write, by the value at which it does nothing.
NEUTRAL = {"is_causal": True, "causal": True, "full_attn_mod": 1, "interpolate_factor": 1}
# Models with a vision tower whose text model is read by itself, and what concerns their images alone.
WITH_VISION = ("gemma3", "llava", "mistral3")
OF_IMAGES = re.compile(r"(vision|image|mm|projector|multimodal_projector)_.*|.*_token_index|spatial_merge_size")
PARTS = {"text_config", "tie_word_embeddings"}

WRAPPER = "text_model_of"  # of a text model's config: the kind of model that it was taken from

NO_LANGUAGE_MODEL = re.compile(r".*For(Sequence|Token)Classification|.*ForQuestionAnswering|.*Reward\w*")
BARE = re.compile(r"(?!.*(LMHead|DoubleHeads)).*Model")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__} and no JSON object; fetch it again")
    return found


def load(folder: Path) -> Config:
    """The config of a folder; of a multimodal model, that of its text model.

    Raises UserError where there is none, or it has a field that may change what is computed and is not known here.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(_why_no_config(folder))
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter beside a model; name the model's own folder, and the adapter apart")
    stated = read_json(path)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        text = config.get_text_config()
    except Exception as error:  # whatever a config class makes of values that it does not expect
        raise UserError(f"{path} is no config that transformers knows ({first_line(error)})") from error
    try:
        _check(stated, config, text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    text.eos_token_id = _stop_tokens(folder, text, config)
    if text is not config:
        setattr(text, WRAPPER, config.model_type)
    return text


def _check(stated: Mapping[str, Any], config: Config, text: Config) -> None:
    """Raises UserError where a model is not wholly understood. What is said of its parts together is put in the text's.

    Args:
      text: the config of the text model, which is `config` itself where there is nothing else.
    """
    if text is not config and config.model_type not in WITH_VISION:
        known = ", ".join(WITH_VISION)
        raise UserError(f"{config.model_type!r} is a model of several parts; those read here are {known}")
    kind = family(text)
    _check_kind(stated, config)
    inner = stated
    if text is not config:
        _check_fields(stated, config, PARTS, OF_IMAGES)
        text.tie_word_embeddings = config.tie_word_embeddings  # the head stands in the whole model
        inner = stated.get("text_config") or {}
    _check_fields(inner, text, kind.fields)
    kind.settings(text)


def _check_fields(
    stated: Mapping[str, Any], config: Config, known: set[str], names: re.Pattern[str] | None = None
) -> None:
    """Raises UserError for a field that is not understood and may count."""
    defaults = _defaults(config.model_type)
    harmless = HARMLESS | HARMLESS_OF.get(config.model_type, set())
    for stated_name, value in stated.items():
        name = config.attribute_map.get(stated_name, stated_name)
        if name in NEUTRAL:
            passes = value == NEUTRAL[name]
        else:
            default = defaults.get(name)
            passes = (
                name in known
                or name in harmless
                or bool(HARMLESS_NAMES.fullmatch(name))
                or bool(names and names.fullmatch(name))
                or name in _generation()
                or (name in defaults and value == default)
                or (_off(value) and _off(default))
            )
        if not passes:
            raise UserError(
                f"{stated_name}={_short(value)} is not known of {config.model_type} here, and may change what is "
                "computed; take it out of the file if it does not"
            )


def _off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


@lru_cache
def _defaults(model_type: str) -> Mapping[str, Any]:
    return transformers.AutoConfig.for_model(model_type).to_dict()


@lru_cache
def _generation() -> frozenset[str]:
    """What transformers once kept in config.json about how to sample; it leaves it there."""
    return frozenset(transformers.GenerationConfig().to_dict())


def _check_kind(stated: Mapping[str, Any], config: Config) -> None:
    """Raises UserError for a checkpoint of another kind than a language model, or with code of its own."""
    for architecture in stated.get("architectures") or ():
        if NO_LANGUAGE_MODEL.fullmatch(str(architecture)):
            raise UserError(f"{architecture} is a classifier or reward model and no language model")
        if BARE.fullmatch(str(architecture)):
            raise UserError(f"{architecture} has no language head (an embedding model?); no logits come of it")
    theirs = type(config).__name__.removesuffix("Config").removesuffix("Text")
    code = stated.get("auto_map") or {}
    for name in code.values() if isinstance(code, Mapping) else (code,):
        if not re.fullmatch(
            rf"{theirs}(Text)?(Config|Model|LMHeadModel|PreTrainedModel|For\w+)", str(name).split(".")[-1]
        ):
            raise UserError(f"auto_map names code of its own, {name}, which may compute something else")


def _stop_tokens(folder: Path, text: Config, whole: Config) -> int | list[int] | None:
    """What ends an answer: it stands with the whole model, or, of chat models, with how it generates.

    Raises UserError where it is no token.
    """
    path = folder / "generation_config.json"
    generating = read_json(path).get("eos_token_id") if path.is_file() else None
    stops: dict[int, None] = {}
    for named in (text.eos_token_id, getattr(whole, "eos_token_id", None), generating):
        for token in named if isinstance(named, list) else [named]:
            if token is not None and not isinstance(token, int):
                raise UserError(f"{path}: eos_token_id={_short(named)} is no token")
            if token is not None:
                stops[token] = None
    return list(stops) if len(stops) > 1 else next(iter(stops), None)


def _why_no_config(folder: Path) -> str:
    """What a folder without config.json is, in one line."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is an adapter and no model: it has no config.json; name its base model, and the adapter apart"
    for file in ("model_index.json", "modules.json"):
        if (folder / file).is_file():
            return f"{folder} has several parts ({file}) and no config.json; name its language model's folder"
    return f"{folder} has no config.json; fetch the model again"


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
