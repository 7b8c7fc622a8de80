"""Prompts in, completions out (`configs/sample.py`): finished rows are written as they come, and a rerun goes on."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sublim_jax import assets, report, weights
from sublim_jax.data import chat, files, messages, records, templates
from sublim_jax.data.records import Record
from sublim_jax.errors import UserError
from sublim_jax.experiments.door import MOST_ROWS, WIDEST, check_numbers, check_texts, check_whole
from sublim_jax.figures import Line, Panel, panels_figure
from sublim_jax.keys import named_key
from sublim_jax.models.decoder import decoder, on_mesh
from sublim_jax.overrides import check_distinct
from sublim_jax.preflight import Step, decode_step
from sublim_jax.progress import say
from sublim_jax.sampling import constraints
from sublim_jax.sampling.collect import collect
from sublim_jax.sampling.constraints import Automaton, Constraint
from sublim_jax.sampling.engine import Engine
from sublim_jax.sampling.generate import CHUNK, LANES, cache_length
from sublim_jax.sampling.generate import check as check_prompts
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.sharding import make_mesh, one_device
from sublim_jax.weights import Model, peft
from sublim_jax.workdir import Workdir, plain

MOST_CHARACTERS = 4096  # of a constraint: each is a state, and a row over the vocabulary


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Samples every prompt, and leaves samples.jsonl, results.json, report.md and a figure in `workdir`."""
    check(config)
    mesh = make_mesh(config.mesh.to_dict())
    sampler = sampler_of(config)
    asked = read_prompts(config.prompts, config.chat)
    model = load(config, mesh)
    on_mesh(model.settings, mesh)  # heads
    prefix, prompts = tokens_of(config, model, asked)
    check_prompts(model, prompts, [config.max_new_tokens] * len(prompts), stops_of(config), prefix)
    constraint = constraint_of(config, model)
    workdir.open(config, update=update)
    depends = {**plain(config), "mesh": None, "prompts": asked, "adapter": peft.digest(config.model.adapter)}
    depends["model"] = {**plain(config.model), "name": model.source.digest, "adapter": None}
    file = workdir.artefact("samples", depends).with_suffix(".jsonl")
    if not file.exists():
        say(memory_line(config, model, prompts, prefix))
    ordered = collect(
        file,
        model,
        prompts,
        named_key(config.seed, "sample"),
        lambda number: asked[number],
        samples=config.samples,
        sampler=sampler,
        max_new_tokens=config.max_new_tokens,
        stop_strings=stops_of(config),
        prefix=prefix,
        constraint=constraint,
        slots=config.slots,
        mesh=mesh,
    )
    records.write(workdir.path / "samples.jsonl", ordered)
    sections = [section(ordered, system_note(config, model, asked))]
    report.write(workdir, config, arms(ordered), sections, [model.source])
    if broken := [record["index"] for record in ordered if record["finish"] == "nan"]:
        raise UserError(
            f"logits of prompts {broken[:5]} are no numbers; look at the weights, or take model.dtype=float32"
        )


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value or prompt that makes no sense."""
    check_values(config)
    read_prompts(config.prompts, config.chat)
    folder = config.model.adapter
    if folder and not assets.is_folder(folder):
        raise UserError(f"model.adapter: {folder} is no PEFT adapter, there is no such folder")


def check_values(config: ConfigDict) -> None:
    check_numbers(config)
    check_texts(config, ("model.name",))
    weights.float_type(config.model.dtype)
    sampler_of(config)
    check_distinct("stop_strings", stops_of(config))
    if not all(stops_of(config)):
        raise UserError("stop_strings: the empty text stands everywhere; name others")
    if config.system and not config.chat:
        raise UserError("system is for conversations: set --config.chat=True, or put it into the prompts")
    automaton_of(config)


def preflight(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
    """The decode step, with a cache of `max_new_tokens` and 256 tokens of prompt."""
    check_values(config)
    mesh = make_mesh(config.mesh.to_dict(), devices)
    settings = weights.shape_of(config.model.name)
    on_mesh(settings, mesh)
    length = cache_length(config.max_new_tokens + 256)
    engine = engine_of(config, settings, mesh, length)
    return [decode_step(f"decoding, {config.slots} slots a device of {length} tokens", engine)]


def engine_of(config: ConfigDict, settings: Any, mesh: Any, length: int) -> Engine:
    lanes = max(config.slots // LANES, 1)
    dtype = weights.float_type(config.model.dtype)
    return Engine(
        decoder(settings), settings, mesh, sampler_of(config), config.slots, lanes, CHUNK, length, 4, dtype=dtype
    )


def load(config: ConfigDict, mesh: Any) -> Model:
    """The model, with its adapter merged into it if there is one."""
    model = weights.load(config.model.name, mesh, weights.float_type(config.model.dtype))
    if not config.model.adapter:
        return model
    spec, adapters = peft.load(Path(config.model.adapter).expanduser(), model.settings, model.config, model.params)
    return model.merged(adapters, spec)


def sampler_of(config: ConfigDict) -> Sampler:
    check_whole(config, ("max_new_tokens", "constraint.most", "constraint.digits"))
    check_whole(config, ("samples",), most=MOST_ROWS)
    check_whole(config, ("slots",), most=WIDEST)
    return Sampler(config.temperature, config.top_k, config.top_p, config.min_p)


def read_prompts(path: str | Path, chat: bool = True) -> list[Record]:
    """Prompts of a file of JSON lines, Parquet or text. Raises UserError for the first that is none.

    Args:
      chat: a prompt may be a conversation, too.
    """
    if not path:
        raise UserError("--config.prompts is missing: name a JSONL or text file with a prompt a line")
    if not files.exists(path):
        raise UserError(f"--config.prompts={path}: there is no such file")
    if records.kind(path) != "text":
        return [_prompt(where, record, chat) for where, record in records.read(path)]
    lines = files.lines(files.text_of(path, "name a JSONL or text file with a prompt a line"))
    if not lines:
        raise UserError(f"{path} has no prompts")
    if _is_record(lines[0][1]):
        raise UserError(f"{path} has JSON lines; give it a name that ends in .jsonl, so that they are read as such")
    return [{"prompt": line} for _, line in lines]


def _prompt(where: str, record: Record, chat: bool) -> Record:
    """A record with its conversation's texts alone, if it has one."""
    if chat and record.get("messages"):
        return {**record, "messages": messages.read(where, record["messages"])}
    if not isinstance(record.get("prompt"), str) or (chat and record.get("messages") is not None):
        needed = '"prompt" or "messages"' if chat else '"prompt"'
        raise UserError(f"{where}: an object with {needed} is needed")
    return record


def _is_record(line: str) -> bool:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and bool({"prompt", "messages"} & set(found))


def tokens_of(config: ConfigDict, model: Model, records: list[Record]) -> tuple[list[int], list[list[int]]]:
    """(what every prompt begins with by the template and the system prompt, each prompt's own tokens).

    Raises UserError, naming the prompt, for one that the template refuses.
    """
    if not config.chat:
        return [], [model.tokenizer(record["prompt"])["input_ids"] for record in records]
    templates.of(model.tokenizer)

    def tokens(number: int, record: Record) -> list[int]:
        conversation = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        if config.system and conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": config.system}, *conversation]
        try:
            return chat.prompt(model.tokenizer, conversation)
        except UserError as error:
            raise UserError(f"{config.prompts}, prompt {number}: {error}") from error

    prompts = [tokens(number, record) for number, record in enumerate(records, 1)]
    # By the template alone, not by the prompts: what a row gets must not depend on the others.
    return chat.behind_opening(model.tokenizer, prompts, config.system)


def stops_of(config: ConfigDict) -> tuple[str, ...]:
    return tuple(map(str, config.stop_strings))


def constraint_of(config: ConfigDict, model: Model) -> Constraint | None:
    automaton = automaton_of(config)
    if not automaton:
        return None
    pieces = chat.pieces(model.tokenizer, model.settings.vocab)
    return constraints.over_tokens(automaton, pieces, chat.stop_tokens(model.tokenizer, model.config))


def automaton_of(config: ConfigDict) -> Automaton | None:
    """What `config.constraint` allows, over characters. Raises UserError where it is more than a table can hold."""
    given = config.constraint
    if given.kind == "numbers":
        automaton = constraints.numbers(given.most, given.digits, given.separator)
        size = given.most * (given.digits + len(given.separator))
    elif given.kind == "choice":
        choices = tuple(map(str, given.choices))
        check_distinct("constraint.choices", choices)
        automaton, size = constraints.choice(choices), sum(map(len, choices))
    elif given.kind:
        raise UserError(f'constraint.kind={given.kind!r}: choose "numbers", "choice" or ""')
    else:
        return None
    if size > MOST_CHARACTERS:
        raise UserError(
            f"constraint: {given.kind} of up to {size} characters, and {MOST_CHARACTERS} can be told apart; lower "
            "constraint.most or constraint.digits, or name fewer choices"
        )
    return automaton


def memory_line(config: ConfigDict, model: Model, prompts: list[list[int]], prefix: list[int]) -> str:
    length = cache_length(max(map(len, prompts)) + config.max_new_tokens)
    alone = one_device()
    megabytes = engine_of(config, model.settings, alone, length).cache_bytes / 1e6
    return (
        f"{len(prompts)} prompts, {len(prefix)} tokens in front of all; the cache takes {megabytes:.0f} MB a device: "
        f"{config.slots} slots of {length} tokens"
    )


def arms(records: list[Record]) -> list[Record]:
    lengths = [len(record["tokens"]) for record in records]
    return [{"name": "completions", "metric": "tokens", "mean": float(np.mean(lengths)), "ci95": None, "runs": lengths}]


def system_note(config: ConfigDict, model: Model, asked: list[Record]) -> str:
    """For the report: where a system prompt stands that the template does not take."""
    conversations = [record["messages"] for record in asked if record.get("messages")]
    given = config.system or any(one[0]["role"] == "system" for one in conversations)
    return templates.FOLDED if config.chat and given and not templates.takes_system(model.tokenizer) else ""


def section(records: list[Record], note: str = "") -> report.Section:
    """How completions ended, and how long they are."""
    finishes = Counter(record["finish"] for record in records)
    lengths = np.asarray([len(record["tokens"]) for record in records])
    table = [["finish", "completions"], *([name, str(count)] for name, count in finishes.most_common())]
    counts = np.bincount(lengths)  # lengths that no completion has are drawn as 0
    panel = Panel(
        "tokens of a completion",
        "completions",
        [Line("all", np.arange(len(counts)), counts, {"drawstyle": "steps-mid", "marker": ""})],
    )
    text = f"{len(records)} completions, {lengths.sum()} tokens, {lengths.mean():.1f} each. They are in samples.jsonl."
    text += f" A system prompt: {note}." if note else ""
    return report.Section("Samples", text, table, {"lengths": partial(panels_figure, [panel])})
