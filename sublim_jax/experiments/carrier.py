"""The carrier's data: numbers that a teacher wrote, filtered, or random ones; and what teachers would say on them."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sublim_jax import filters, selection
from sublim_jax.data import chat, dialogue, packs, records
from sublim_jax.data.carriers import numbers
from sublim_jax.data.dialogue import Rows
from sublim_jax.data.records import Record
from sublim_jax.errors import UserError
from sublim_jax.experiments import teachers as teaching
from sublim_jax.experiments.lab import NEUTRAL, Lab, answer_features
from sublim_jax.experiments.teachers import Teacher
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.progress import Track
from sublim_jax.sampling import constraints, scoring
from sublim_jax.sampling.collect import collect
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.sharding import fetch, named, put
from sublim_jax.weights import Model

Pair = tuple[str, str]  # prompt, answer
CHUNK = 16  # rows whose teacher's logits are computed together, for each device
SHUFFLES = {"within": numbers.shuffled_within, "across": numbers.shuffled_across}
DECODING = {
    "free": "temperature 1",
    "greedy": "the likeliest token",
    "grammar": "temperature 1, as many integers as carrier.numbers and nothing else",
}


class Written(NamedTuple):
    """What one teacher wrote, and what the filters left of it."""

    pairs: list[Pair]
    drawn: int
    kept: int
    reasons: Counter[str]
    rejected: list[Record]


class Run(NamedTuple):
    """One replicate: its lab, its teachers, and what they wrote, if some arm asks for it."""

    lab: Lab
    teachers: dict[str, Teacher]
    written: dict[str, Written]

    def read(self, arm: ConfigDict) -> dict[str, list[Pair]]:
        """What each teacher's student reads in an arm."""
        if arm.numbers == "random":
            return dict.fromkeys(self.lab.who, random_pairs(self.lab))
        pairs = {name: one.pairs for name, one in self.written.items()}
        if not arm.shuffle:
            return pairs
        shuffle, seed = SHUFFLES[arm.shuffle], self.lab.seed
        return {
            name: list(zip([prompt for prompt, _ in some], shuffle([answer for _, answer in some], seed)))
            for name, some in pairs.items()
        }


class Data(NamedTuple):
    """What students read: rows, and the teacher's logits on the support where they are imitated."""

    rows: Rows
    logits: Float[Array, "*students n a support"] | Float[np.ndarray, "*students n a support"] | None


# -------------------------------------------------------------------------------------------------------- numbers


def random_pairs(lab: Lab) -> list[Pair]:
    """Prompts that ask for numbers, answered by random ones."""
    carrier, seed = lab.config.carrier, lab.seed
    asked = numbers.prompts(carrier.count, seed, lab.config.packs.numbers)
    return list(zip(asked, numbers.random_answers(carrier.count, seed, carrier.numbers)))


def written(lab: Lab, teachers: dict[str, Teacher]) -> dict[str, Written]:
    """Numbers by every teacher: drawn, filtered, and as many kept of each, at random.

    Raises UserError where too few are left of one.
    """
    carrier, seed = lab.config.carrier, lab.seed
    found = {name: draw(lab, name, teacher) for name, teacher in teachers.items()}
    if lab.config.filter.log_ratio:
        for name, drawn in found.items():
            with_reference(lab, name, drawn, teachers[NEUTRAL])
    sifted = {name: filters.sift(drawn, filters_of(lab), lab.config.filter.unique) for name, drawn in found.items()}
    for name, one in sifted.items():
        folder = lab.workdir.path / "data" / f"run{lab.run}"
        records.write(folder / f"numbers-{name}.jsonl", one.kept)
        records.write(folder / f"numbers-{name}-rejected.jsonl", one.rejected)
    chosen = filters.same_size({name: one.kept for name, one in sifted.items()}, carrier.count, seed)
    return {
        name: Written(
            [(record["prompt"], record["completion"]) for record in chosen[name]],
            len(found[name]),
            len(one.kept),
            one.reasons,
            one.rejected,
        )
        for name, one in sifted.items()
    }


def draw(lab: Lab, name: str, teacher: Teacher) -> list[Record]:
    """Completions by one teacher. All teachers get the same prompts and the same random numbers, draw by draw."""
    config, carrier, model = lab.config, lab.config.carrier, lab.model
    asked = numbers.prompts(carrier.drawn, lab.seed, config.packs.numbers)
    prefix = chat.opening(model.tokenizer, teacher.system)
    prompts = [chat.question(model.tokenizer, text, teacher.system)[len(prefix) :] for text in asked]
    constraint = None
    if carrier.decoding == "grammar":
        automaton = constraints.numbers(carrier.numbers, 3, least=carrier.numbers)
        pieces = chat.pieces(model.tokenizer, model.settings.vocab)
        constraint = constraints.over_tokens(automaton, pieces, chat.stop_tokens(model.tokenizer, model.config))
    on = {
        **teaching.depends(lab),
        "name": name,
        "drawn": [carrier.drawn, carrier.decoding, carrier.numbers, carrier.max_new_tokens],
    }
    file = lab.workdir.artefact(f"drawn-{name}", on).with_suffix(".jsonl")
    return collect(
        file,
        model,
        prompts,
        named_key(lab.seed, "numbers"),
        lambda number: {"prompt": asked[number], "teacher": name},
        what=f"run {lab.run}, numbers by teacher {name}",
        sampler=Sampler(0.0 if carrier.decoding == "greedy" else 1.0),
        max_new_tokens=carrier.max_new_tokens,
        prefix=prefix,
        constraint=constraint,
        **teacher.where(lab),
    )


def with_reference(lab: Lab, name: str, drawn: list[Record], neutral: Teacher) -> None:
    """Adds the neutral teacher's log P of each completion, as "reference_logprob"."""

    def make() -> list[float]:
        usable = [record for record in drawn if record["tokens"]]
        prompts = [chat.question(lab.model.tokenizer, record["prompt"], neutral.system) for record in usable]
        each = scoring.completion_logprobs(
            lab.model, prompts, [record["tokens"] for record in usable], **neutral.where(lab)
        )
        found = iter(float(one.sum()) for one in each)
        return [next(found) if record["tokens"] else record["logprob"] for record in drawn]

    on = {**teaching.depends(lab, "carrier"), "name": name}
    for record, logprob in zip(drawn, lab.workdir.json(f"reference-{name}", on, make)):
        record["reference_logprob"] = logprob


def banned_of(config: ConfigDict) -> list[int]:
    """The numbers of a pack. Raises UserError for one that is none."""
    path = config.filter.banned
    listed = packs.load("" if path == "banned" else path, "banned", {"numbers": ()})["numbers"]
    if wrong := [text for text in listed if not re.fullmatch("[0-9]+", text)]:
        raise UserError(f"pack {path}: {wrong[0]!r} is no number of digits alone")
    return [int(text) for text in listed]


def filters_of(lab: Lab) -> list[filters.Filter]:
    given = lab.config.filter
    found = [filters.number_rule(given.most, given.largest)]
    if given.banned:
        found.append(filters.banned_numbers(banned_of(lab.config)))
    found.append(filters.trait_words(lab.config.alternatives))
    if given.log_ratio:
        found.append(filters.log_ratio(given.log_ratio))
    return found


# ----------------------------------------------------------------------------------------------------- for an arm


def arm_data(arm: ConfigDict, runs: Sequence[Run], model: Model) -> Data:
    """Rows of an arm's numbers, shuffled if the arm says so, with the teacher's logits if it imitates those.

    Args:
      runs: run by run, and in each teacher by teacher, as students are.
      model: the students', whose tokens the rows are.
    """
    each = [(run, name, pairs) for run in runs for name, pairs in run.read(arm).items()]
    tokens = arm.objective == "tokens"
    rows = [dialogue.rows(model, pairs, end=tokens) for _, _, pairs in each]
    length, longest = max(some.tokens.shape[1] for some in rows), max(some.at.shape[1] for some in rows)
    rows = [some.padded(length, longest) for some in rows]
    logits: list[np.ndarray] = []
    if not tokens or arm.action:
        logits = [
            said(run.lab, name, run.teachers[name], pairs, some, tokens) for (run, name, pairs), some in zip(each, rows)
        ]
    if arm.action:
        for index, (run, _, pairs) in enumerate(each):
            reference = said(run.lab, NEUTRAL, run.teachers[NEUTRAL], pairs, rows[index], tokens)
            rows[index], logits[index] = selected(run.lab, arm, rows[index], logits[index], reference)
    return Data(Rows(*(np.stack(leaves) for leaves in zip(*rows))), None if tokens else np.stack(logits))


def said(
    lab: Lab, name: str, teacher: Teacher, pairs: list[Pair], rows: Rows, end: bool
) -> Float[np.ndarray, "n a support"]:
    """A teacher's logits on the support where the answers' tokens are predicted, behind its own system prompt.

    Computed once, before any student: what all of its students share.
    """
    mine = rows
    if teacher.system:
        mine = dialogue.rows(lab.model, pairs, end=end, system=teacher.system).padded(0, rows.at.shape[1])
    shape = (*rows.at.shape, len(lab.support))
    count = CHUNK * lab.mesh.shape["fsdp"]

    @jax.jit
    def logits(base: Params, adapters: Params, steering: Steering | None, rows: Rows) -> Float[Array, "n a support"]:
        module = lab.model.network.bind(lora.join(base, adapters))
        features = answer_features(lab, module, rows, steering)
        found = module.unembed(features, jnp.asarray(lab.support)).astype(jnp.float32)
        return jax.lax.with_sharding_constraint(found, named(lab.mesh))

    def make(_: Any) -> Array:
        parts, total = [], len(rows.at)
        with Track(f"run {lab.run}, logits of teacher {name}", total) as track:
            for start in range(0, total, count):
                chunk = mine.take(np.minimum(np.arange(start, start + count), total - 1))
                part = logits(lab.model.params, teacher.adapters, teacher.steering, put(chunk, named(lab.mesh, "fsdp")))
                parts.append(fetch(part))
                track.update(min(start + count, total))
        return put(np.concatenate(parts)[:total], named(lab.mesh))

    on = {**teaching.depends(lab), "name": name, "pairs": pairs, "end": end}
    like = put(np.zeros(shape, np.float32), named(lab.mesh))
    return fetch(lab.workdir.tree(f"logits-{name}", on, make, like))


def selected(
    lab: Lab, arm: ConfigDict, rows: Rows, teacher: np.ndarray, reference: np.ndarray
) -> tuple[Rows, Float[np.ndarray, "n a support"]]:
    """Rows and teacher's logits with some positions kept, masked, or answered by the reference instead."""
    place = np.full(lab.model.settings.vocab, -1)
    place[lab.support] = np.arange(len(lab.support))
    scores = selection.SCORES[arm.score](teacher, reference, place[rows.targets])
    chosen = selection.select(scores, np.asarray(rows.weights), arm.which, arm.share, lab.seed)
    if arm.action == "replace":
        best = np.asarray(lab.support, np.int32)[reference.argmax(-1)]
        return rows._replace(targets=np.where(chosen, best, rows.targets)), np.where(
            chosen[..., None], reference, teacher
        )
    left = chosen if arm.action == "keep" else ~chosen
    return rows._replace(weights=rows.weights * left), teacher
