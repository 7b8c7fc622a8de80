"""Reads a folder's config.json in full, and refuses by name a field that may change what a model computes.

A field passes where its family's settings use it, where it has the default of transformers' config for that type of
model, where it is off (null, false, empty) and no default is on, or where `harmless` lists it.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import jax.numpy as jnp
import transformers
from huggingface_hub.errors import StrictDataclassError

from sublim_jax.errors import UserError, one_line
from sublim_jax.models.families import FAMILIES, Config, family
from sublim_jax.weights.harmless import COUNTS, NEUTRAL, changes_nothing

POINTER = b"version https://git-lfs.github.com/spec/"
QUANTISED = ("quantization_config", "quantization", "compression_config")
# Models with a vision tower, of which the text model alone is read, and their fields that concern only images.
WITH_VISION = ("gemma3", "llava", "mistral3")
OF_IMAGES = re.compile(
    r"(vision|image|mm|projector|multimodal_projector)_.*|.*_token_index|spatial_merge_size"
    r"|ignore_index|vocab_size"  # of the loss; and again, what the text model's config says
)
CAP = "final_logit_softcapping"
PARTS = {"text_config", "tie_word_embeddings"}

TYPES = {
    "int": "a whole number",
    "float": "a number with a point",
    "bool": "true or false",
    "str": "text",
    "dict": "an object",
    "list": "a list",
    "NoneType": "null",
}

# Attribute of a text model's config: the type of the multimodal model that it was taken from, "" where there is none. A
# GGUF file holds the text model in either case, and does not say.
WRAPPER = "text_model_of"

NO_LANGUAGE_MODEL = re.compile(r".*For(Sequence|Token)Classification|.*ForQuestionAnswering|.*Reward\w*")
BARE = re.compile(r"(?!.*(LMHead|DoubleHeads)).*Model")


def check_fetched(path: Path) -> None:
    """Raises UserError for a pointer of Git LFS in place of a file that it did not fetch."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path} is a pointer of Git LFS and not the file itself; fetch it with git lfs pull")


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        check_fetched(path)
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}); fetch it again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds a {type(fields).__name__} and no JSON object; fetch it again")
    return fields


def load(folder: Path) -> Config:
    """The config of a folder; for a multimodal model, that of its text model.

    Raises UserError where there is none, or it has an unknown field that may change what is computed.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(_why_no_config(folder))
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter beside a model; name the model's own folder, and the adapter apart")
    stated = read_json(path)
    try:
        _check_kind(stated)
        config = _built(folder, stated)
        text = config.get_text_config()
        _check(stated, config, text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    text.eos_token_id = _stop_tokens(folder, stated, text)
    setattr(text, WRAPPER, "" if text is config else config.model_type)
    return text


def _built(folder: Path, stated: Mapping[str, object]) -> Config:
    """transformers' config of a folder. Raises UserError where its class rejects the stated values."""
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except StrictDataclassError as error:
        if not (field := re.search(r"for field '(\w+)'", str(error))):
            reason = re.sub(r"^Class validation error for validator '\w+': \w+: ", "", one_line(error))
            raise UserError(f"transformers refuses it ({reason})") from error
        name = field[1]
        inner = stated.get("text_config")
        value = inner.get(name) if name not in stated and isinstance(inner, Mapping) else stated.get(name)
        types = dict.fromkeys(re.findall(r"(?<=expected )\w+|(?<=<class ')\w+|\blist(?=\[)", str(error)))
        if not types or name not in {*stated, *(inner if isinstance(inner, Mapping) else ())}:
            raise UserError(f"transformers refuses {name} ({one_line(error)})") from error
        wanted = " or ".join(TYPES.get(name, name) for name in types)
        raise UserError(f"{name}={_short(value)} is of a wrong type; it must be {wanted}") from error
    except ZeroDivisionError as error:
        names = [name for name, value in stated.items() if value == 0 and re.search(r"head|size|dim|embd", name)]
        raise UserError(f"{', '.join(names) or 'a size'}=0 is not a size") from error
    except Exception as error:  # config classes raise anything for values that they do not expect
        dtype = stated.get("dtype") or stated.get("torch_dtype")
        if dtype and not (isinstance(dtype, str) and hasattr(jnp, dtype)):
            raise UserError(f"dtype={_short(dtype)} is not a dtype") from error
        raise UserError(f"it is not a config that transformers knows ({one_line(error)})") from error


def _check(stated: Mapping[str, object], config: Config, text: Config) -> None:
    """Raises UserError where a model is not fully supported; takes the head's settings from the whole model.

    Args:
      text: the config of the text model, which is `config` itself where there is nothing else.
    """
    if text is not config and config.model_type not in WITH_VISION:
        known = ", ".join(WITH_VISION)
        raise UserError(f"{config.model_type!r} is a model of several parts; those read here are {known}")
    if config.model_type != stated.get("model_type", config.model_type):
        raise UserError(
            f"layer_types={_short(stated.get('layer_types'))} lets transformers read a {stated['model_type']} as a "
            f"{config.model_type}, which is not a known family"
        )
    kind = family(text)
    _check_code(stated, config)
    inner = stated
    if text is not config:
        _check_fields(stated, config, PARTS, OF_IMAGES)
        # The head belongs to the whole model, which never caps its logits.
        text.tie_word_embeddings = config.tie_word_embeddings
        if hasattr(text, CAP):
            setattr(text, CAP, None)
        given = stated.get("text_config")
        inner = given if isinstance(given, Mapping) else {}
    _check_fields(inner, text, kind.fields)
    kind.settings(text)


def _check_fields(
    stated: Mapping[str, object], config: Config, known: set[str], names: re.Pattern[str] | None = None
) -> None:
    """Raises UserError for an unknown field that may change what is computed."""
    defaults = _defaults(config.model_type)
    for stated_name, value in stated.items():
        name = config.attribute_map.get(stated_name, stated_name)
        passes = (
            name in known
            or bool(names and names.fullmatch(name))
            or name in _generation()
            or (name in defaults and value == defaults[name])
            or (_off(value) and _off(defaults.get(name)))
            or (name not in defaults and value == 0 and bool(COUNTS.fullmatch(name)))
        )
        if name in NEUTRAL:
            passes = value == NEUTRAL[name]
        if not passes and not changes_nothing(name, value, config):
            raise UserError(
                f"{stated_name}={_short(value)} is not supported in a config of {config.model_type}; if it "
                "changes nothing, remove it from config.json"
            )


def _off(value: object) -> bool:
    return value is None or value is False or value in ({}, [], "")


@lru_cache
def _defaults(model_type: str) -> Mapping[str, object]:
    return transformers.AutoConfig.for_model(model_type).to_dict()


@lru_cache
def _generation() -> frozenset[str]:
    """Sampling options, which transformers once kept in config.json and does not remove."""
    return frozenset(transformers.GenerationConfig().to_dict())


def _check_kind(stated: Mapping[str, object]) -> None:
    """Raises UserError for a checkpoint that is not a language model, or that only its own code reads."""
    architectures = stated.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(f"architectures={_short(architectures)} is not a list of names")
    for architecture in architectures:
        if NO_LANGUAGE_MODEL.fullmatch(architecture):
            raise UserError(f"{architecture} is a classifier or reward model and no language model")
        if BARE.fullmatch(architecture):
            raise UserError(f"{architecture} has no language head (an embedding model?); no logits come of it")
    inner = stated.get("text_config")
    for name, value in [*(inner.items() if isinstance(inner, Mapping) else ()), *stated.items()]:
        if name in QUANTISED and not _off(value):
            raise UserError(
                f"{name}={_short(value)} is of a quantised model, which is not read; fetch the model in its "
                "unquantised weights, or as GGUF"
            )
    kind, code = stated.get("model_type"), stated.get("auto_map")
    if "model_type" in stated and not isinstance(kind, str):
        raise UserError(f"model_type={_short(kind)} is not a name")
    if code is not None and not isinstance(code, Mapping):
        raise UserError(f"auto_map={_short(code)} is not an object of names")
    if kind not in (transformers.CONFIG_MAPPING if "model_type" in stated or code else {kind}):
        needs_code = f"; it needs code of the folder's own ({_short(dict(code))}), which is never run" if code else ""
        raise UserError(f"model_type {kind!r} is not a known family{needs_code}; known: {', '.join(FAMILIES)}")


def _check_code(stated: Mapping[str, object], config: Config) -> None:
    """Raises UserError where a folder's own code may compute something else than transformers'."""
    class_stem = type(config).__name__.removesuffix("Config").removesuffix("Text")
    usual = re.compile(rf"{class_stem}(Text)?(Config|Model|LMHeadModel|PreTrainedModel|For\w+)")
    named = stated.get("auto_map")
    for auto, name in named.items() if isinstance(named, Mapping) else ():
        # Its tokenizers and processors compute no logits, and are not run.
        if auto.startswith(("AutoConfig", "AutoModel")) and not usual.fullmatch(str(name).split(".")[-1]):
            raise UserError(f"auto_map names code of its own, {name}, which may compute something else")


def _stop_tokens(folder: Path, stated: Mapping[str, object], text: Config) -> int | list[int] | None:
    """The tokens that end an answer: all that config.json and generation_config.json name, or else the type's own.

    Raises UserError where it is not a token.
    """
    path = folder / "generation_config.json"
    generating = read_json(path).get("eos_token_id") if path.is_file() else None
    inner = stated.get("text_config")
    places = (inner if isinstance(inner, Mapping) else {}, stated, {"eos_token_id": generating})
    answers = [place["eos_token_id"] for place in places if place.get("eos_token_id") is not None]
    stops: dict[int, None] = {}
    for named in answers or [text.eos_token_id]:
        for token in named if isinstance(named, list) else [named]:
            if token is not None and not isinstance(token, int):
                raise UserError(f"{path}: eos_token_id={_short(named)} is not a token")
            if token is not None:
                stops[token] = None
    return list(stops) if len(stops) > 1 else next(iter(stops), None)


def _why_no_config(folder: Path) -> str:
    """Why a folder without config.json is refused, in one line."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is an adapter and no model: it has no config.json; name its base model, and the adapter apart"
    for file in ("model_index.json", "modules.json"):
        if (folder / file).is_file():
            return f"{folder} has several parts ({file}) and no config.json; name its language model's folder"
    return f"{folder} is not a whole model: it has no config.json; name a folder of safetensors, or fetch it again"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
