"""Questions and answers as arrays: which positions predict an answer's tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from sublim_jax.data import chat
from sublim_jax.errors import UserError
from sublim_jax.models.language import Model

MULTIPLE = 16  # lengths are rounded up to it

Text = tuple[Sequence[int], Sequence[int]]  # tokens, and the positions of the answers' tokens


class Rows(NamedTuple):
    """Conversations of one question and one answer; right padding, which causal attention never sees."""

    tokens: Int[Array, "*n t"] | Int[np.ndarray, "*n t"]
    at: Int[Array, "*n a"] | Int[np.ndarray, "*n a"]  # positions whose logits predict the answer's tokens
    targets: Int[Array, "*n a"] | Int[np.ndarray, "*n a"]
    weights: Float[Array, "*n a"] | Float[np.ndarray, "*n a"]  # 1 for a token of the answer, 0 for padding

    def take(self, rows: Int[Array, "b"] | Int[np.ndarray, "b"]) -> "Rows":
        return Rows(*(leaf[rows] for leaf in self))

    def padded(self, length: int, longest: int) -> "Rows":
        """The rows padded to at least `length` tokens, and answers to at least `longest`."""

        def wider(leaf: Shaped[Array, "n w"] | Shaped[np.ndarray, "n w"], minimum: int) -> np.ndarray:
            return np.pad(leaf, ((0, 0), (0, max(minimum - leaf.shape[1], 0))))

        return Rows(wider(self.tokens, length), *(wider(leaf, longest) for leaf in self[1:]))


def rows(model: Model, pairs: Sequence[tuple[str, str]], end: bool = True, system: str = "") -> Rows:
    """Rows of (question, answer) through the chat template.

    Args:
      end: whether the stop token belongs to the answer.
      system: a system prompt for all rows; by default the template's own, if it has one.

    Raises UserError, naming the row, for a row that the template refuses, an answer with a stop token inside, and a
    token that the model does not have.
    """
    stops = chat.stop_tokens(model.tokenizer, model.config)
    texts: list[Text] = []
    for number, (question, answer) in enumerate(pairs, 1):
        try:
            chat.check_unbroken(model.tokenizer, answer, stops)
            start = len(chat.question(model.tokenizer, question, system))
            whole = chat.exchange(model.tokenizer, question, answer, system)
        except UserError as error:
            raise UserError(f"row {number} ({question[:40]!r}): {error}") from error
        stop = next((i for i in range(start, len(whole)) if whole[i] in stops), len(whole))
        texts.append((whole[: stop + 1], range(start, min(stop + end, len(whole)))))
    return arrays(texts, model.settings.vocab)


def arrays(texts: Sequence[Text], vocab: int) -> Rows:
    """Rows of texts with the answers' tokens at given positions above 0.

    Raises UserError, naming the row, for a token outside the model's vocabulary: where a tokenizer has more.
    """
    for number, (text, _) in enumerate(texts, 1):
        if (highest := max(text)) >= vocab:
            raise UserError(
                f"row {number} has token {highest}, and the model has {vocab}: its tokenizer has tokens that it lacks"
            )
    length, longest = (max(len(text[i]) for text in texts) for i in (0, 1))
    length = -(-length // MULTIPLE) * MULTIPLE
    tokens = np.zeros((len(texts), length), np.int32)
    at = np.zeros((len(texts), longest), np.int32)
    weights = np.zeros((len(texts), longest), np.float32)
    for row, (text, positions) in enumerate(texts):
        tokens[row, : len(text)] = text
        at[row, : len(positions)] = np.asarray(positions) - 1
        weights[row, : len(positions)] = 1
    return Rows(tokens, at, np.take_along_axis(tokens, np.minimum(at + 1, length - 1), 1), weights)
