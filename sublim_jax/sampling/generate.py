"""Prompts in, samples out: which row enters which slot, and when it is done."""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, SupportsIndex, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from sublim_jax import signals
from sublim_jax.data import chat
from sublim_jax.errors import Interrupted, UserError
from sublim_jax.keys import fold_each
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.sampling.checks import Behind, Texts, Tokens, apart, check_growth, texts_of, tokens_of, whole_number
from sublim_jax.sampling.constraints import Constraint
from sublim_jax.sampling.engine import DEVICES, NAN, Drawn, Engine, Fixed, Prompts, compiled, fitted, place, suited
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.sharding import named, place_key, put

CHUNK = 16  # tokens of a prompt computed together
# The cache's length is a multiple of it. XLA on CPUs then adds up a row's keys in the same order whatever the length,
# so that a longer prompt elsewhere changes no bit.
LENGTHS = 64


class Sample(NamedTuple):
    """One row's completion.

    Attributes:
      prompt, sample, adapter: whose it is: the prompt's number, which of its samples, under which adapter.
      tokens: without the stop token.
      logprobs: of the tokens under the model itself (temperature 1, nothing cut), in nats; the stop token's too.
      finish: "stop" (a stop token or string), "length", or "nan" (logits were no numbers; what came before stands).
      entropies, alternatives: at each of `logprobs`, where asked for: nats; {token: log-probability}.
    """

    prompt: int
    sample: int
    adapter: int
    tokens: list[int]
    text: str
    logprobs: list[float]
    finish: str
    entropies: list[float] | None = None
    alternatives: list[dict[int, float]] | None = None

    @property
    def row(self) -> tuple[int, int, int]:
        return self.adapter, self.prompt, self.sample


class Slots(TypedDict, total=False):
    """How rows are decoded, and not what is written: see `stream`."""

    slots: SupportsIndex
    steps: SupportsIndex
    chunk: SupportsIndex
    lanes: SupportsIndex


class Options(Slots, Behind, total=False):
    """How prompts are answered, beside how often and at which length: see `stream`."""

    sampler: Sampler
    stop_tokens: Tokens | None
    stop_strings: Sequence[str]
    constraint: Constraint | None
    entropy: bool
    alternatives: SupportsIndex


def generate(
    model: Model,
    prompts: Texts,
    key: Key[Array, ""],
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
    options = {name: value for name, value in locals().items() if name not in ("model", "prompts", "key")}
    found = sorted(stream(model, prompts, key, **options), key=lambda sample: sample.row)
    if broken := [f"prompt {s.prompt}" for s in found if s.finish == "nan"]:
        raise UserError(f"logits of {', '.join(broken[:5])} are no numbers; look at the weights, or take a wider dtype")
    return found


def stream(
    model: Model,
    prompts: Texts,
    key: Key[Array, ""],
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
    done: Collection[tuple[int, int, int]] = (),
) -> Iterator[Sample]:
    """Samples as they are finished.

    A row's draws depend on `key`, the number of its prompt and of its sample alone; adapters share them, so that they
    can be compared draw by draw. What rides beside a row, the number of devices and an interruption change no bit;
    `slots`, `chunk` and `lanes` change shapes, and with them the rounding.

    Args:
      model: of `weights.load`; with `lora` in its settings where there are adapters.
      prompts: tokens of each, without the prefix.
      max_new_tokens: for all prompts, or for each.
      samples: of each prompt.
      stop_tokens: those of the model's tokenizer and config where left out.
      stop_strings: a completion ends before the first of them.
      prefix: tokens in front of every prompt (a system prompt, examples), computed once and kept once.
      constraint: what a completion may be; see `constraints.over_tokens`.
      adapters: stacked LoRA trees, one completion of every prompt for each.
      entropy, alternatives: return the entropy, and so many of the most probable tokens, at each position.
      slots: rows decoded together, for each device and adapter; 0: as many as suit the devices (`engine.fitted`).
      steps: tokens drawn between two looks of the host.
      chunk: tokens of a prompt that are computed together.
      lanes: prompts that enter together, for each device and adapter; 0: an eighth of the slots.
      mesh: rows are split over `replica` and `fsdp`, layers over `tensor`; the model's where left out.
      done: rows (adapter, prompt, sample) that are not wanted any more.

    Raises:
      UserError: a prompt is empty, has tokens that the model does not have, or does not fit the model's positions; a
        number is too small; a stop string that the tokenizer cannot write. Before anything is computed.
      Interrupted: on SIGTERM or Ctrl-C, between two looks.
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
    limits = _limits(max_new_tokens, len(prompts))
    check(model, prompts, limits, stop_strings, prefix)
    prompts, prefix = apart(model.settings, texts_of(model.settings, prompts, "prompt"), prefix)
    stacked = 1 if adapters is None else jax.tree.leaves(adapters)[0].shape[0]
    rows = [
        (adapter, prompt, sample)
        for adapter in range(stacked)
        for prompt in range(len(prompts))
        for sample in range(samples)
    ]
    waiting = set(rows) - set(done)
    if not waiting:
        return
    need = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
    engine = suited(
        Engine(
            model.network,
            model.settings,
            mesh,
            sampler,
            max(slots, 1),
            1,
            chunk,
            cache_length(need, chunk),
            steps,
            stops,
            stacked,
            entropy,
            alternatives,
            model.params["embedding"].dtype,
        )
    )
    engine = engine.with_slots(slots) if slots else fitted(engine)
    engine = engine.with_lanes(lanes) if lanes else engine
    # The longest first: those that end late begin early, and prompts of like length enter together.
    order = sorted(waiting, key=lambda row: (-len(prompts[row[1]]) - limits[row[1]], row))
    queues = [deque(row for row in order if row[0] == adapter) for adapter in range(stacked)]
    key = place_key(key, named(mesh))
    fixed = place(Fixed(model.params, adapters, None, steering, constraint), mesh, engine.unstacked)
    run = compiled(engine)
    if prefix:
        fixed = fixed._replace(prefix=run.prefix(fixed, jnp.asarray([prefix])))
    state = run.start()
    riding: dict[Slot, _Row] = {}
    ahead: _Look | None = None
    longest = -(-max(len(prompt) for prompt in prompts) // chunk) * chunk
    with signals.deferred() as signal:
        # The next steps are on their way before the last ones are read, so that the device does not wait for the host:
        # a slot whose row has ended is refilled one look later.
        while any(queues) or riding:
            while (entering := _entering(engine, queues, riding, prompts)) is not None:
                given = _prompts(engine, entering, prompts, limits, key, longest)
                state = run.admit(fixed, state, given)
                riding |= {slot: _Row(*row) for slot, row in entering.items()}
            last, ahead = ahead, None
            if (left := max(_left(slot, row, limits, last) for slot, row in riding.items())) > 0:
                state, drawn = run.advance(fixed, state, jnp.int32(min(steps, left)))
                ahead = _Look(drawn, dict(riding), min(steps, left))
            if last:
                for slot, sample in _read(last, limits, stops, stop_strings, model.tokenizer.decode):
                    del riding[slot]
                    yield sample
            if signal.requested():
                raise Interrupted(f"stopped by {signal.heard} with {len(riding) + sum(map(len, queues))} rows to go")


Slot = tuple[int, int, int]  # (device, adapter, slot)


class _Row:
    """What a slot's row has got so far."""

    def __init__(self, adapter: int, prompt: int, sample: int):
        self.adapter, self.prompt, self.sample = adapter, prompt, sample
        self.ended = False
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.entropies: list[float] = []
        self.alternatives: list[dict[int, float]] = []

    def finished(self, tokens: list[int], text: str, finish: str) -> Sample:
        self.ended = True
        return Sample(
            self.prompt,
            self.sample,
            self.adapter,
            tokens,
            text,
            self.logprobs,
            finish,
            self.entropies or None,
            self.alternatives or None,
        )


class _Look(NamedTuple):
    """Steps that are on their way, and the rows that ride."""

    drawn: Drawn
    riding: dict[Slot, _Row]
    steps: int


def _left(slot: Slot, row: _Row, limits: list[int], last: _Look | None) -> int:
    """How many tokens a row may still get, beside those that are on their way."""
    coming = last.steps if last and last.riding.get(slot) is row else 0
    return limits[row.prompt] - len(row.logprobs) - coming


def check(model: Model, prompts: Texts, limits: Sequence[int], stop_strings: Sequence[str], prefix: Tokens) -> None:
    """Raises UserError for what cannot be sampled."""
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
    """How many tokens each prompt may get."""
    given = max_new_tokens.tolist() if isinstance(max_new_tokens, np.ndarray) else max_new_tokens
    if isinstance(given, Sequence):
        return [whole_number(limit, f"prompt {number}: max_new_tokens") for number, limit in enumerate(given)]
    return [whole_number(given, "max_new_tokens")] * count


def _alternatives(model: Model, count: SupportsIndex) -> int:
    if (found := whole_number(count, "alternatives", 0)) > model.settings.vocab:
        raise UserError(f"alternatives={found}: the model's vocabulary has {model.settings.vocab} tokens")
    return found


def _check_constraint(model: Model, constraint: Constraint | None) -> None:
    if constraint is not None and constraint.allowed.shape[1] != model.settings.vocab:
        raise UserError(
            f"the constraint is over {constraint.allowed.shape[1]} tokens, and the model's vocabulary has "
            f"{model.settings.vocab}; make it of `data.chat.pieces(tokenizer, settings.vocab)`"
        )


def cache_length(tokens: int, chunk: int = CHUNK) -> int:
    """Columns of a cache for so many tokens of a row."""
    unit = math.lcm(LENGTHS, chunk)
    return -(-tokens // unit) * unit


def _entering(
    engine: Engine,
    queues: list[deque[tuple[int, int, int]]],
    riding: dict[Slot, _Row],
    prompts: Sequence[Sequence[int]],
) -> dict[Slot, tuple[int, int, int]] | None:
    """Rows for free slots, {(device, adapter, slot): row}; None while it does not pay to stop for them.

    It pays where all lanes of a device are used, or where nothing else is left to wait for.
    """
    entering = {}
    pays = False
    for device in range(engine.devices):
        for adapter, queue in enumerate(queues):
            free = [s for s in range(engine.slots) if (device, adapter, s) not in riding][: engine.lanes]
            pays |= len(free) >= min(engine.lanes, len(queue)) > 0
            for slot in free:
                if queue:
                    entering[device, adapter, slot] = queue.popleft()
    if pays:
        return entering
    for (_, adapter, _), row in reversed(entering.items()):
        queues[adapter].appendleft(row)
    return None


def _prompts(
    engine: Engine,
    entering: dict[Slot, tuple[int, int, int]],
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    key: Key[Array, ""],
    longest: int,
) -> Prompts:
    shape = (engine.devices, engine.adapters, engine.lanes)
    tokens = np.zeros((*shape, longest), np.int32)
    length, limit = np.ones(shape, np.int32), np.ones(shape, np.int32)
    slot = np.full(shape, engine.slots, np.int32)
    numbers = [np.zeros(shape, np.int32) for _ in range(2)]
    filled: dict[tuple[int, int], int] = {}
    for (device, adapter, free), (_, prompt, sample) in entering.items():
        lane = filled.get((device, adapter), 0)
        filled[device, adapter] = lane + 1
        at = (device, adapter, lane)
        tokens[at][: len(prompts[prompt])] = prompts[prompt]
        length[at], limit[at], slot[at] = len(prompts[prompt]), limits[prompt], free
        numbers[0][at], numbers[1][at] = prompt, sample
    split = named(engine.mesh, DEVICES)
    keys = _row_keys(key, *put(numbers, split))
    arrays = put((tokens, length, slot, limit), split)
    return Prompts(arrays[0], arrays[1], arrays[2], arrays[3], keys)


@jax.jit
def _row_keys(key: Key[Array, ""], prompt: Array, sample: Array) -> Key[Array, "..."]:
    return fold_each(fold_each(jnp.broadcast_to(key, prompt.shape), prompt), sample)


def _read(
    look: _Look,
    limits: Sequence[int],
    stops: tuple[int, ...],
    stop_strings: Sequence[str],
    decode: Callable[..., str],
) -> Iterator[tuple[Slot, Sample]]:
    """Adds some steps to the rows, and gives those that are done."""
    drawn = jax.device_get(look.drawn)
    for (device, adapter, slot), row in look.riding.items():
        for step in range(0 if row.ended else look.steps):
            at = (device, step, adapter, slot)
            token = int(drawn.token[at])
            if token == -1:
                break
            finish = "nan" if token == NAN else "stop" if token in stops else ""
            if token != NAN:
                row.logprobs.append(float(drawn.logprob[at]))
                if drawn.entropy is not None:
                    row.entropies.append(float(drawn.entropy[at]))
                if drawn.alternatives is not None:
                    values = (np.asarray(part[at]).tolist() for part in drawn.alternatives)
                    row.alternatives.append(dict(zip(*values)))
            if not finish:
                row.tokens.append(token)
                finish = "length" if len(row.logprobs) == limits[row.prompt] else ""
            text = ""
            if finish or stop_strings:
                text = decode(row.tokens, skip_special_tokens=True)
            cut = min((text.find(string) for string in stop_strings if string in text), default=-1)
            if cut >= 0:
                text, finish = text[:cut], "stop"
            if finish:
                yield (device, adapter, slot), row.finished(row.tokens, text, finish)
                break
