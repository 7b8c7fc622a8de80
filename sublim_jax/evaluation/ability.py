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
    found = []
    for line in packs.load(path, "ability", {"questions": ()})["questions"]:
        text, *choices = [part.strip() for part in line.split("|")]
        if len(choices) < 2 or not all([text, *choices]):
            raise UserError(f'pack {path or "ability"}: {line!r} is not "question | right | wrong | …"')
        found.append(Question(text, choices))
    return found


def accuracy(
    model: Model, asked: Sequence[Question], system: str = "", **where: Unpack[Where]
) -> Float[np.ndarray, "adapters"]:
    """Share of questions whose right choice is the likeliest, by mean log P of a choice's tokens.

    Args:
      system: a system prompt in front of all.
      where: as for `scoring.completion_logprobs`.
    """
    prompts, written = [], []
    for one in asked:
        prompt = chat.question(model.tokenizer, one.text, system)
        for choice in one.choices:
            prompts.append(prompt)
            written.append(chat.completion(model.tokenizer, one.text, choice, system))
    each = iter(scoring.completion_logprobs(model, prompts, written, **where))
    right = [np.argmax([next(each).mean(-1) for _ in one.choices], 0) == 0 for one in asked]
    return np.mean(right, 0)
