"""What may be asked of a model: tokens that it has, texts that fit it. Looked at on the host, before any computing."""

import operator
from collections.abc import Sequence
from typing import SupportsIndex, TypedDict

import numpy as np
from jax.sharding import Mesh

from sublim_jax.errors import UserError
from sublim_jax.models.decoder import Settings, Steering
from sublim_jax.models.functional import Params

Tokens = Sequence[SupportsIndex] | np.ndarray
Texts = Sequence[Tokens] | np.ndarray


class Where(TypedDict, total=False):
    """Under what a model writes or scores texts, and on which devices: see `generate.stream`."""

    adapters: Params | None
    steering: Steering | None
    mesh: Mesh | None


class Behind(Where, total=False):
    """And behind which tokens of every prompt."""

    prefix: Tokens


def whole_number(value: SupportsIndex, name: str, minimum: int = 1) -> int:
    """Any kind of integer as Python's. Raises UserError for another thing, and for one that is too small."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise UserError(f"{name}={value!r}; ask for a whole number, {minimum} or more") from error
    if number < minimum:
        raise UserError(f"{name}={number}; ask for {minimum} or more")
    return number


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
    found = [tokens_of(settings, text, f"{what} {number}") for number, text in enumerate(texts)]
    for number, text in enumerate(found):
        if not text:
            raise UserError(f"{what} {number} is empty; give it a token (the tokenizer's beginning of text will do)")
    return found


def apart(settings: Settings, prompts: list[list[int]], prefix: Tokens) -> tuple[list[list[int]], list[int]]:
    """Prompts, and the prefix that is computed once for all of them: none where its keys depend on a row's length."""
    prefix = tokens_of(settings, prefix, "the prefix")
    if settings.turns_by_length:
        return [prefix + prompt for prompt in prompts], []
    return prompts, prefix


def check_growth(settings: Settings, length: int, limit: int, what: str) -> None:
    """Raises UserError for a text that may grow past a length from which on all its positions turn otherwise.

    Its cached keys, turned as those of a short text, would be wrong then.
    """
    for table in settings.rotaries:
        last = length + limit - 1  # the last token drawn is not computed
        if table.until and last > table.until and (length <= table.until or not table.beyond):
            raise UserError(
                f"{what} has {length} tokens and may get {limit} more, past the {table.until} from which on the "
                "model's rotary positions change for the whole text; lower max_new_tokens, or score texts as a whole"
            )
