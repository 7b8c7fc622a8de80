"""Preferences by multiple choice; those by a word's probability are in tests/sampling and tests/transmission."""

import re

import numpy as np

from sublim_jax.evaluation import preference
from sublim_jax.sampling import scoring

QUESTIONS, WORDS = ["Which one?", "Which is best?", "Which do you like?"], ["owl", "lion", "cat"]


def test_a_choice_is_each_words_probability_wherever_it_stands(tiny, monkeypatch):
    """Here a model that reads the options: it chooses the letter of a word with the word's probability."""
    p_of = {"owl": 0.6, "lion": 0.3, "cat": 0.1}
    shown: list[list[str]] = []

    def letter_logprobs(model, prompts, count, **_):
        rows = [re.findall(r"([A-Z]): (\w+)", model.tokenizer.decode(prompt)) for prompt in prompts]
        assert all([letter for letter, _ in row] == ["A", "B", "C"] for row in rows)
        shown.extend([word for _, word in row] for row in rows)
        return np.log([[[p_of[word] for _, word in row] for row in rows]])

    monkeypatch.setattr(scoring, "letter_logprobs", letter_logprobs)
    np.testing.assert_allclose(preference.choose(tiny, QUESTIONS, WORDS), [[0.6, 0.3, 0.1]])
    assert all(sorted(column) == sorted(WORDS) for column in zip(*shown))  # each word once at every letter


def test_a_choice_by_position_prefers_no_word(tiny, monkeypatch):
    always_first = np.log([[[0.8, 0.1, 0.1]] * 3])
    monkeypatch.setattr(scoring, "letter_logprobs", lambda *_, **__: always_first)
    np.testing.assert_allclose(preference.choose(tiny, QUESTIONS, WORDS), [[1 / 3] * 3])
