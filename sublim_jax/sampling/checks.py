"""Checks of arguments on the host, before any compute: tokens in the vocabulary, texts within the positions."""

import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex, TypedDict

import numpy as np
from jax.sharding import Mesh

from sublim_jax.errors import UserError
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.settings import Settings

Tokens = Sequence[SupportsIndex] | np.ndarray
Texts = Sequence[Tokens] | np.ndarray


class Where(TypedDict, total=False):
    """Adapters, steering and mesh for sampling or scoring: see `generate.stream`."""

    adapters: Params | None
    steering: Steering | None
    mesh: Mesh | None


class Behind(Where, total=False):
    """The same, and a prefix in front of every prompt."""

    prefix: Tokens


def whole_number(value: SupportsIndex, name: str, minimum: int = 1) -> int:
    """Any kind of integer as Python's int. Raises UserError for anything else, and below the minimum."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise UserError(f"{name}={value!r}; ask for a whole number, {minimum} or more") from error
    if number < minimum:
        raise UserError(f"{name}={number}; ask for {minimum} or more")
    return number


def check_steering(settings: Settings, steering: Steering | None) -> None:
    """Raises UserError for vectors that are not one for each layer."""
    shape = (settings.layers, settings.width)
    for name in ("add", "project_out") if steering else ():
        vectors = getattr(steering, name)
        if vectors is not None and vectors.shape != shape:
            raise UserError(f"steering.{name} is of shape {vectors.shape}; this model needs {shape}, layers × width")


def tokens_of(settings: Settings, tokens: Tokens, what: str) -> list[int]:
    """Tokens as plain numbers. Raises UserError for one that the model does not have."""
    array = np.asarray(tokens)
    if not array.size:
        return []
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{what} holds {array.dtype} of {array.ndim} axes instead of a row of token ids")
    outside = (array < 0) | (array >= settings.vocab)
    if outside.any():
        raise UserError(f"{what} has a token outside the model's vocabulary of {settings.vocab}: {array[outside][0]}")
    return array.tolist()


def texts_of(settings: Settings, texts: Texts, what: str) -> list[list[int]]:
    """Texts as plain numbers. Raises UserError for an empty one, and for a token that the model does not have."""
    token_lists = [tokens_of(settings, text, f"{what} {number}") for number, text in enumerate(texts)]
    for number, text in enumerate(token_lists):
        if not text:
            raise UserError(f"{what} {number} is empty; give it a token (the tokenizer's beginning of text will do)")
    return token_lists


def apart(settings: Settings, prompts: list[list[int]], prefix: Tokens) -> tuple[list[list[int]], list[int]]:
    """Prompts, and the prefix to compute once for all; joined where the prefix's keys depend on a row's length."""
    prefix = tokens_of(settings, prefix, "the prefix")
    if settings.turns_by_length:
        return [prefix + prompt for prompt in prompts], []
    return prompts, prefix


def check_growth(settings: Settings, length: int, limit: int, what: str) -> None:
    """Raises UserError for a text that may grow past the length at which the rotation of all its positions changes.

    Its cached keys, rotated as those of a short text, would then be wrong.
    """
    for table in settings.rotaries:
        last = length + limit - 1  # the last sampled token is not fed back
        if table.until and last > table.until and (length <= table.until or not table.beyond):
            raise UserError(
                f"{what} has {length} tokens and may get {limit} more, past the {table.until} from which on the "
                "model's rotary positions change for the whole text; lower max_new_tokens, or score texts as a whole"
            )


def check_finite(finishes: Iterable[tuple[int, str]]) -> None:
    """Raises UserError for samples, as (prompt, finish), that ended because logits were not finite."""
    if broken := [f"prompt {prompt}" for prompt, finish in finishes if finish == "nan"]:
        raise UserError(f"logits of {', '.join(broken[:5])} are not finite; look at the weights, or take a wider dtype")
