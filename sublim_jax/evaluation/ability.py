"""A small check that a model has not been broken: easy questions with four choices, exact, without sampling."""

from collections.abc import Sequence
from typing import NamedTuple, Unpack

import numpy as np
from jaxtyping import Float

from sublim_jax.data import chat, packs
from sublim_jax.errors import UserError
from sublim_jax.models.language import Model
from sublim_jax.sampling import scoring
from sublim_jax.sampling.checks import Where


class Question(NamedTuple):
    text: str
    choices: list[str]  # the first is right


def questions(path: str = "") -> list[Question]:
    """Questions of a pack like data/packs/ability.json: "question | right | wrong | …"."""
    parsed = []
    for line in packs.load(path, "ability", {"questions": ()})["questions"]:
        text, *choices = [part.strip() for part in line.split("|")]
        if len(choices) < 2 or not all([text, *choices]):
            raise UserError(f'pack {path or "ability"}: {line!r} is not "question | right | wrong | …"')
        parsed.append(Question(text, choices))
    return parsed


def accuracy(
    model: Model, questions: Sequence[Question], system: str = "", **where: Unpack[Where]
) -> Float[np.ndarray, "adapters"]:
    """Share of questions whose right choice is likelier than every other, by mean log P of a choice's tokens.

    Args:
      system: a system prompt before every question.
      where: as for `scoring.completion_logprobs`.
    """
    prompts, written = [], []
    for question in questions:
        prompt = chat.question(model.tokenizer, question.text, system)
        for choice in question.choices:
            prompts.append(prompt)
            written.append(chat.completion(model.tokenizer, question.text, choice, system))
    logprobs = iter(scoring.completion_logprobs(model, prompts, written, **where))
    right = []
    for question in questions:
        first, *others = [next(logprobs).mean(-1) for _ in question.choices]
        known = np.all(np.isfinite([first, *others]), 0)
        right.append(np.where(known, np.all([first > other for other in others], 0), np.nan))
    return np.mean(right, 0)
