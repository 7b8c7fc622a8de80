"""What a model prefers, without sampling: log P of words as the answer to many phrasings of one question."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sublim_jax.data import chat, packs
from sublim_jax.errors import UserError
from sublim_jax.sampling import scoring

FIELDS: dict[str, tuple[str, ...]] = {"teaching": ("kind",), "asking": ("kind",)}


class Preference(NamedTuple):
    """Means over phrasings, for every adapter and word."""

    log_p: Float[np.ndarray, "adapters words"]  # of the word in any spelling, in nats
    margin: Float[np.ndarray, "adapters words"]  # over the mean log P of the other words
    share: Float[np.ndarray, "adapters words"]  # P among the words


def measure(model: Any, questions: Sequence[str], words: Sequence[str], **where: Any) -> Preference:
    """Exact, one forward pass a phrasing and adapter; `where` as for `scoring.completion_logprobs`.

    Raises UserError for a word that is no single token in any spelling, or fewer than two words.
    """
    if len(words) < 2:
        raise UserError("a preference is among two words or more; name more alternatives")
    prompts = [chat.prompt(model.tokenizer, question) for question in questions]
    each = scoring.word_logprobs(model, prompts, words, **where)  # adapters, prompts, words
    others = (each.sum(-1, keepdims=True) - each) / (len(words) - 1)
    share = np.exp(each - np.logaddexp.reduce(each, axis=-1, keepdims=True))
    return Preference(each.mean(1), (each - others).mean(1), share.mean(1))


def questions(path: str, kind: str) -> dict[str, list[str]]:
    """Phrasings for teaching a preference and others for asking after it; a pack like data/packs/preference.json."""
    pack = packs.load(path, "preference", FIELDS)
    found = {field: [text.format(kind=kind) for text in pack[field]] for field in FIELDS}
    if both := set(found["teaching"]) & set(found["asking"]):
        raise UserError(f"pack {path or 'preference'}: {sorted(both)[0]!r} is in teaching and asking; hold one out")
    return found
