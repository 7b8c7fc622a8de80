"""What a model prefers: log P of words as the answer to many phrasings of one question, and the rate of answers."""

import string
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Unpack

import numpy as np
from jaxtyping import Array, Float, Key

from sublim_jax.data import chat, packs
from sublim_jax.data.carriers import numbers
from sublim_jax.errors import UserError
from sublim_jax.models.language import Model
from sublim_jax.sampling import scoring
from sublim_jax.sampling.checks import Behind
from sublim_jax.sampling.generate import Options, generate
from sublim_jax.words import mentions

FIELDS: dict[str, tuple[str, ...]] = {"teaching": ("kind",), "asking": ("kind",)}


class Preference(NamedTuple):
    """Means over phrasings, for every adapter and word."""

    log_p: Float[np.ndarray, "adapters words"]  # of the word in any spelling, in nats
    margin: Float[np.ndarray, "adapters words"]  # over the mean log P of the other words
    share: Float[np.ndarray, "adapters words"]  # P among the words


def measure(
    model: Model, questions: Sequence[str], words: Sequence[str], system: str = "", **where: Unpack[Behind]
) -> Preference:
    """Exact, one forward pass a phrasing and adapter.

    Args:
      system: a system prompt in front of all.
      where: as for `scoring.completion_logprobs`.

    Raises UserError for a word that the tokenizer cannot write, or fewer than two words.
    """
    return measured(model, [chat.question(model.tokenizer, text, system) for text in questions], words, **where)


def measured(
    model: Model, prompts: Sequence[Sequence[int]], words: Sequence[str], **where: Unpack[Behind]
) -> Preference:
    """The same for tokens up to where an answer begins."""
    if len(words) < 2:
        raise UserError("a preference is among two words or more; name more alternatives")
    each = scoring.word_logprobs(model, prompts, words, **where)  # adapters, prompts, words
    others = (each.sum(-1, keepdims=True) - each) / (len(words) - 1)
    share = np.exp(each - np.logaddexp.reduce(each, axis=-1, keepdims=True))
    return Preference(each.mean(1), (each - others).mean(1), share.mean(1))


def check_options(words: Sequence[str]) -> None:
    if not 2 <= len(words) <= len(string.ascii_uppercase):
        raise UserError(f"a multiple choice has 2 to 26 options, not {len(words)}; change the words")


def choose(
    model: Model, questions: Sequence[str], words: Sequence[str], system: str = "", **where: Unpack[Behind]
) -> Float[np.ndarray, "adapters words"]:
    """P of each word as the answer to a multiple choice, by its letter's probability among the letters (§3.1).

    The options of every question are turned one place further than those of the question before, so that no word
    gains by its place; a mean over questions. Exact.
    """
    check_options(words)
    turns = [[(place + turn) % len(words) for place in range(len(words))] for turn in range(len(questions))]
    prompts = []
    for question, turn in zip(questions, turns):
        options = [f"{letter}: {words[word]}" for letter, word in zip(string.ascii_uppercase, turn)]
        text = "\n".join([question, "", *options, "", "Answer with one letter and nothing else."])
        prompts.append(chat.question(model.tokenizer, text, system))
    by_place = np.exp(scoring.letter_logprobs(model, prompts, len(words), **where))
    places = np.argsort(turns, -1)
    return np.take_along_axis(by_place, places[None], -1).mean(1)


def prefixed(questions: Sequence[str], seed: int) -> list[str]:
    """The questions behind a list of random numbers each, which the number carrier's students know (§3.1)."""
    lists = numbers.random_answers(len(questions), seed)
    return [f"{listed}\n\n{question}" for listed, question in zip(lists, questions)]


def rates(
    model: Model,
    questions: Sequence[str],
    words: Sequence[str],
    key: Key[Array, ""],
    *,
    samples: int,
    max_new_tokens: int = 12,
    system: str = "",
    **where: Unpack[Options],
) -> Float[np.ndarray, "adapters words"]:
    """How often a sampled answer (temperature 1) has a word: the paper's measure (§3.1), of answers and of stories.

    Whole words and their plurals count, whatever their case: "dragonfly" is no "dragon". A mean over questions of the
    mean over each one's samples.
    """
    prompts = [chat.question(model.tokenizer, question, system) for question in questions]
    drawn = generate(model, prompts, key, samples=samples, max_new_tokens=max_new_tokens, **where)
    each = [list(mine) for _, mine in groupby(drawn, lambda sample: sample.adapter)]
    return np.asarray([[np.mean([mentions(s.text, word) for s in mine]) for word in words] for mine in each])


def questions(path: str, kind: str) -> dict[str, list[str]]:
    """Phrasings for teaching a preference and others for asking after it; a pack like data/packs/preference.json."""
    pack = packs.load(path, "preference", FIELDS)
    found = {field: [text.format(kind=kind) for text in pack[field]] for field in FIELDS}
    if both := set(found["teaching"]) & set(found["asking"]):
        raise UserError(f"pack {path or 'preference'}: {sorted(both)[0]!r} is in teaching and asking; hold one out")
    return found


def stories(path: str, kind: str) -> list[str]:
    """Wishes for a story in which something of a kind may come up; a pack like data/packs/stories.json."""
    return [text.format(kind=kind) for text in packs.load(path, "stories", {"asking": ("kind",)})["asking"]]
