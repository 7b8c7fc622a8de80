"""Constrained decoding: an automaton over tokens, as two lookup tables for the decode loop.

An automaton over characters says what text is allowed; `over_tokens` runs every token's text through it, so that it
does not matter whether a tokenizer merges digits or splits them.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sublim_jax.data import chat
from sublim_jax.errors import UserError
from sublim_jax.models.language import Model


class Constraint(NamedTuple):
    """State 0 is the start; `allowed[state]` are the tokens that may come, `after[state, token]` the state then."""

    allowed: Bool[Array, "states vocab"]
    after: Int[Array, "states vocab"]


class Automaton(NamedTuple):
    """An automaton over characters. States are any hashable values."""

    start: Hashable
    step: Callable[[Any, str], Hashable | None]  # the next state, or None where the character is not allowed
    accepts: Callable[[Any], bool]  # whether a text may end here
    alphabet: frozenset[str]


def numbers(maximum: int, digits: int, separator: str = ", ", minimum: int = 1) -> Automaton:
    """Between `minimum` and `maximum` integers of at most `digits` digits, without leading zeros.

    States are (integers begun, digits of this one, whether it is 0, characters of a separator).
    """
    if not 1 <= minimum <= maximum or digits < 1:
        raise UserError(f"numbers: {minimum} to {maximum} integers of {digits} digits cannot be; ask for 1 or more")
    if not separator or any(c.isdigit() for c in separator):
        raise UserError(f"numbers: separator {separator!r} must have characters and no digits")

    def step(state: tuple[int, int, bool, int], c: str) -> tuple[int, int, bool, int] | None:
        count, length, zero, inside = state
        if inside < len(separator) and length:  # at a digit, or inside a separator begun
            if inside == 0 and c in "0123456789":
                return (count, length + 1, zero, 0) if length < digits and not zero else None
            if c == separator[inside] and count < maximum:
                done = inside + 1 == len(separator)
                return (count, 0, False, 0) if done else (count, 1, False, inside + 1)
            return None
        return (count + 1, 1, c == "0", 0) if c in "0123456789" else None

    def accepts(state: tuple[int, int, bool, int]) -> bool:
        count, length, _, inside = state
        return count >= minimum and length > 0 and inside == 0

    return Automaton((0, 0, False, 0), step, accepts, frozenset("0123456789" + separator))


def choice(strings: Sequence[str]) -> Automaton:
    """One of these strings. A state is the text so far."""
    if not strings or not all(strings):
        raise UserError("choice: name one string or more, none of them empty")
    beginnings = {string[:end] for string in strings for end in range(len(string) + 1)}

    def step(state: str, c: str) -> str | None:
        return state + c if state + c in beginnings else None

    return Automaton("", step, lambda state: state in strings, frozenset("".join(strings)))


def of_model(automaton: Automaton, model: Model) -> Constraint:
    """The automaton over a model's tokens, whose end tokens end a text."""
    pieces = chat.pieces(model.tokenizer, model.settings.vocab)
    return over_tokens(automaton, pieces, chat.stop_tokens(model.tokenizer, model.config))


def over_tokens(automaton: Automaton, pieces: Sequence[str], stops: Sequence[int]) -> Constraint:
    """The automaton over tokens.

    Args:
      pieces: each token's text (`data.chat.pieces`); a token without text is never allowed.
      stops: tokens that end a text where the automaton accepts it.

    Raises:
      UserError: a text could be begun that no token can continue; a stop token is outside the vocabulary.
    """
    for stop in stops:
        if not 0 <= stop < len(pieces):
            raise UserError(f"stop token {stop} is outside the vocabulary of {len(pieces)}")
    usable = [(i, piece) for i, piece in enumerate(pieces) if piece and automaton.alphabet.issuperset(piece)]
    numbers = {automaton.start: 0}
    queue = [automaton.start]
    allowed: list[np.ndarray] = []
    after: list[np.ndarray] = []
    for state in queue:  # grows while it is read
        permitted, nexts = np.zeros(len(pieces), bool), np.zeros(len(pieces), np.int32)
        for token, piece in usable:
            reached: Hashable | None = state
            for c in piece:
                reached = automaton.step(reached, c)
                if reached is None:
                    break
            else:
                if reached not in numbers:
                    numbers[reached] = len(numbers)
                    queue.append(reached)
                permitted[token], nexts[token] = True, numbers[reached]
        if automaton.accepts(state):
            permitted[list(stops)] = True
        if not permitted.any():
            raise UserError(
                f"the constraint allows no token of this tokenizer after {state!r}; loosen it, or name a stop token"
            )
        allowed.append(permitted)
        after.append(nexts)
    return Constraint(jnp.asarray(np.stack(allowed)), jnp.asarray(np.stack(after)))
