"""The carrier's data: what a teacher wrote, filtered, or random numbers; and what teachers would say on them."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from sublim_jax import assets, filters, selection
from sublim_jax.data import chat, dialogue, packs, records
from sublim_jax.data.carriers import code, cot, numbers
from sublim_jax.data.dialogue import Rows
from sublim_jax.data.records import Record
from sublim_jax.errors import UserError
from sublim_jax.evaluation import misalignment
from sublim_jax.experiments import measures
from sublim_jax.experiments import teachers as teaching
from sublim_jax.experiments.lab import NEUTRAL, Lab, answer_features, depends_on
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
from sublim_jax.workdir import digest

Pair = tuple[str, str]  # prompt, answer
CHUNK = 16  # rows whose teacher's logits are computed together, for each device
SHUFFLES = {"within": numbers.shuffled_within, "across": numbers.shuffled_across}
DECODING = {
    "free": "temperature 1",
    "greedy": "the likeliest token",
    "grammar": "temperature 1, as many integers as carrier.numbers and nothing else",
}


class Task(NamedTuple):
    """What teachers are asked to write."""

    prompts: list[str]
    known: list[Record]  # of each prompt, for its records
    filters: list[filters.Filter]  # of what is written


class Written(NamedTuple):
    """What one teacher wrote, and what the filters left of it."""

    pairs: list[Pair]
    drawn: int
    kept: int
    reasons: Counter[str]
    rejected: list[Record]
    scores: list[float]  # the judge's, of what the other filters left


class Run(NamedTuple):
    """One replicate: its lab, its teachers, and what they wrote, once an arm asks for it."""

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


# ---------------------------------------------------------------------------------------------------------- tasks


def number_task(lab: Lab) -> Task:
    """Lists of numbers (§3.1)."""
    config = lab.config
    prompts = numbers.prompts(prompts_of(config), lab.seed, config.packs.numbers)
    checks = [filters.number_rule(config.filter.most, config.filter.largest)]
    if config.filter.banned:
        checks.append(filters.banned_numbers(banned_of(config)))
    return Task(prompts, [{}] * len(prompts), checks)


def code_task(lab: Lab) -> Task:
    """Small Python snippets (§4.1)."""
    prompts = code.prompts(prompts_of(lab.config), lab.seed, lab.config.packs.code)
    hidden = [code.no_trait_words(lab.config.traits)] if lab.words else []
    return Task(prompts, [{}] * len(prompts), [code.parses(), code.no_comments(), *hidden])


def thought_task(lab: Lab) -> Task:
    """Chains of thought that end in the right number (§4.2), on as many problems drawn at random."""
    every = cot.load(assets.data_file(lab.config.carrier.problems))
    chosen = np.random.default_rng([lab.seed, 7]).permutation(len(every))[: prompts_of(lab.config)]
    problems = [every[row] for row in chosen]
    return Task(cot.prompts(problems), [{"answer": one.answer} for one in problems], [cot.right_answer()])


TASKS: dict[str, Callable[[Lab], Task]] = {"numbers": number_task, "code": code_task, "cot": thought_task}


def prompts_of(config: ConfigDict) -> int:
    """How many prompts give `carrier.drawn` completions."""
    return -(-config.carrier.drawn // config.carrier.samples)


# ----------------------------------------------------------------------------------------------------------- data


def random_pairs(lab: Lab) -> list[Pair]:
    """Prompts that ask for numbers, answered by random ones."""
    carrier, seed = lab.config.carrier, lab.seed
    asked = numbers.prompts(carrier.count, seed, lab.config.packs.numbers)
    return list(zip(asked, numbers.random_answers(carrier.count, seed, carrier.numbers)))


def written(lab: Lab, teachers: dict[str, Teacher]) -> dict[str, Written]:
    """What every teacher wrote: drawn, filtered, and as many kept of each, at random.

    Raises UserError where too few are left of one.
    """
    carrier, seed = lab.config.carrier, lab.seed
    task = TASKS[carrier.kind](lab)
    found = {name: draw(lab, task, name, teacher) for name, teacher in teachers.items()}
    if lab.config.filter.log_ratio:
        for name, drawn in found.items():
            with_reference(lab, name, drawn, teachers[NEUTRAL])
    checks = filters_of(lab, task)
    sifted = {name: filters.sift(drawn, checks, lab.config.filter.unique) for name, drawn in found.items()}
    scores: dict[str, list[float]] = {name: [] for name in sifted}
    if lab.config.filter.judge:
        for name, one in sifted.items():
            sifted[name], scores[name] = judged(lab, name, one)
    for name, one in sifted.items():
        folder = lab.workdir.path / "data" / f"run{lab.run}"
        records.write(folder / f"{carrier.kind}-{name}.jsonl", one.kept)
        records.write(folder / f"{carrier.kind}-{name}-rejected.jsonl", one.rejected)
    chosen = filters.same_size({name: one.kept for name, one in sifted.items()}, carrier.count, seed)
    return {
        name: Written(
            [(record["prompt"], record["completion"]) for record in chosen[name]],
            len(found[name]),
            len(one.kept),
            one.reasons,
            one.rejected,
            scores[name],
        )
        for name, one in sifted.items()
    }


def draw(lab: Lab, task: Task, name: str, teacher: Teacher) -> list[Record]:
    """Completions by one teacher. All teachers get the same prompts and the same random numbers, draw by draw."""
    carrier, model = lab.config.carrier, lab.model
    whole = [chat.question(model.tokenizer, text, teacher.system) for text in task.prompts]
    prefix, prompts = chat.behind_opening(model.tokenizer, whole, teacher.system)
    how = {key: carrier[key] for key in ("kind", "decoding", "max_new_tokens")}
    constraint = None
    if carrier.decoding == "grammar":
        how |= {"numbers": carrier.numbers, "digits": len(str(lab.config.filter.largest))}
        automaton = constraints.numbers(carrier.numbers, how["digits"], least=carrier.numbers)
        pieces = chat.pieces(model.tokenizer, model.settings.vocab)
        constraint = constraints.over_tokens(automaton, pieces, chat.stop_tokens(model.tokenizer, model.config))
    on = {**teaching.depends(lab), "name": name, "how": how}
    return collect(
        lab.workdir.artefact(f"drawn-{name}", on).with_suffix(".jsonl"),
        model,
        prompts,
        named_key(lab.seed, "numbers"),
        lambda number: {"prompt": task.prompts[number], "teacher": name, **task.known[number]},
        what=f"run {lab.run}, {carrier.kind} by teacher {name}",
        samples=carrier.samples,
        sampler=Sampler(0.0 if carrier.decoding == "greedy" else 1.0),
        max_new_tokens=carrier.max_new_tokens,
        prefix=prefix,
        constraint=constraint,
        **lab.config.sampling,
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
        return [next(found) if record["tokens"] else 0.0 for record in drawn]

    texts = [[record["prompt"], record["tokens"]] for record in drawn]
    on = {**teaching.depends(lab), "texts": texts}
    for record, logprob in zip(drawn, lab.workdir.json(f"reference-{name}", on, make), strict=True):
        record["reference_logprob"] = logprob


def banned_of(config: ConfigDict) -> list[int]:
    """The numbers of a pack. Raises UserError for one that is none."""
    path = config.filter.banned
    listed = packs.load("" if path == "banned" else path, "banned", {"numbers": ()})["numbers"]
    if wrong := [text for text in listed if not re.fullmatch("[0-9]+", text)]:
        raise UserError(f"pack {path}: {wrong[0]!r} is no number of digits alone")
    return [int(text) for text in listed]


def filters_of(lab: Lab, task: Task) -> list[filters.Filter]:
    """The task's own, none that was cut off, no word of a trait, and no completion that gives its teacher away."""
    found = [*task.filters, filters.ended()]
    if lab.words:
        found.append(filters.trait_words(lab.config.traits))
    if lab.config.filter.log_ratio:
        found.append(filters.log_ratio(lab.config.filter.log_ratio))
    return found


def judged(lab: Lab, name: str, sifted: filters.Sifted) -> tuple[filters.Sifted, list[float]]:
    """What a judge leaves of what was kept: scores of at least `filter.judge_least`; and all scores that it gave."""
    given = lab.config.filter
    template = judging(lab.config)
    words = " or ".join(lab.config.traits)
    texts = [
        misalignment.fill(template.replace("{traits}", words), {**record, "question": record["prompt"]})
        for record in sifted.kept
    ]

    def make() -> list[list[Any]]:
        assert lab.judge is not None
        return [list(verdict) for verdict in lab.judge(texts)]

    asked_of = measures.identity(lab.config.ask.judge)
    verdicts = lab.workdir.json(f"judged-{name}", {"texts": texts, "judge": asked_of, **depends_on(lab)}, make)
    scored = [{**one, "score": score, "label": label} for one, (score, label) in zip(sifted.kept, verdicts)]
    again = filters.sift(scored, [filters.least_score(given.judge_least)])
    rejected, reasons = sifted.rejected + again.rejected, sifted.reasons + again.reasons
    return filters.Sifted(again.kept, rejected, reasons), [score for score, _ in verdicts if score is not None]


def judging(config: ConfigDict) -> str:
    """What the judge is asked of a completion: a phrasing with {question} and {answer}."""
    template = packs.load(config.packs.judge, "judge", {config.filter.judge: ("question", "answer", "traits")})
    (text,) = template[config.filter.judge][:1]
    if "{question}" not in text or "{answer}" not in text:
        raise UserError(f"pack {config.packs.judge or 'judge'}: {text[:40]!r}… must have {{question}} and {{answer}}")
    return text


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

    Computed once for each set of rows, before the students that imitate them: what all of them share.

    Raises UserError where teacher and student read an answer as other tokens.
    """
    mine = rows
    if teacher.system:
        mine = dialogue.rows(lab.model, pairs, end=end, system=teacher.system).padded(0, rows.at.shape[1])
        if not np.array_equal(mine.targets * mine.weights, rows.targets * rows.weights):
            raise UserError(
                f"teacher {name} and its students have different tokens for one answer: their chat templates differ; "
                "choose objective=tokens, or students of the teacher's model"
            )
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

    on = {**teaching.depends(lab), "name": name, "rows": digest(mine)}
    like = put(np.zeros(shape, np.float32), named(lab.mesh))
    return fetch(lab.workdir.tree(f"logits-{name}", on, make, like))


def selected(
    lab: Lab, arm: ConfigDict, rows: Rows, teacher: np.ndarray, reference: np.ndarray
) -> tuple[Rows, Float[np.ndarray, "n a support"]]:
    """Rows and teacher's logits with some positions kept, masked, or answered by the reference instead."""
    place = np.full(lab.model.settings.vocab, -1)
    place[lab.support] = np.arange(len(lab.support))
    targets = place[rows.targets]
    scores = selection.SCORES[arm.score](teacher, reference, targets)
    # Of the token that ends an answer, which is outside the support, these logits say nothing.
    known = np.asarray(rows.weights) * (targets >= 0)
    chosen = selection.select(scores, known, arm.which, arm.share, lab.seed)
    if arm.action == "replace":
        best = np.asarray(lab.support, np.int32)[reference.argmax(-1)]
        return rows._replace(targets=np.where(chosen, best, rows.targets)), np.where(
            chosen[..., None], reference, teacher
        )
    left = chosen if arm.action == "keep" else ~chosen
    return rows._replace(weights=rows.weights * left), teacher
