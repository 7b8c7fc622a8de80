"""Preferences: log P of words as answers to many phrasings of one question, and their rate in sampled answers."""

import string
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple, Unpack

import numpy as np
from jaxtyping import Float

from sublim_jax.data import chat, packs
from sublim_jax.data.carriers import numbers
from sublim_jax.errors import UserError
from sublim_jax.models.language import Model
from sublim_jax.sampling import scoring
from sublim_jax.sampling.checks import Behind
from sublim_jax.words import mentions

# Of what is measured. A change of it gets another number, and a workdir of before is measured again, not mixed.
DEFINITION = 2
FIELDS: dict[str, tuple[str, ...]] = {"teaching": ("kind",), "asking": ("kind",)}


class Preference(NamedTuple):
    """Means over phrasings, for every adapter and word."""

    log_p: Float[np.ndarray, "adapters words"]  # of the word in any spelling, in nats
    margin: Float[np.ndarray, "adapters words"]  # over the mean log P of the other words
    share: Float[np.ndarray, "adapters words"]  # P among the words


def measure(
    model: Model, questions: Sequence[str], words: Sequence[str], system: str = "", **where: Unpack[Behind]
) -> Preference:
    """Preferences among words, exact: one forward pass per phrasing and adapter.

    Args:
      system: a system prompt before every question.
      where: as for `scoring.completion_logprobs`.

    Raises UserError for a word that the tokenizer cannot write, or fewer than two words.
    """
    return measured(model, [chat.question(model.tokenizer, text, system) for text in questions], words, **where)


def measured(
    model: Model, prompts: Sequence[Sequence[int]], words: Sequence[str], **where: Unpack[Behind]
) -> Preference:
    """`measure` for prompts given as tokens up to where the answer begins."""
    if len(words) < 2:
        raise UserError("a preference is among two words or more; name more alternatives")
    log_p = scoring.word_logprobs(model, prompts, words, **where)  # adapters, prompts, words
    others = (log_p.sum(-1, keepdims=True) - log_p) / (len(words) - 1)
    share = np.exp(log_p - np.logaddexp.reduce(log_p, axis=-1, keepdims=True))
    return Preference(log_p.mean(1), (log_p - others).mean(1), share.mean(1))


def check_options(words: Sequence[str]) -> None:
    if not 2 <= len(words) <= len(string.ascii_uppercase):
        raise UserError(f"a multiple choice has 2 to 26 options, not {len(words)}; change the words")


def choose(
    model: Model, questions: Sequence[str], words: Sequence[str], system: str = "", **where: Unpack[Behind]
) -> Float[np.ndarray, "adapters words"]:
    """P of each word as the answer to a multiple choice, by its letter's probability among the letters (§3.1).

    The options are rotated by one position from each question to the next, so that no word gains by its position. The
    result is exact, a mean over questions.
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
    """Each question after a list of random numbers, as students of the numbers carrier have read them (§3.1)."""
    lists = numbers.random_answers(len(questions), seed)
    return [f"{listed}\n\n{question}" for listed, question in zip(lists, questions)]


def rates(answers: Iterable[tuple[int, str]], words: Sequence[str]) -> Float[np.ndarray, "adapters words"]:
    """The share of answers with each word: the paper's measure (§3.1), of answers and of stories.

    Whole words and their plurals count, in any case: "dragonfly" is no "dragon".

    Args:
      answers: (adapter, text) of each, as many to every question, in order of adapters.
    """
    by_adapter = [[text for _, text in group] for _, group in groupby(answers, lambda answer: answer[0])]
    return np.asarray([[np.mean([mentions(text, word) for text in texts]) for word in words] for texts in by_adapter])


def questions(path: str, kind: str) -> dict[str, list[str]]:
    """Phrasings to train a preference, and held-out ones to measure it, from a pack like data/packs/preference.json."""
    pack = packs.load(path, "preference", FIELDS)
    phrasings = {field: [text.format(kind=kind) for text in pack[field]] for field in FIELDS}
    if both := set(phrasings["teaching"]) & set(phrasings["asking"]):
        raise UserError(f"pack {path or 'preference'}: {sorted(both)[0]!r} is in teaching and asking; hold one out")
    return phrasings


def questions_or_default(given: Sequence[str] | None, kind: str, part: str) -> list[str]:
    """The given questions, or where there are none the package's in "teaching" or "asking".

    Raises UserError for an empty list, and for a text in the place of a list.
    """
    if given is None:
        return questions("", kind)[part]
    if isinstance(given, str) or not given:
        raise UserError(f"questions={given!r}: give a list of one or more")
    return list(given)


def stories(path: str, kind: str) -> list[str]:
    """Prompts for stories in which something of a kind may appear, from a pack like data/packs/stories.json."""
    return [text.format(kind=kind) for text in packs.load(path, "stories", {"asking": ("kind",)})["asking"]]
