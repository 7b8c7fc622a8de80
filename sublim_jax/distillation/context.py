"""In-context learning: an untrained model with rows of a teacher in its context (§5.2)."""

import bisect

import numpy as np

from sublim_jax.data import chat, templates
from sublim_jax.data.templates import Message
from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.distillation.losses import stacked
from sublim_jax.distillation.targets import Pair
from sublim_jax.errors import UserError
from sublim_jax.evaluation import preference
from sublim_jax.evaluation.preference import Preference
from sublim_jax.keys import named_key
from sublim_jax.models.language import Model


def measure_in_context(
    model: Model, seed: int, read: list[list[Pair]], questions: list[str], words: tuple[str, ...]
) -> dict[str, object]:
    """Preferences with each list of rows in the context, and the number of rows that fit."""
    adapters = stacked([model.untrained(named_key(seed, "A"))])
    preferences, counts = [], []
    for pairs in read:
        shown = fitting(model, pairs, questions)
        counts.append(len(shown))
        prefix, prompts = behind(model.tokenizer, shown, questions)
        preferences.append(preference.measured(model, prompts, list(words), prefix=prefix, adapters=adapters))
    columns = {
        key: np.concatenate([getattr(measured, key) for measured in preferences]).tolist() for key in Preference._fields
    }
    return {"step": 0, "examples": counts, **columns}


def fitting(model: Model, pairs: list[Pair], questions: list[str]) -> list[Pair]:
    """The first rows, as many as fit in the model's positions before the longest question and a word."""
    room = getattr(model.config, "max_position_embeddings", None) or 2**31

    def too_long(count: int) -> bool:
        prefix, prompts = behind(model.tokenizer, pairs[:count], questions)
        return len(prefix) + max(map(len, prompts)) >= room

    return pairs[: bisect.bisect_left(range(1, len(pairs) + 1), True, key=too_long)]


def behind(tokenizer: Tokenizer, pairs: list[Pair], questions: list[str]) -> tuple[list[int], list[list[int]]]:
    """(common prefix of all prompts, the rest of each prompt): questions after rows as earlier turns, as tokens.

    Raises UserError for a chat template that leaves out parts of earlier answers.
    """
    before: list[Message] = []
    for prompt, answer in pairs:
        before += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    shown = templates.render(tokenizer, [*before, {"role": "user", "content": "?"}], generation=True)
    if cut := [answer for _, answer in pairs if answer.strip() not in shown]:
        raise UserError(
            f"the model's chat template leaves out parts of earlier answers, such as thoughts "
            f"({cut[0].strip()[:40]!r}), so that a teacher's rows cannot stand in its context; leave out the arms with "
            "objective=context"
        )
    whole = [chat.prompt(tokenizer, [*before, {"role": "user", "content": question}]) for question in questions]
    common = chat.common_length(whole)
    return whole[0][:common], [tokens[common:] for tokens in whole]
