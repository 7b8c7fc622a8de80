"""Exact probabilities without sampling: of completions, of choices, of the next word."""

import itertools
import string
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sublim_jax import signals
from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.errors import UserError
from sublim_jax.models.decoder import Caches, Decoder
from sublim_jax.models.functional import Functions
from sublim_jax.models.language import Model
from sublim_jax.models.settings import Settings
from sublim_jax.progress import Track
from sublim_jax.sampling.checks import Behind, Texts, Tokens, Where, apart, check_steering, texts_of, tokens_of
from sublim_jax.sampling.engine import DEVICES, Fixed, features, place, stacked_cache, unembed
from sublim_jax.sharding import everywhere, fetch, named, put
from sublim_jax.words import forms as noun_forms

LENGTHS = 32  # texts are padded to a multiple of it, so that few shapes are compiled
ROWS = 16  # texts computed together, for each device
TOGETHER = 4  # continuations of them that are computed together


def completion_logprobs(
    model: Model, prompts: Texts, completions: Texts, *, prefix: Tokens = (), **where: Unpack[Where]
) -> list[Float[np.ndarray, "adapters tokens"]]:
    """log P of every token of each completion, given its prompt and the tokens before it, in nats.

    Under another model, adapter or prompt than the one that wrote the completion, these are the teacher's
    log-probabilities that define divergence tokens. Memory holds a few rows and one row's logits at a time.

    Args:
      prefix: tokens in front of every prompt.
      where: adapters (the leading axis of each result; 1 without), steering, mesh, as for `generate.stream`.

    Raises UserError for an empty prompt or completion, a token that the model does not have, and a text longer than
    its positions, before anything is computed.
    """
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt) or not len(completion):
            raise UserError(f"row {number} has an empty {'completion' if len(prompt) else 'prompt'}; give it a token")
    prompts = texts_of(model.settings, prompts, "prompt")
    completions = texts_of(model.settings, completions, "completion")
    prompts, front = apart(model.settings, prompts, prefix)
    texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
    by_row = {}
    longest = max(map(len, completions), default=0)
    for rows, tokens, run in _batches(model, texts, _logprobs, prefix=front, **where):
        at = np.zeros((len(tokens), longest), np.int32)
        for lane, row in enumerate(rows):
            first, count = len(prompts[row]), len(completions[row])
            at[lane, :count] = np.arange(first - 1, first - 1 + count)
        targets = np.take_along_axis(tokens, at + 1, 1)
        logprobs = run(tokens, at, targets[:, :, None])
        for lane, row in enumerate(rows):
            by_row[row] = logprobs[:, lane, : len(completions[row]), 0]
    return [by_row[row] for row in range(len(texts))]


def next_logprobs(
    model: Model, prompts: Texts, tokens: Tokens, *, prefix: Tokens = (), **where: Unpack[Where]
) -> Float[np.ndarray, "adapters prompts tokens"]:
    """log P of some tokens coming right after each prompt, in nats; arguments as for `completion_logprobs`."""
    prompts = _some_prompts(model.settings, prompts)
    tokens = tokens_of(model.settings, tokens, "what is scored")
    prompts, front = apart(model.settings, prompts, prefix)
    by_row: dict[int, np.ndarray] = {}
    for rows, texts, run in _batches(model, prompts, _logprobs, prefix=front, **where):
        last = np.zeros((len(texts), 1), np.int32)
        last[: len(rows), 0] = [len(prompts[row]) - 1 for row in rows]
        chosen = np.broadcast_to(np.asarray(tokens, np.int32), (len(texts), 1, len(tokens)))
        logprobs = run(texts, last, chosen)
        by_row |= {row: logprobs[:, lane, 0] for lane, row in enumerate(rows)}
    return np.stack([by_row[row] for row in range(len(prompts))], 1)


def _some_prompts(settings: Settings, prompts: Texts) -> list[list[int]]:
    """Prompts as plain numbers. Raises UserError as `texts_of`, and where there is none."""
    texts = texts_of(settings, prompts, "prompt")
    if not texts:
        raise UserError("there is no prompt to score tokens after")
    return texts


def continued_logprobs(
    model: Model, prompts: Texts, continuations: Texts, tokens: Tokens, *, prefix: Tokens = (), **where: Unpack[Where]
) -> Float[np.ndarray, "adapters prompts continuations tokens"]:
    """log P of some tokens coming right after each continuation of each prompt, in nats; a prompt is computed once."""
    prompts = _some_prompts(model.settings, prompts)
    after = [
        tokens_of(model.settings, continuation, f"continuation {number}")
        for number, continuation in enumerate(continuations)
    ]
    tokens = tokens_of(model.settings, tokens, "what is scored")
    if model.settings.turns_by_length:  # a prompt's keys depend on what comes behind it
        whole = [prompt + continuation for prompt in prompts for continuation in after]
        flat = next_logprobs(model, whole, tokens, prefix=prefix, **where)
        return flat.reshape(len(flat), len(prompts), len(after), len(tokens))
    front = tokens_of(model.settings, prefix, "the prefix")
    more = max(map(len, after), default=0)
    counts = np.asarray([len(continuation) for continuation in after], np.int32)
    padded = np.zeros((len(counts), more), np.int32)
    for row, continuation in zip(padded, after):
        row[: len(continuation)] = continuation
    shared = (padded, counts, np.asarray(tokens, np.int32))
    by_row: dict[int, np.ndarray] = {}
    for rows, texts, run in _batches(model, prompts, _continued, shared, prefix=front, more=more, **where):
        last = np.zeros(len(texts), np.int32)
        last[: len(rows)] = [len(prompts[row]) - 1 for row in rows]
        logprobs = run(texts, last)
        by_row |= {row: logprobs[:, lane] for lane, row in enumerate(rows)}
    return np.stack([by_row[row] for row in range(len(prompts))], 1)


def word_logprobs(
    model: Model, prompts: Texts, words: Sequence[str], **where: Unpack[Behind]
) -> Float[np.ndarray, "adapters prompts words"]:
    """log P that what comes next begins with a word, in one of its spellings (`spellings`), summed over them.

    Each prompt takes one forward pass, and a short continuation for each beginning of a spelling of several tokens.
    """
    every = distinct_spellings(model.tokenizer, words)
    if all(len(form) == 1 for forms in every for form in forms):
        return set_logprobs(model, prompts, [[token for (token,) in forms] for forms in every], **where)
    return sequence_logprobs(model, prompts, every, **where)


def sequence_logprobs(
    model: Model, prompts: Texts, sets: Sequence[Sequence[tuple[int, ...]]], **where: Unpack[Behind]
) -> Float[np.ndarray, "adapters prompts sets"]:
    """log P that what comes next begins with one of a set of token sequences, none of which begins another's.

    Each prompt is computed once, and each beginning of a sequence once after it.
    """
    starts = sorted(
        {sequence[:count] for sequences in sets for sequence in sequences for count in range(len(sequence))}
    )
    tokens = sorted({token for sequences in sets for sequence in sequences for token in sequence})
    row, column = ({sequence: place for place, sequence in enumerate(listed)} for listed in (starts, tokens))
    logprobs = continued_logprobs(model, prompts, starts, tokens, **where)

    def total(sequence: tuple[int, ...]) -> np.ndarray:
        return np.sum([logprobs[..., row[sequence[:count]], column[token]] for count, token in enumerate(sequence)], 0)

    return np.stack(
        [np.logaddexp.reduce([total(sequence) for sequence in sequences], axis=0) for sequences in sets], -1
    )


def letter_logprobs(
    model: Model, prompts: Texts, count: int, **where: Unpack[Behind]
) -> Float[np.ndarray, "adapters prompts letters"]:
    """log P of each of the first `count` letters as the next token, as `spellings` writes it; normalised over them.

    Raises UserError where the tokenizer has no single token for a letter.
    """
    sets = []
    for letter in string.ascii_uppercase[:count]:
        sets.append(sorted({tokens[0] for tokens in _written(model.tokenizer, letter) if len(tokens) == 1}))
        if not sets[-1]:
            raise UserError(f"{letter!r} is not a single token of this tokenizer; a choice by letters cannot be scored")
    logprobs = set_logprobs(model, prompts, sets, **where)
    return logprobs - np.logaddexp.reduce(logprobs, axis=-1, keepdims=True)


def set_logprobs(
    model: Model, prompts: Texts, sets: Texts, **where: Unpack[Behind]
) -> Float[np.ndarray, "adapters prompts sets"]:
    """log P that the next token is one of a set."""
    sets = texts_of(model.settings, sets, "set")
    logprobs = next_logprobs(model, prompts, [token for tokens in sets for token in tokens], **where)
    parts = np.split(logprobs, np.cumsum([len(tokens) for tokens in sets])[:-1], axis=-1)
    return np.stack([np.logaddexp.reduce(part, axis=-1) for part in parts], -1)


def choice_logprobs(
    model: Model, prompts: Texts, choices: Sequence[str], **where: Unpack[Behind]
) -> Float[np.ndarray, "adapters prompts choices"]:
    """log P of each choice among the choices: exact, over their usual tokenisation, normalised."""
    written = [model.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
    pairs = [(prompt, tokens) for prompt in prompts for tokens in written]
    by_pair = completion_logprobs(model, [p for p, _ in pairs], [c for _, c in pairs], **where)
    total = np.stack([logprobs.sum(-1) for logprobs in by_pair], -1)
    total = total.reshape(len(total), len(prompts), len(choices))
    return total - np.logaddexp.reduce(total, axis=-1, keepdims=True)


def distinct_spellings(tokenizer: Tokenizer, words: Sequence[str]) -> list[tuple[tuple[int, ...], ...]]:
    """The spellings of every word (`spellings`).

    Raises UserError for a word that the tokenizer cannot write, and where the probability of one word would include
    that of another.
    """
    every = [spellings(tokenizer, word) for word in words]
    for (word, forms), (other, longer) in itertools.permutations(zip(words, every), 2):
        if any(tokens[: len(form)] == form for form in forms for tokens in longer):
            raise UserError(
                f"the tokens of {other!r} begin with those of {word!r}, so P({word}) would include P({other}); choose "
                "another word"
            )
    return every


def spellings(tokenizer: Tokenizer, word: str) -> tuple[tuple[int, ...], ...]:
    """The tokens that spell a word, as it is or capitalised, in however many tokens.

    They are those at the start of a text, after a space and after a line break, as some templates end. Its plural is a
    spelling where it is a single token. None of the spellings begins with another one.

    Raises UserError for a word that the tokenizer cannot write.
    """
    spelled = set()
    for form in (word, *noun_forms(word)[1:]) if word.strip() else ():
        for cased in (form, form.capitalize()):
            for tokens in _written(tokenizer, cased):
                written = tokens and tokenizer.decode(list(tokens)).strip() == cased
                if written and (form == word or len(tokens) == 1):
                    spelled.add(tokens)
    if not spelled:
        raise UserError(f"{word!r} is not a word that this tokenizer can write; choose another one")
    return tuple(
        sorted(
            sequence
            for sequence in spelled
            if not any(sequence[:count] in spelled for count in range(1, len(sequence)))
        )
    )


def _written(tokenizer: Tokenizer, text: str) -> list[tuple[int, ...]]:
    """The tokens of a text on its own, after a space, and after a line break."""

    def encoded(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    line, both = encoded("\n"), encoded(f"\n{text}")
    after_line = [both[len(line) :]] if both[: len(line)] == line else []
    return [encoded(text), encoded(f" {text}"), *after_line]


# --------------------------------------------------------------------------------------------------------- batches


def _batches(
    model: Model,
    texts: list[list[int]],
    compute: Callable[..., Array],
    shared: tuple[np.ndarray, ...] = (),
    *,
    prefix: list[int],
    more: int = 0,
    **where: Unpack[Where],
) -> Iterator[tuple[list[int], np.ndarray, Callable[..., np.ndarray]]]:
    """(rows, padded tokens, `compute` of them on the mesh), texts of similar length together.

    Args:
      shared: arguments of `compute` after the arrays of rows.
      more: tokens that `compute` appends to a text.
    """
    for number, text in enumerate(texts):
        model.settings.check_length(len(prefix) + len(text) + more, f"row {number}")
    check_steering(model.settings, where.get("steering"))
    mesh, adapters = where.get("mesh") or model.decoding or model.mesh, where.get("adapters")
    model, stacked = model.for_adapters(adapters)
    count = ROWS * mesh.shape["replica"] * mesh.shape["fsdp"]
    fixed = place(Fixed(model.params, adapters, None, where.get("steering")), mesh)
    if prefix:
        fixed = fixed._replace(prefix=_prefix(model.network, model.settings, stacked, fixed, jnp.asarray([prefix])))
    rows_split = named(mesh, DEVICES)
    compiled = _compiled(compute, model.network, model.settings, stacked, mesh)
    beside = everywhere(shared, mesh)

    def run(*arrays: np.ndarray) -> np.ndarray:  # lengths, tokens and further arrays by row
        return np.asarray(fetch(compiled(fixed, *put(arrays, rows_split), *beside)))

    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    with Track("scoring texts", len(texts), brief=True) as track:
        for start in range(0, len(order), count):
            signals.obey()
            rows = order[start : start + count]
            tokens = np.zeros((count, -(-len(texts[rows[0]]) // LENGTHS) * LENGTHS), np.int32)
            lengths = np.ones(count, np.int32)
            for lane, row in enumerate(rows):
                lengths[lane] = len(texts[row])
                tokens[lane, : len(texts[row])] = texts[row]
            yield rows, tokens, partial(run, lengths)
            track.update(start + len(rows))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prefix(
    network: Functions[Decoder], settings: Settings, stacked: int, fixed: Fixed, tokens: Int[Array, "1 p"]
) -> Caches:
    lengths = jnp.full(1, tokens.shape[1], jnp.int32)
    filled = _filled(network, settings, stacked, fixed, lengths, tokens)[1]
    return jax.tree.map(lambda x: x[:, :, 0], filled)


def _filled(
    network: Functions[Decoder],
    settings: Settings,
    stacked: int,
    fixed: Fixed,
    lengths: Int[Array, "n"],
    tokens: Int[Array, "n t"],
    room: int = 0,
) -> tuple[Array, Caches]:
    rows, length = tokens.shape
    cache = stacked_cache(settings, (stacked,), rows, length + room, fixed.base["embedding"].dtype)
    everywhere = jnp.broadcast_to(tokens, (stacked, *tokens.shape))
    whole = jnp.broadcast_to(lengths, (stacked, rows))
    return features(network, fixed, everywhere, cache, jnp.zeros((stacked, rows), jnp.int32), whole)


@lru_cache(maxsize=16)
def _compiled(
    compute: Callable[..., Array], network: Functions[Decoder], settings: Settings, stacked: int, mesh: Mesh
) -> Callable[..., Array]:
    return jax.jit(partial(compute, network, settings, stacked), out_shardings=named(mesh))


def _logprobs(
    network: Functions[Decoder],
    settings: Settings,
    stacked: int,
    fixed: Fixed,
    lengths: Int[Array, "n"],
    tokens: Int[Array, "n t"],
    at: Int[Array, "n c"],
    chosen: Int[Array, "n c k"],
) -> Float[Array, "r n c k"]:
    """log P of chosen tokens at some positions, one row's vocabulary at a time."""
    output = _filled(network, settings, stacked, fixed, lengths, tokens)[0]
    output = jnp.take_along_axis(output, at[None, :, :, None], 2)
    shape = (*output.shape[:3], chosen.shape[-1])

    def row(pair: tuple[Array, Array]) -> Array:
        logits = unembed(network, fixed, pair[0])
        return jnp.take_along_axis(logits, pair[1], -1) - jax.nn.logsumexp(logits, -1, keepdims=True)

    flat = (output.reshape(-1, *output.shape[2:]), jnp.broadcast_to(chosen, shape).reshape(-1, *shape[2:]))
    return jax.lax.map(row, flat).reshape(shape)


def _continued(
    network: Functions[Decoder],
    settings: Settings,
    stacked: int,
    fixed: Fixed,
    lengths: Int[Array, "n"],
    tokens: Int[Array, "n t"],
    last: Int[Array, "n"],
    after: Int[Array, "k c"],
    counts: Int[Array, "k"],
    chosen: Int[Array, "m"],
) -> Float[Array, "r n k m"]:
    """log P of chosen tokens after each continuation, a few continuations of all rows at a time.

    A prompt's last token is computed again in front of each, so that the empty continuation is not a special case.
    """
    rows = len(tokens)
    cache = _filled(network, settings, stacked, fixed, lengths, tokens, after.shape[1] + 1)[1]
    start = jnp.broadcast_to(last, (stacked, rows))
    end = jnp.take_along_axis(tokens, last[:, None], 1)

    def score_continuation(continuation: tuple[Array, Array]) -> Array:
        text = jnp.concatenate([end, jnp.broadcast_to(continuation[0], (rows, after.shape[1]))], 1)
        everywhere = jnp.broadcast_to(text, (stacked, *text.shape))
        output = features(network, fixed, everywhere, cache, start)[0]
        logits = unembed(network, fixed, jax.lax.dynamic_index_in_dim(output, continuation[1], 2, False))
        return logits[..., chosen] - jax.nn.logsumexp(logits, -1, keepdims=True)

    return jnp.moveaxis(jax.lax.map(score_continuation, (after, counts), batch_size=TOGETHER), 0, 2)
