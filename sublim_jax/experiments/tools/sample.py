"""Samples completions of prompts (`configs/sample.py`): rows are written as they finish, and a rerun continues."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from sublim_jax import report, specs, weights
from sublim_jax.data import chat, records, templates
from sublim_jax.data.prompts import read as read_prompts
from sublim_jax.data.records import Record
from sublim_jax.errors import UserError
from sublim_jax.figures import Line, Panel, panels_figure
from sublim_jax.keys import named_key
from sublim_jax.measurements import Measurement, Measurements
from sublim_jax.models.decoder import decoder, on_mesh
from sublim_jax.models.language import Model
from sublim_jax.models.settings import Settings
from sublim_jax.overrides import check_distinct
from sublim_jax.preflight import Step, decode_step
from sublim_jax.progress import say
from sublim_jax.report import Document, Notes
from sublim_jax.sampling import constraints
from sublim_jax.sampling.capacity import suited
from sublim_jax.sampling.collect import collect
from sublim_jax.sampling.constraints import Automaton
from sublim_jax.sampling.engine import Engine
from sublim_jax.sampling.generate import CHUNK, cache_length
from sublim_jax.sampling.generate import check as check_prompts
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.sharding import make_mesh, one_device
from sublim_jax.specs import Checked, Count, ExperimentSpec, MeshSpec, Precision, Rows, Width
from sublim_jax.weights import peft
from sublim_jax.weights.spec import NamedModel
from sublim_jax.workdir import claim

READ_BY = {"": (), "numbers": ("max_integers", "digits", "separator"), "choice": ("choices",)}  # of a constraint
MAX_CHARACTERS = 4096  # of a constraint: each is a state with a row over the vocabulary


@dataclass(frozen=True)
class ModelSpec(NamedModel):
    adapter: str


@dataclass(frozen=True)
class ConstraintSpec(Checked):
    where = "constraint."
    kind: str
    max_integers: Count
    digits: Count
    separator: str
    choices: tuple[str | int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.automaton()

    def automaton(self) -> Automaton | None:
        """The constraint as an automaton over characters. Raises UserError if it has too many states."""
        if not self.kind:
            return None
        choices = tuple(map(str, self.choices))
        if self.kind == "numbers":
            automaton = constraints.numbers(self.max_integers, self.digits, self.separator)
            size = self.max_integers * (self.digits + len(self.separator))
        elif self.kind == "choice":
            check_distinct("constraint.choices", choices)
            automaton, size = constraints.choice(choices), sum(map(len, choices))
        else:
            raise UserError(f'constraint.kind={self.kind!r}: choose "numbers", "choice" or ""')
        if size > MAX_CHARACTERS:
            raise UserError(
                f"constraint: {self.kind} of up to {size} characters, and {MAX_CHARACTERS} can be told apart; lower "
                "constraint.max_integers or constraint.digits, or name fewer choices"
            )
        return automaton


@dataclass(frozen=True, kw_only=True)
class SampleSpec(ExperimentSpec):
    """The whole job; `configs/sample.py` explains the values."""

    seed: int
    precision: Precision
    mesh: MeshSpec
    model: ModelSpec
    prompts: str
    chat: bool
    system: str
    num_samples: Rows
    max_new_tokens: Count
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop_strings: tuple[str | int, ...]
    constraint: ConstraintSpec
    slots: Width

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sampler()
        check_distinct("stop_strings", self.stops)
        if not all(self.stops):
            raise UserError("stop_strings: the empty text stands everywhere; name others")
        if not self.temperature and self.num_samples > 1:
            raise UserError(
                f"num_samples={self.num_samples} with temperature=0: all completions of a prompt would be the same; "
                "take one, or a temperature"
            )
        if self.system and not self.chat:
            raise UserError("system is for conversations: set --config.chat=True, or put it into the prompts")

    def sampler(self) -> Sampler:
        return Sampler(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(map(str, self.stop_strings))


read = partial(specs.read, SampleSpec)


def check_typed(spec: SampleSpec, keys: Iterable[str]) -> None:
    """Raises UserError for a value that the job does not read."""
    for key in keys:
        part, _, name = key.partition(".")
        if part == "constraint" and name not in ("kind", *READ_BY[spec.constraint.kind]):
            kinds = [kind for kind, names in READ_BY.items() if name in names]
            raise UserError(f"config.{key} is read only with constraint.kind={' or '.join(kinds)}")
        if key in ("top_k", "top_p", "min_p") and not spec.temperature:
            raise UserError(f"config.{key} is not read with temperature=0, which takes the most probable token")


def run(spec: SampleSpec, folder: epath.Path, *, update: bool = False) -> None:
    """Samples every prompt, and writes samples.jsonl, measurements and a report to the folder."""
    with jax.default_matmul_precision(spec.precision):
        _run(spec, folder, update=update)


def _run(spec: SampleSpec, folder: epath.Path, *, update: bool) -> None:
    mesh = make_mesh(spec.mesh.sizes)
    inputs = read_prompts(spec.prompts, spec.chat)
    if spec.model.adapter:
        peft.check_folder("model.adapter", spec.model.adapter)
    model = peft.merged(spec.model.load(mesh), spec.model.adapter)
    on_mesh(model.settings, mesh)  # heads
    prefix, prompts = tokens_of(spec, model, inputs)
    check_prompts(model, prompts, [spec.max_new_tokens] * len(prompts), spec.stops, prefix)
    automaton = spec.constraint.automaton()
    constraint = constraints.of_model(automaton, model) if automaton else None
    store = claim(folder, spec.values, update=update)
    # Everything that a row depends on; files are named by their content.
    content = replace(spec.model, name=model.source.digest, adapter=peft.digest(spec.model.adapter))
    of_a_row = replace(spec, preset="", mesh=MeshSpec(), model=content, prompts="", num_samples=1)
    path = store.path("samples", of_a_row, inputs)
    file = path.with_name(f"{path.name}.jsonl")
    if not file.exists():
        say(memory_line(spec, model.settings, prompts, prefix))
    ordered = collect(
        file,
        model,
        prompts,
        named_key(spec.seed, "sample"),
        lambda number: inputs[number],
        samples=spec.num_samples,
        sampler=spec.sampler(),
        max_new_tokens=spec.max_new_tokens,
        stop_strings=spec.stops,
        prefix=prefix,
        constraint=constraint,
        slots=spec.slots,
        mesh=mesh,
    )
    records.write(store.folder / "samples.jsonl", ordered)
    rows = [
        Measurement("completions", "tokens", len(r["tokens"]), r["sample"], subject=r["finish"], item=str(r["index"]))
        for r in ordered
    ]
    notes = {"system": system_note(spec, model.tokenizer, inputs)}
    report.finish(store.folder, spec, rows, document, models=[model.source], notes=notes)
    if broken := [record["index"] for record in ordered if record["finish"] == "nan"]:
        raise UserError(
            f"logits of prompts {broken[:5]} are not finite; look at the weights, or take model.dtype=float32"
        )


def preflight(spec: SampleSpec, devices: Sequence[jax.Device]) -> list[Step]:
    """The decode step, with a cache of `max_new_tokens` and 256 tokens of prompt."""
    mesh = make_mesh(spec.mesh.sizes, devices)
    settings = weights.shape_of(spec.model.name)
    on_mesh(settings, mesh)
    length = cache_length(spec.max_new_tokens + 256)
    engine = engine_of(spec, settings, mesh, length)
    return [decode_step(f"decoding, {spec.slots} slots a device of {length} tokens", engine)]


def engine_of(spec: SampleSpec, settings: Settings, mesh: Mesh, length: int) -> Engine:
    dtype = weights.float_type(spec.model.dtype)
    engine = Engine(decoder(settings), settings, mesh, spec.sampler(), spec.slots, 1, CHUNK, length, 4, dtype=dtype)
    return suited(engine.with_slots(spec.slots))


def memory_line(spec: SampleSpec, settings: Settings, prompts: list[list[int]], prefix: list[int]) -> str:
    length = cache_length(max(map(len, prompts)) + spec.max_new_tokens)
    megabytes = engine_of(spec, settings, one_device(), length).cache_bytes / 1e6
    return (
        f"{len(prompts)} prompts, {len(prefix)} tokens in front of all; the cache takes {megabytes:.0f} MB a device: "
        f"{spec.slots} slots of {length} tokens"
    )


def tokens_of(spec: SampleSpec, model: Model, inputs: list[Record]) -> tuple[list[int], list[list[int]]]:
    """(the tokens that all prompts share by the template and the system prompt, the other tokens of each prompt).

    Raises UserError, naming the prompt, for one that the template refuses.
    """
    if not spec.chat:
        return [], [model.tokenizer(record["prompt"])["input_ids"] for record in inputs]
    try:
        templates.of(model.tokenizer)
    except UserError as error:
        raise UserError(f"{error}; or give plain text, with --config.chat=False") from error

    def tokens(number: int, record: Record) -> list[int]:
        conversation = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        if spec.system and conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": spec.system}, *conversation]
        try:
            return chat.prompt(model.tokenizer, conversation)
        except UserError as error:
            raise UserError(f"{spec.prompts}, prompt {number}: {error}") from error

    prompts = [tokens(number, record) for number, record in enumerate(inputs, 1)]
    # The prefix depends on the template alone: a row must not depend on the other prompts.
    return chat.behind_opening(model.tokenizer, prompts, spec.system)


def system_note(spec: SampleSpec, tokenizer: Any, inputs: list[Record]) -> str:
    """A note for the report on how a system prompt is given if the template does not take it; else ""."""
    conversations = [record["messages"] for record in inputs if record.get("messages")]
    given = spec.system or any(first["role"] == "system" for first, *_ in conversations)
    return templates.FOLDED if spec.chat and given and not templates.takes_system(tokenizer) else ""


def document(spec: SampleSpec, rows: Measurements, notes: Notes) -> Document:
    """Finish reasons and lengths of the completions."""
    lengths = np.asarray([int(row.value) for row in rows])
    arm = {"name": "completions", "metric": "tokens", "mean": float(np.mean(lengths)), "ci95": None}
    finishes = Counter(row.subject for row in rows)
    finish_table = [["finish", "completions"], *([name, str(count)] for name, count in finishes.most_common())]
    counts = np.bincount(lengths)  # 0 for lengths that no completion has
    line = Line("all", np.arange(len(counts)), counts, {"drawstyle": "steps-mid", "marker": ""})
    panel = Panel("tokens of a completion", "completions", [line])
    text = f"{len(rows)} completions, {lengths.sum()} tokens, {lengths.mean():.1f} each. They are in samples.jsonl."
    text += f" A system prompt: {notes['system']}." if notes["system"] else ""
    section = report.Section("Samples", text, finish_table, {"lengths": partial(panels_figure, [panel])})
    return [{**arm, "runs": lengths.tolist()}], [section]
