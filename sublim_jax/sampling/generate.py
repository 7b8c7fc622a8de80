"""Prompts in, samples out."""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import SupportsIndex, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from sublim_jax.data import chat
from sublim_jax.errors import UserError
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.sampling.capacity import fitted, suited
from sublim_jax.sampling.checks import (
    Behind,
    Texts,
    Tokens,
    apart,
    check_finite,
    check_growth,
    check_steering,
    texts_of,
    tokens_of,
    whole_number,
)
from sublim_jax.sampling.constraints import Constraint
from sublim_jax.sampling.engine import Engine, Fixed, compiled, place
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.sampling.scheduler import Requests, RowId, Sample, completions

CHUNK = 16  # tokens of a prompt computed together
# The cache's length is a multiple of it. XLA on CPUs then adds up a row's keys in the same order whatever the length,
# so that a longer prompt elsewhere changes no bit.
LENGTHS = 64


class Slots(TypedDict, total=False):
    """Options of how rows are decoded, not of what is sampled: see `stream`."""

    slots: SupportsIndex
    steps: SupportsIndex
    chunk: SupportsIndex
    lanes: SupportsIndex


class Options(Slots, Behind, total=False):
    """Options of sampling, without the number of samples and their length: see `stream`."""

    sampler: Sampler
    stop_tokens: Tokens | None
    stop_strings: Sequence[str]
    constraint: Constraint | None
    entropy: bool
    alternatives: SupportsIndex


def generate(
    model: Model,
    prompts: Texts,
    key: Key[Array, "*adapters"],
    *,
    sampler: Sampler = Sampler(),  # noqa: B008
    max_new_tokens: SupportsIndex | Tokens = 64,
    samples: SupportsIndex = 1,
    stop_tokens: Tokens | None = None,
    stop_strings: Sequence[str] = (),
    prefix: Tokens = (),
    constraint: Constraint | None = None,
    adapters: Params | None = None,
    steering: Steering | None = None,
    entropy: bool = False,
    alternatives: SupportsIndex = 0,
    slots: SupportsIndex = 64,
    steps: SupportsIndex = 4,
    chunk: SupportsIndex = CHUNK,
    lanes: SupportsIndex = 0,
    mesh: Mesh | None = None,
) -> list[Sample]:
    """All samples of `stream`, which explains the arguments, in order of adapter, prompt and sample.

    Raises UserError, after all rows are done, where a row's logits were no numbers.
    """
    rows = stream(
        model,
        prompts,
        key,
        sampler=sampler,
        max_new_tokens=max_new_tokens,
        samples=samples,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        prefix=prefix,
        constraint=constraint,
        adapters=adapters,
        steering=steering,
        entropy=entropy,
        alternatives=alternatives,
        slots=slots,
        steps=steps,
        chunk=chunk,
        lanes=lanes,
        mesh=mesh,
    )
    completed = sorted(rows, key=lambda sample: sample.row)
    check_finite((sample.prompt, sample.finish) for sample in completed)
    return completed


def stream(
    model: Model,
    prompts: Texts,
    key: Key[Array, "*adapters"],
    *,
    sampler: Sampler = Sampler(),  # noqa: B008
    max_new_tokens: SupportsIndex | Tokens = 64,
    samples: SupportsIndex = 1,
    stop_tokens: Tokens | None = None,
    stop_strings: Sequence[str] = (),
    prefix: Tokens = (),
    constraint: Constraint | None = None,
    adapters: Params | None = None,
    steering: Steering | None = None,
    entropy: bool = False,
    alternatives: SupportsIndex = 0,
    slots: SupportsIndex = 64,
    steps: SupportsIndex = 4,
    chunk: SupportsIndex = CHUNK,
    lanes: SupportsIndex = 0,
    mesh: Mesh | None = None,
    done: Collection[RowId] = (),
) -> Iterator[Sample]:
    """Samples as they are finished.

    A row's draws depend only on its key, the number of its prompt and the number of its sample; adapters of one key
    share them, so that they can be compared draw by draw. Other rows, the number of devices and an interruption change
    no bit; `slots`, `chunk` and `lanes` change shapes, and with them the rounding.

    Args:
      model: of `weights.load`; `adapted` where there are adapters. Without them, it is sampled as it is.
      prompts: tokens of each, without the prefix.
      key: one for all adapters, or one for each.
      max_new_tokens: for all prompts, or for each.
      samples: of each prompt.
      stop_tokens: those of the model's tokenizer and config where left out.
      stop_strings: a completion ends before the first of them.
      prefix: tokens in front of every prompt (a system prompt, examples), computed once and kept once.
      constraint: which completions are allowed; see `constraints.over_tokens`.
      adapters: stacked LoRA trees, one completion of every prompt for each.
      entropy, alternatives: return the entropy, and this many of the most probable tokens, at each position.
      slots: rows decoded together, for each device and adapter; 0: as many as suit the devices (`capacity.fitted`).
      steps: tokens of a row between two synchronisations with the host.
      chunk: tokens of a prompt that are computed together.
      lanes: prompts that are admitted together, for each device and adapter; 0: an eighth of the slots.
      mesh: rows are split over `replica` and `fsdp`, layers over `tensor`; the model's where left out.
      done: rows (adapter, prompt, sample) that are finished already, and left out.

    Raises:
      UserError: a prompt is empty, has tokens that the model does not have, or does not fit the model's positions; a
        number is too small; a stop string that the tokenizer cannot write; there are neither one key nor one for each
        adapter. Before anything is computed.
      Interrupted: on SIGTERM or Ctrl-C, at a synchronisation with the host.
    """
    mesh = mesh or model.decoding or model.mesh
    if stop_tokens is None:
        stops = tuple(chat.stop_tokens(model.tokenizer, model.config))
    else:
        stops = tuple(tokens_of(model.settings, stop_tokens, "stop_tokens"))
    samples, steps, chunk = map(whole_number, (samples, steps, chunk), ("samples", "steps", "chunk"))
    slots, lanes = (whole_number(value, name, 0) for value, name in ((slots, "slots"), (lanes, "lanes")))
    alternatives = _alternatives(model, alternatives)
    _check_constraint(model, constraint)
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    limits = _limits(max_new_tokens, len(prompts))
    check(model, prompts, limits, stop_strings, prefix)
    prompts, prefix = apart(model.settings, texts_of(model.settings, prompts, "prompt"), prefix)
    check_steering(model.settings, steering)
    model, stacked = model.for_adapters(adapters)
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise UserError(f"the key is a {type(key).__name__}; make one by jax.random.key(0)")
    if key.shape not in ((), (stacked,)):
        raise UserError(f"{key.size} keys and {stacked} adapters; give one key, or one for each adapter")
    rows = set(itertools.product(range(stacked), range(len(prompts)), range(samples))) - set(done)
    if not rows:
        return
    engine = suited(
        Engine(
            network=model.network,
            settings=model.settings,
            mesh=mesh,
            sampler=sampler,
            slots=max(slots, 1),
            lanes=1,
            chunk=chunk,
            length=cache_length(max(len(prompt) + limit for prompt, limit in zip(prompts, limits)), chunk),
            steps=steps,
            stops=stops,
            adapters=stacked,
            entropy=entropy,
            alternatives=alternatives,
            dtype=model.params["embedding"].dtype,
        )
    )
    engine = engine.with_slots(slots) if slots else fitted(engine)
    engine = engine.with_lanes(lanes) if lanes else engine
    fixed = place(Fixed(model.params, adapters, None, steering, constraint), mesh, engine.unstacked)
    if prefix:
        fixed = fixed._replace(prefix=compiled(engine).prefix(fixed, jnp.asarray([prefix])))
    requests = Requests(prompts, limits, stop_strings, model.tokenizer.decode)
    yield from completions(engine, fixed, requests, rows, key)


def check(model: Model, prompts: Texts, limits: Sequence[int], stop_strings: Sequence[str], prefix: Tokens) -> None:
    """Raises UserError for arguments that cannot be sampled from."""
    longest = getattr(model.config, "max_position_embeddings", None) or model.settings.positions
    before = len(tokens_of(model.settings, prefix, "the prefix"))
    if len(limits) != len(prompts):
        raise UserError(f"{len(prompts)} prompts and max_new_tokens of {len(limits)}; give one number, or one for each")
    for number, (prompt, limit) in enumerate(zip(texts_of(model.settings, prompts, "prompt"), limits)):
        length = before + len(prompt)
        if longest and length + limit > longest:
            raise UserError(
                f"prompt {number} has {length} tokens and may get {limit} more, but the model's context is {longest}; "
                "shorten it, or lower max_new_tokens"
            )
        check_growth(model.settings, length, limit, f"prompt {number}")
    for string in stop_strings:
        written = model.tokenizer.decode(
            model.tokenizer(string, add_special_tokens=False)["input_ids"], skip_special_tokens=True
        )
        if not string or string not in written:
            raise UserError(f"stop string {string!r} can never be reached: the tokenizer writes it as {written!r}")


def _limits(max_new_tokens: SupportsIndex | Tokens, count: int) -> list[int]:
    """The maximum number of new tokens of each prompt."""
    given = max_new_tokens.tolist() if isinstance(max_new_tokens, np.ndarray) else max_new_tokens
    if isinstance(given, Sequence):
        return [whole_number(limit, f"prompt {number}: max_new_tokens") for number, limit in enumerate(given)]
    return [whole_number(given, "max_new_tokens")] * count


def _alternatives(model: Model, count: SupportsIndex) -> int:
    if (number := whole_number(count, "alternatives", 0)) > model.settings.vocab:
        raise UserError(f"alternatives={number}: the model's vocabulary has {model.settings.vocab} tokens")
    return number


def _check_constraint(model: Model, constraint: Constraint | None) -> None:
    if constraint is not None and not isinstance(constraint, Constraint):
        raise UserError(f"the constraint is a {type(constraint).__name__}; make one by constraints.over_tokens")
    if constraint is not None and constraint.allowed.shape[1] != model.settings.vocab:
        raise UserError(
            f"the constraint is over {constraint.allowed.shape[1]} tokens, and the model's vocabulary has "
            f"{model.settings.vocab}; make it of `data.chat.pieces(tokenizer, settings.vocab)`"
        )


def cache_length(tokens: int, chunk: int = CHUNK) -> int:
    """Columns of a cache that has room for so many tokens of a row."""
    unit = math.lcm(LENGTHS, chunk)
    return -(-tokens // unit) * unit
