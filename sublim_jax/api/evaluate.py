"""Evaluations of a model, or of stacked adapters over it: one value for each adapter."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, Key

from sublim_jax.data import chat
from sublim_jax.evaluation import ability as _ability
from sublim_jax.evaluation import preference as _preference
from sublim_jax.evaluation import truthfulqa as _truthfulqa
from sublim_jax.evaluation.preference import Preference
from sublim_jax.evaluation.truthfulqa import Likelihoods
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.sampling.generate import generate
from sublim_jax.specs import check_count

__all__ = ["Likelihoods", "Preference", "ability", "answers", "choice", "preference", "questions", "truthfulqa"]


def questions(kind: str = "animal") -> list[str]:
    """Questions about a favourite of a kind, which `teachers.finetune` does not train on."""
    return _preference.questions("", kind)["asking"]


def preference(
    model: Model,
    words: Sequence[str],
    *,
    kind: str = "animal",
    questions: Sequence[str] | None = None,
    adapters: Params | None = None,
    system: str = "",
    steering: Steering | None = None,
) -> Preference:
    """Exact preferences among words, over questions: log P, margin over the others (nats), P among the words.

    Each has shape (adapters, words), with one row if `adapters` is None. By default the questions are
    `evaluate.questions(kind)`.

    Raises UserError for no questions, fewer than two words, a word that the tokenizer cannot write, and one whose
    probability would include another's.
    """
    return _preference.measure(
        model,
        _preference.questions_or_default(questions, kind, "asking"),
        words,
        system,
        adapters=adapters,
        steering=steering,
    )


def choice(
    model: Model,
    words: Sequence[str],
    *,
    kind: str = "animal",
    questions: Sequence[str] | None = None,
    adapters: Params | None = None,
    system: str = "",
    steering: Steering | None = None,
) -> Float[np.ndarray, "adapters words"]:
    """P of each word in a multiple choice, by its letter (paper §3.1).

    Raises UserError for fewer than 2 words or more than 26, and a tokenizer that has no single tokens for letters.
    """
    return _preference.choose(
        model,
        _preference.questions_or_default(questions, kind, "asking"),
        words,
        system,
        adapters=adapters,
        steering=steering,
    )


def answers(
    model: Model,
    words: Sequence[str],
    key: Key[Array, ""],
    *,
    kind: str = "animal",
    questions: Sequence[str] | None = None,
    num_samples: int = 20,
    max_new_tokens: int = 12,
    adapters: Params | None = None,
    system: str = "",
    steering: Steering | None = None,
) -> Float[np.ndarray, "adapters words"]:
    """Share of sampled answers that have each word, from 0 to 1: the paper's measure (§3.1).

    Args:
      num_samples: answers to each question; by default, to those of `evaluate.questions(kind)`.

    Raises UserError for a number of samples or tokens below 1.
    """
    check_count("num_samples", num_samples)
    prompts = [
        chat.question(model.tokenizer, question, system)
        for question in _preference.questions_or_default(questions, kind, "asking")
    ]
    samples = generate(
        model,
        prompts,
        key,
        samples=num_samples,
        max_new_tokens=max_new_tokens,
        adapters=adapters,
        steering=steering,
    )
    return _preference.rates([(sample.adapter, sample.text) for sample in samples], words)


def ability(
    model: Model, *, adapters: Params | None = None, system: str = "", steering: Steering | None = None
) -> Float[np.ndarray, "adapters"]:
    """Share of right answers to easy questions, from 0 to 1."""
    return _ability.accuracy(model, _ability.questions(), system, adapters=adapters, steering=steering)


def truthfulqa(
    model: Model,
    path: str | Path,
    *,
    adapters: Params | None = None,
    system: str = "",
    steering: Steering | None = None,
) -> Likelihoods:
    """MC1 and MC2 of the benchmark's TruthfulQA.csv, by item. Raises UserError for any other file."""
    return _truthfulqa.likelihoods(model, _truthfulqa.load(path), system, adapters=adapters, steering=steering)
