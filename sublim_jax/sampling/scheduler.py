"""Assigns rows to slots, and returns them when they are finished."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from sublim_jax import signals
from sublim_jax.errors import Interrupted
from sublim_jax.keys import fold_elementwise
from sublim_jax.sampling.engine import DEVICES, NAN, Engine, Fixed, Generated, Prompts, compiled
from sublim_jax.sharding import named, place_key, put

RowId = tuple[int, int, int]  # (adapter, prompt, sample)
Slot = tuple[int, int, int]  # (device, adapter, slot)


class Sample(NamedTuple):
    """One row's completion.

    Attributes:
      prompt, sample, adapter: the numbers of its prompt, of the sample of that prompt, and of the adapter.
      tokens: without the stop token; those of a stop string are there, although `text` ends before it.
      logprobs: of the tokens under the model itself (temperature 1, nothing cut), in nats; the stop token's too.
      finish: "stop" (a stop token or string), "length", or "nan" (logits were not finite; earlier tokens are kept).
      entropies, alternatives: for each of `logprobs`, where requested: in nats; {token: log-probability}.
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
    def row(self) -> RowId:
        return self.adapter, self.prompt, self.sample


class Requests(NamedTuple):
    """The prompts of rows, and where their completions end.

    Attributes:
      prompts: tokens of each, none of them empty.
      limits: tokens that a completion of each prompt may have.
      stop_strings: a completion ends before the first of them.
      decode: tokens to text, as the tokenizer's.
    """

    prompts: Sequence[Sequence[int]]
    limits: Sequence[int]
    stop_strings: Sequence[str]
    decode: Callable[..., str]


def completions(
    engine: Engine, fixed: Fixed, requests: Requests, rows: Collection[RowId], key: Key[Array, "*adapters"]
) -> Iterator[Sample]:
    """The rows' samples as they are finished.

    Args:
      fixed: on the engine's mesh.
      rows: those to sample.
      key: a row's draws depend only on it, or on its adapter's, and on the numbers of its prompt and sample.

    Raises Interrupted on SIGTERM or Ctrl-C, at a synchronisation with the host.
    """
    run = compiled(engine)
    state = run.start()
    key = place_key(key, named(engine.mesh))
    queues = _queues(rows, requests, engine.adapters)
    riding: dict[Slot, _Row] = {}
    ahead: _Look | None = None
    longest = -(-max(map(len, requests.prompts)) // engine.chunk) * engine.chunk
    with signals.deferred() as signal:
        # The next steps are dispatched before the last ones are read, so that the device does not wait for the host: a
        # slot whose row has ended is refilled one dispatch later.
        while any(queues) or riding:
            while (entering := _entering(engine, queues, riding)) is not None:
                state = run.admit(fixed, state, _prompts(engine, entering, requests, key, longest))
                riding |= {slot: _Row(*row) for slot, row in entering.items()}
            last, ahead = ahead, None
            if (left := max(_left(slot, row, requests.limits, last) for slot, row in riding.items())) > 0:
                steps = min(engine.steps, left)
                state, generated = run.advance(fixed, state, jnp.int32(steps))
                ahead = _Look(generated, dict(riding), steps)
            if last:
                for slot, sample in _read(last, requests, engine.stops):
                    del riding[slot]
                    yield sample
            if signal.requested():
                raise Interrupted(f"stopped by {signal.heard} with {len(riding) + sum(map(len, queues))} rows to go")


def _queues(rows: Collection[RowId], requests: Requests, adapters: int) -> list[deque[RowId]]:
    """Each adapter's rows.

    The longest first: those that end late start early, and prompts of similar length are admitted together.
    """
    order = sorted(rows, key=lambda row: (-len(requests.prompts[row[1]]) - requests.limits[row[1]], row))
    return [deque(row for row in order if row[0] == adapter) for adapter in range(adapters)]


class _Row:
    """The completion of a slot's row so far."""

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
    """Dispatched steps, and the rows in the slots."""

    generated: Generated
    riding: dict[Slot, _Row]
    steps: int


def _left(slot: Slot, row: _Row, limits: Sequence[int], last: _Look | None) -> int:
    """How many more tokens a row may get, beside those that are dispatched."""
    coming = last.steps if last and last.riding.get(slot) is row else 0
    return limits[row.prompt] - len(row.logprobs) - coming


def _entering(engine: Engine, queues: list[deque[RowId]], riding: dict[Slot, _Row]) -> dict[Slot, RowId] | None:
    """Rows for free slots, {(device, adapter, slot): row}; None while it does not pay to admit them.

    It pays once free slots use all lanes of a device, or take all rows that are left of a queue.
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
    engine: Engine, entering: dict[Slot, RowId], requests: Requests, key: Key[Array, "*adapters"], longest: int
) -> Prompts:
    """The rows that enter, as arrays on the mesh.

    Args:
      longest: columns for a prompt.
    """
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
        given = requests.prompts[prompt]
        tokens[at][: len(given)] = given
        length[at], limit[at], slot[at] = len(given), requests.limits[prompt], free
        numbers[0][at], numbers[1][at] = prompt, sample
    split = named(engine.mesh, DEVICES)
    keys = _row_keys(key, *put(numbers, split))
    arrays = put((tokens, length, slot, limit), split)
    return Prompts(arrays[0], arrays[1], arrays[2], arrays[3], keys)


@jax.jit
def _row_keys(key: Key[Array, "*adapters"], prompt: Array, sample: Array) -> Key[Array, "..."]:
    by_adapter = jnp.broadcast_to(key.reshape(-1, 1), prompt.shape)  # devices, adapters, lanes
    return fold_elementwise(fold_elementwise(by_adapter, prompt), sample)


def _read(look: _Look, requests: Requests, stops: tuple[int, ...]) -> Iterator[tuple[Slot, Sample]]:
    """Adds the tokens of some steps to their rows, and yields the finished ones."""
    generated = jax.device_get(look.generated)
    every_token, every_logprob = generated.token.tolist(), generated.logprob.tolist()  # arrays are read more slowly
    for (device, adapter, slot), row in look.riding.items():
        for step in range(0 if row.ended else look.steps):
            at = (device, step, adapter, slot)
            token = every_token[device][step][adapter][slot]
            if token == -1:
                break
            finish = "stop" if token in stops else ""
            if token == NAN:
                finish = "nan"
            else:
                row.logprobs.append(every_logprob[device][step][adapter][slot])
                if generated.entropy is not None:
                    row.entropies.append(float(generated.entropy[at]))
                if generated.alternatives is not None:
                    values = (np.asarray(part[at]).tolist() for part in generated.alternatives)
                    row.alternatives.append(dict(zip(*values)))
            if not finish:
                row.tokens.append(token)
                finish = "length" if len(row.logprobs) == requests.limits[row.prompt] else ""
            if not finish and not requests.stop_strings:
                continue
            text = requests.decode(row.tokens, skip_special_tokens=True)
            cut = min((text.find(string) for string in requests.stop_strings if string in text), default=-1)
            if cut >= 0:
                text, finish = text[:cut], "stop"
            if finish:
                yield (device, adapter, slot), row.finished(row.tokens, text, finish)
                break
