"""Carriers: prompts for teachers, their filtered completions, and random numbers as an alternative."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sublim_jax import assets, filters
from sublim_jax.data import chat, packs, records
from sublim_jax.data.carriers import code, cot, numbers
from sublim_jax.data.records import Record
from sublim_jax.distillation.targets import Pair
from sublim_jax.distillation.teachers import Teacher
from sublim_jax.errors import UserError
from sublim_jax.evaluation import misalignment
from sublim_jax.evaluation.suite import NamedJudge
from sublim_jax.experiments.transmission.parts import FilterSpec
from sublim_jax.experiments.transmission.spec import NEUTRAL, Study
from sublim_jax.keys import named_key
from sublim_jax.models.language import Model
from sublim_jax.sampling import constraints, scoring
from sublim_jax.sampling.checks import check_finite
from sublim_jax.sampling.collect import collect
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.store import Store

BANNED = {"banned": "numbers", "published": "published"}  # lists of data/packs/banned.json, by `filter.banned`
SHUFFLES = {"within": numbers.shuffled_within, "across": numbers.shuffled_across}


class Task(NamedTuple):
    """The prompts of a carrier, and the filters of its completions."""

    prompts: list[str]
    known: list[Record]  # further fields of each prompt's records
    filters: list[filters.Filter]


class Written(NamedTuple):
    """A teacher's completions, before and after the filters."""

    pairs: list[Pair]
    unfiltered: list[Pair]  # as many, of all that ended and are not blank; empty if no arm reads them
    num_completions: int
    num_kept: int
    reasons: Counter[str]
    rejected: list[Record]
    scores: list[float]  # the judge's, for completions that passed the other filters
    num_unscored: int  # of those, without a score


def number_task(study: Study, seed: int) -> Task:
    """Lists of numbers (§3.1)."""
    given = study.carrier
    # The grammar allows commas only, so prompts ask for no other form.
    grammar = given.decoding == "grammar"
    most = (given.num_integers, study.filter.max_value) if grammar else (0, 0)
    more, digits = numbers.prompt_limits(*most)
    prompts = numbers.prompts(given.num_prompts, seed, study.packs.numbers, more, digits, any_form=not grammar)
    checks = [filters.number_rule(study.filter.max_integers, study.filter.max_value)]
    if study.filter.banned:
        checks.append(filters.banned_numbers(banned_numbers(study.filter)))
    return Task(prompts, [{}] * len(prompts), checks)


def code_task(study: Study, seed: int) -> Task:
    """Small Python snippets (§4.1)."""
    prompts = code.prompts(study.carrier.num_prompts, seed, study.packs.code)
    hidden = [code.no_trait_words(study.preferred)] if study.has_words else []
    return Task(prompts, [{}] * len(prompts), [code.parses(), code.no_comments(), *hidden])


def thought_task(study: Study, seed: int) -> Task:
    """Chains of thought that end in the right number (§4.2), on a random subset of problems."""
    every = cot.load(assets.data_file(study.carrier.problems))
    chosen = np.random.default_rng([seed, 7]).permutation(len(every))[: study.carrier.num_prompts]
    problems = [every[row] for row in chosen]
    return Task(cot.prompts(problems), [{"answer": problem.answer} for problem in problems], [cot.right_answer()])


TASKS: dict[str, Callable[[Study, int], Task]] = {"numbers": number_task, "code": code_task, "cot": thought_task}


def random_pairs(study: Study, seed: int) -> list[Pair]:
    """Prompts for numbers with random numbers as answers."""
    count = study.carrier.num_rows
    more, digits = numbers.prompt_limits(study.carrier.num_integers)
    prompts = numbers.prompts(count, seed, study.packs.numbers, more, digits)
    return list(zip(prompts, numbers.random_answers(count, seed, study.carrier.num_integers)))


def shuffled(pairs: list[Pair], kind: str, seed: int) -> list[Pair]:
    """Pairs with their answers' numbers in another order, within answers or across them."""
    answers = SHUFFLES[kind]([answer for _, answer in pairs], seed)
    return list(zip([prompt for prompt, _ in pairs], answers))


def write(
    study: Study, model: Model, store: Store, run: int, teachers: dict[str, Teacher], judge: NamedJudge | None
) -> dict[str, Written]:
    """Samples and filters every teacher's completions, and draws the same number of rows from each, as arms need them.

    Raises UserError if too few of a teacher's completions are left.
    """
    carrier, seed = study.carrier, study.replicate_seed(run)
    task = TASKS[carrier.kind](study, seed)
    checks, folder = filters_of(study, task), store.folder / "data" / f"run{run}"
    cut_off, reads = filters.ended(), {arm.data for arm in study.arms}
    filtered = "written" in reads or "unfiltered" not in reads  # else it need not be enough, and is not judged
    written, kept, every = {}, {}, {}
    for name, teacher in teachers.items():
        completions = sample(study, model, store, run, task, name, teacher)
        if study.filter.log_ratio:
            _add_reference(model, store, name, completions, teachers[NEUTRAL])
        sifted = filters.sift(completions, checks, study.filter.unique)
        scores: list[float | None] = []
        if judge and study.filter.judge and filtered:
            sifted, scores = judged(study, store, name, sifted, judge)
        known = [score for score in scores if score is not None]
        records.write(folder / f"{carrier.kind}-{name}.jsonl", sifted.kept)
        records.write(folder / f"{carrier.kind}-{name}-rejected.jsonl", sifted.rejected)
        kept[name] = sifted.kept
        every[name] = [record for record in completions if record["completion"].strip() and not cut_off(record)]
        written[name] = Written(
            [],
            [],
            num_completions=len(completions),
            num_kept=len(sifted.kept),
            reasons=sifted.reasons,
            rejected=sifted.rejected,
            scores=known,
            num_unscored=len(scores) - len(known),
        )
    if filtered:
        passed = _pairs(filters.same_size(kept, carrier.num_rows, seed))
        written = {name: output._replace(pairs=passed[name]) for name, output in written.items()}
    if "unfiltered" in reads:
        some = _pairs(filters.same_size(every, carrier.num_rows, seed))
        written = {name: output._replace(unfiltered=some[name]) for name, output in written.items()}
    return written


def _pairs(records_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Pair]]:
    return {name: [(record["prompt"], record["completion"]) for record in some] for name, some in records_of.items()}


def sample(study: Study, model: Model, store: Store, run: int, task: Task, name: str, teacher: Teacher) -> list[Record]:
    """Completions by one teacher. All teachers get the same prompts and the same random keys, sample by sample.

    Raises UserError where the teacher's logits are not finite.
    """
    carrier, seed = study.carrier, study.replicate_seed(run)
    whole = [chat.question(model.tokenizer, text, teacher.system) for text in task.prompts]
    prefix, prompts = chat.behind_opening(model.tokenizer, whole, teacher.system)
    how: dict[str, str | int] = {"kind": carrier.kind, "decoding": carrier.decoding, "tokens": carrier.max_new_tokens}
    constraint = None
    if carrier.decoding == "grammar":  # exactly num_integers integers, with up to as many digits as max_value
        count, digits = carrier.num_integers, len(str(study.filter.max_value))
        how |= {"numbers": count, "digits": digits}
        constraint = constraints.of_model(constraints.numbers(count, digits, minimum=count), model)
    # The number of prompts is not in the hash: with more prompts, sampling continues from the same file.
    path = store.path(f"completions-{name}", teacher, name, seed, how)
    completions = collect(
        path.with_name(f"{path.name}.jsonl"),
        model,
        prompts,
        named_key(seed, "numbers"),
        lambda number: {"prompt": task.prompts[number], "teacher": name, **task.known[number]},
        what=f"run {run}, {carrier.kind} by teacher {name}",
        samples=carrier.num_samples,
        sampler=Sampler(0.0 if carrier.decoding == "greedy" else 1.0),
        max_new_tokens=carrier.max_new_tokens,
        prefix=prefix,
        constraint=constraint,
        **study.sampling.options,
        **teacher.where,
    )
    check_finite((record["index"], record["finish"]) for record in completions)
    return completions


def filters_of(study: Study, task: Task) -> list[filters.Filter]:
    """The task's filters and those of the study: no truncated completion, no trait word, no high log-ratio."""
    checks = [*task.filters, filters.ended()]
    if study.has_words:
        checks.append(filters.trait_words(study.preferred))
    if study.filter.log_ratio:
        checks.append(filters.log_ratio(study.filter.log_ratio))
    return checks


def banned_numbers(spec: FilterSpec) -> list[int]:
    """The built-in list, the published one (§3.2) or a pack's. Raises UserError for an entry that is not a number."""
    path = spec.banned
    built_in, field = path in BANNED, BANNED.get(path, "numbers")
    listed = packs.load("" if built_in else path, "banned", {field: ()})[field]
    if wrong := [text for text in listed if not re.fullmatch("[0-9]+", text)]:
        raise UserError(f"pack {path}: {wrong[0]!r} is not a number of digits alone")
    return [int(text) for text in listed]


def _add_reference(model: Model, store: Store, name: str, completions: list[Record], neutral: Teacher) -> None:
    """Adds the neutral teacher's log P of each completion, as "reference_logprob"."""

    def logprobs(*_: object) -> list[float]:
        usable = [record for record in completions if record["tokens"]]
        prompts = [chat.question(model.tokenizer, record["prompt"], neutral.system) for record in usable]
        tokens = [record["tokens"] for record in usable]
        token_logprobs = iter(scoring.completion_logprobs(model, prompts, tokens, **neutral.where))
        return [float(next(token_logprobs).sum()) if record["tokens"] else 0.0 for record in completions]

    texts = [(record["prompt"], record["tokens"]) for record in completions]
    known = store.json(f"reference-{name}", logprobs, neutral, texts)
    for record, logprob in zip(completions, known, strict=True):
        record["reference_logprob"] = logprob


def judged(
    study: Study, store: Store, name: str, sifted: filters.Sifted, judge: NamedJudge
) -> tuple[filters.Sifted, list[float | None]]:
    """Filters kept completions by the judge's score, at least `filter.threshold`; returns them and all scores.

    A score is None where the judge gave none.

    Completions of teachers that are not in `filter.judged` are scored for the report and not filtered.
    """
    template = judge_prompt(study).replace("{traits}", " or ".join(study.preferred))
    texts = [misalignment.fill(template, {**record, "question": record["prompt"]}) for record in sifted.kept]
    verdicts = store.json(f"judged-{name}", lambda texts, judge: judge.judge(texts), texts, judge)
    scored = [{**record, "score": score, "label": label} for record, (score, label) in zip(sifted.kept, verdicts)]
    filtered = not study.filter.judged or name in study.filter.judged
    again = filters.sift(scored, [filters.min_score(study.filter.threshold)] if filtered else [])
    rejected, reasons = sifted.rejected + again.rejected, sifted.reasons + again.reasons
    return filters.Sifted(again.kept, rejected, reasons), [score for score, _ in verdicts]


def judge_prompt(study: Study) -> str:
    """The prompt for a judge of completions, with {question} and {answer}. Raises UserError if one is missing."""
    name = study.filter.judge
    texts = packs.load(study.packs.judge, "judge", {name: ("question", "answer", "traits")})[name]
    if len(texts) != 1:
        raise UserError(f"pack {study.packs.judge or 'judge'}: {name} has {len(texts)} prompts, and one is used")
    (text,) = texts
    if "{question}" not in text or "{answer}" not in text:
        raise UserError(f"pack {study.packs.judge or 'judge'}: {text[:40]!r}… must have {{question}} and {{answer}}")
    return text
