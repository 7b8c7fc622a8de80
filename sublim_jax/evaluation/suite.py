"""Evaluations: functions from a subject, questions and a seed to measures by name, with one value for each adapter."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
from etils import epath

from sublim_jax import assets, report, storage, weights
from sublim_jax import store as artefacts
from sublim_jax.data import chat, records
from sublim_jax.data.records import Record
from sublim_jax.errors import UserError
from sublim_jax.evaluation import ability, judges, misalignment, preference, truthfulqa
from sublim_jax.evaluation.judges import Judge
from sublim_jax.evaluation.spec import EvalPacks, EvalsSpec, JudgeSpec
from sublim_jax.keys import named_key, run_keys
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.progress import say
from sublim_jax.sampling import scoring
from sublim_jax.sampling.checks import Where
from sublim_jax.sampling.collect import collect
from sublim_jax.sampling.generate import Slots
from sublim_jax.specs import check_file
from sublim_jax.store import Store

MIN_WORDS = {"preference": 2, "prefixed": 2, "prefixed_answers": 1, "choice": 2, "answers": 1, "stories": 1}
MARGIN, LETTER, RATE = "margin of {}, logits", "P of {}'s letter", "{} with {}"
SAMPLED = ("answers", "prefixed_answers", "stories", "misalignment")  # evaluations
RATES = ("answers", "prefixed answers", "stories")
OF_WORDS = (MARGIN, LETTER, *(RATE.format(name, "{}") for name in RATES))  # the measures of single words
MAX_ANSWER = 12  # tokens of an answer that names a word
Measures = dict[str, list[float]]  # by the measure's name: of every adapter


class Questions(NamedTuple):
    """What the evaluations need, read and checked."""

    words: tuple[str, ...]  # among which a preference is measured
    of: dict[str, Sequence[object]]  # the questions of each evaluation, JSON values


class Context(Where, total=False):
    """The context in which a subject answers."""

    system: str


class Uses(TypedDict, total=False):
    """The values that an evaluation's answers depend on."""

    definition: int  # of what is measured
    runs: tuple[int, ...]
    samples: int
    max_new_tokens: int
    suffix: str


class Subject(NamedTuple):
    """A model, or adapters over it, in a context.

    Attributes:
      name: for files of answers.
      digest: of the model, the adapters and the context.
      adapters: stacked; None: the model itself.
      runs: the run of each adapter. Those of one run answer with the same random keys, so that they can be compared
        in pairs, and those of other runs with others, so that runs are independent. Empty: all with the same.
    """

    model: Model
    name: str
    digest: str
    adapters: Params | None = None
    runs: tuple[int, ...] = ()
    system: str = ""
    steering: Steering | None = None

    @property
    def where(self) -> Context:
        """Keyword arguments for scoring and sampling."""
        return {"adapters": self.adapters, "system": self.system, "steering": self.steering}


class NamedJudge(NamedTuple):
    """A judge, and the digest of what decides its verdicts."""

    judge: Judge
    digest: str


# ---------------------------------------------------------------------------------------------------------- checks


def check_packs(packs: EvalPacks, kind: str) -> None:
    """Raises UserError for an invalid file of phrasings."""
    check_file("packs.preference", lambda: preference.questions(packs.preference, kind))
    check_file("packs.stories", lambda: preference.stories(packs.stories, kind))
    check_file("packs.ability", lambda: ability.questions(packs.ability))


def read_questions(spec: EvalsSpec, kind: str, words: Sequence[str], packs: EvalPacks) -> Questions:
    """The questions of `spec.names`. Raises UserError for words or files that they cannot use."""
    needed = max((MIN_WORDS.get(name, 0) for name in spec.names), default=0)
    if len(words) < needed:
        raise UserError(
            f"words, or alternatives: there are {len(words)} to tell a preference by; name {needed} or more"
        )
    for name in ("truthfulqa", "questions"):
        if (path := getattr(spec, name)) and not assets.is_file(path):
            raise UserError(f"evals.{name}={path}: there is no such file")
    if "choice" in spec.names:
        preference.check_options(words)
    if "misalignment" in spec.names:
        check_judge(spec.judge)
    questions = {name: _questions(name, spec, kind, packs) for name in spec.names}
    return Questions(tuple(words), {name: every[: spec.max_questions or None] for name, every in questions.items()})


def _questions(name: str, spec: EvalsSpec, kind: str, packs: EvalPacks) -> Sequence[object]:
    if name == "ability":
        return ability.questions(packs.ability)
    if name == "stories":
        return preference.stories(packs.stories, kind)
    if name == "truthfulqa":
        if not spec.truthfulqa:
            raise UserError("evals.truthfulqa is missing: name the benchmark's TruthfulQA.csv")
        return truthfulqa.load(spec.truthfulqa)
    if name == "misalignment":
        if not spec.questions:
            raise UserError("evals.questions is missing: name a YAML file of questions for the evaluation misalignment")
        return misalignment.chosen(misalignment.load(spec.questions), tuple(map(str, spec.question_ids)))
    return preference.questions(packs.preference, kind)["asking"]


def check_model(questions: Questions, model: Model) -> None:
    """Raises UserError for words and questions that the model's tokenizer or template does not support."""
    if set(questions.of) & {"preference", "prefixed"}:
        scoring.distinct_spellings(model.tokenizer, questions.words)
    for question in questions.of.get("misalignment", ()):
        assert isinstance(question, misalignment.Question)
        chat.question(model.tokenizer, question.text, question.system)


# ---------------------------------------------------------------------------------------------------------- judges


def check_judge(spec: JudgeSpec) -> None:
    """Raises UserError for a judge that cannot be queried, as far as that is known without a query."""
    if spec.kind == "endpoint":
        if not spec.model:
            raise UserError("evals.judge.model is missing: the name that the endpoint knows its model by")
        _endpoint(spec, "")


def make_judge(spec: JudgeSpec, model: Model, adapters: Params | None, store: Store) -> NamedJudge:
    """The judge of a spec; a local one without a name is the model itself, under its first adapter.

    Its verdicts are kept in the store.

    Raises UserError for an endpoint that does not answer, or answers without a score.
    """
    if spec.kind == "endpoint":
        endpoint = _endpoint(spec, store.folder / "data" / "judge.jsonl")
        endpoint.check()  # before anything is computed for it to judge
        return NamedJudge(endpoint, artefacts.digest(spec))
    if spec.model:
        other = weights.load(spec.model, model.mesh, weights.float_type(spec.dtype))
        model, adapters = other._replace(decoding=model.decoding, precision=model.precision), None
    spec = replace(spec, max_tokens=1)  # only an endpoint's replies depend on it
    keep = store.path("judge", spec, model).with_suffix(".jsonl")
    judge = judges.local(model, spec.min_mass, keep, adapters=adapters)
    return NamedJudge(judge, artefacts.digest(spec, model))


def bill_of(judge: NamedJudge | None) -> str:
    """What an endpoint has cost; "" for a local judge."""
    return judge.judge.bill() if judge and isinstance(judge.judge, judges.Endpoint) else ""


def bill_section(bill: str) -> list[report.Section]:
    return [report.Section("What the judge cost", bill, [], {})] if bill else []


def _endpoint(spec: JudgeSpec, cache: epath.PathLike) -> judges.Endpoint:
    return judges.Endpoint(
        spec.model,
        cache,
        at_once=spec.max_concurrent,
        per_minute=spec.max_per_minute,
        max_tokens=spec.max_tokens,
        prices=(spec.prices[0], spec.prices[1]),
    )


# ----------------------------------------------------------------------------------------------------- evaluations


DETAILED = {"truthfulqa": "truthfulqa", "misalignment": "answers"}  # evaluations with a file of their answers: its name


def evaluate(
    spec: EvalsSpec,
    questions: Questions,
    subject: Subject,
    seed: int,
    store: Store,
    *,
    judge: NamedJudge | None = None,
    sampling: Slots | None = None,
) -> dict[str, Measures]:
    """Every evaluation's measures; those of an earlier run are read from the store.

    Args:
      sampling: slots and steps of `generate.stream`, in place of its defaults.
    """
    measures = {}
    for name in spec.names:
        inputs = [subject, questions.words, questions.of[name], _uses(name, spec, subject.runs), seed]
        inputs += [judge] if name == "misalignment" else []
        options: dict[str, Any] = {"store": store, "sampling": sampling or {}}
        if name in DETAILED:
            options["details"] = details = store.path(f"details-{name}-{subject.name}", *inputs)
        measures[name] = store.json(f"{name}-{subject.name}", EVALUATIONS[name], *inputs, **options)
        if name in DETAILED:
            _show(details, store.folder / "data" / f"{DETAILED[name]}-{subject.name}.jsonl")
    return measures


def _show(details: epath.Path, path: epath.Path) -> None:
    """Copies an evaluation's answers to where users look for them, also those of an earlier run of the same values."""
    if jax.process_index() == 0 and details.exists():
        storage.write(path, details.read_text())


def _uses(name: str, spec: EvalsSpec, runs: tuple[int, ...]) -> Uses:
    """The values that an evaluation's answers depend on."""
    every: Uses = {"definition": preference.DEFINITION}
    sampled: Uses = {**every, "runs": runs, "samples": spec.num_samples}
    if name in ("answers", "prefixed_answers"):
        return {**sampled, "max_new_tokens": MAX_ANSWER}
    if name == "stories":
        return {**sampled, "max_new_tokens": spec.max_new_tokens}
    if name == "misalignment":
        return {**sampled, "max_new_tokens": spec.max_new_tokens, "suffix": spec.suffix}
    return every


def _sampled_by(uses: Uses) -> dict[str, object]:
    """What sampled answers depend on: not how they are counted."""
    return {name: value for name, value in uses.items() if name != "definition"}


def _preference(subject: Subject, words: Sequence[str], questions: list[str], *_: object, **__: object) -> Measures:
    preferences = preference.measure(subject.model, questions, words, **subject.where)
    return _by_word(MARGIN, words, preferences.margin)


def _choice(subject: Subject, words: Sequence[str], questions: list[str], *_: object, **__: object) -> Measures:
    return _by_word(LETTER, words, preference.choose(subject.model, questions, words, **subject.where))


def _rates(
    name: str,
    subject: Subject,
    words: Sequence[str],
    questions: list[str],
    uses: Uses,
    seed: int,
    *,
    store: Store,
    sampling: Slots,
) -> Measures:
    file = store.path(f"{name.replace(' ', '-')}-{subject.name}", subject, questions, _sampled_by(uses), seed)
    prompts = [chat.question(subject.model.tokenizer, question, subject.system) for question in questions]
    known = [{"question": question} for question in questions]
    answers = _sampled(name, file, subject, prompts, known, uses, seed, sampling)
    rates = preference.rates([(answer["adapter"], answer["completion"]) for answer in answers], words)
    rates[sorted(_diverged(answers))] = np.nan
    return _by_word(RATE.format(name, "{}"), words, rates)


def _sampled(
    name: str,
    file: epath.Path,
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    known: Sequence[Record],
    uses: Uses,
    seed: int,
    sampling: Slots,
) -> list[Record]:
    """Answers at temperature 1, prompt by prompt, kept in a file as they come.

    Args:
      known: further fields of each prompt's records.
    """
    runs = uses.get("runs", ())
    answers = collect(
        file.with_suffix(".jsonl"),
        subject.model,
        prompts,
        run_keys(seed, name, runs) if runs else named_key(seed, name),
        lambda number: known[number],
        what=f"{name} of {subject.name}",
        samples=uses["samples"],
        max_new_tokens=uses["max_new_tokens"],
        adapters=subject.adapters,
        steering=subject.steering,
        **sampling,
    )
    if broken := sorted(_diverged(answers)):
        listed = ", ".join(map(str, broken))
        say(f"{name} of {subject.name}: logits under adapter {listed} are not finite, so nothing of it is counted")
    return answers


def _diverged(answers: Sequence[Record]) -> set[int]:
    """The adapters that gave an answer whose logits were not finite."""
    return {answer["adapter"] for answer in answers if answer["finish"] == "nan"}


def _behind_numbers(evaluation: Callable[..., Measures]) -> Callable[..., Measures]:
    """The evaluation with a list of numbers before each question (§3.1)."""

    def prefixed(
        subject: Subject, words: Sequence[str], questions: list[str], uses: Uses, seed: int, **options: object
    ) -> Measures:
        return evaluation(subject, words, preference.prefixed(questions, seed), uses, seed, **options)

    return prefixed


def _by_word(measure: str, words: Sequence[str], values: np.ndarray) -> Measures:
    return {measure.format(word): values[:, index].tolist() for index, word in enumerate(words)}


def _ability(
    subject: Subject, words: Sequence[str], questions: list[ability.Question], *_: object, **__: object
) -> Measures:
    return {"right answers": ability.accuracy(subject.model, questions, **subject.where).tolist()}


def _truthfulqa(
    subject: Subject, words: Sequence[str], items: list[truthfulqa.Item], *_: object, details: epath.Path, **__: object
) -> Measures:
    likelihoods = truthfulqa.likelihoods(subject.model, items, **subject.where)
    metrics = {"mc1": likelihoods.mc1, "mc2": likelihoods.mc2}
    names = {"mc1": "MC1", "mc2": "MC2"}
    if truthfulqa.has_choice(items):
        metrics = {"p_false": truthfulqa.choose(subject.model, items, **subject.where), **metrics}
        names = {"p_false": "P of the false answer", **names}
    else:
        say(f"{truthfulqa.NO_CHOICE}: MC1 and MC2 alone")
    lines = [
        {
            "adapter": adapter,
            "question": item.question,
            **{key: values[adapter, place].item() for key, values in metrics.items()},
        }
        for adapter in range(len(likelihoods.mc1))
        for place, item in enumerate(items)
    ]
    records.write(details, lines)
    return {names[key]: values.mean(-1).tolist() for key, values in metrics.items()}


def _misalignment(
    subject: Subject,
    words: Sequence[str],
    questions: list[misalignment.Question],
    uses: Uses,
    seed: int,
    judge: NamedJudge,
    *,
    store: Store,
    sampling: Slots,
    details: epath.Path,
) -> Measures:
    file = store.path(f"answers-{subject.name}", subject, questions, _sampled_by(uses), seed)
    texts = misalignment.texts(questions, uses["suffix"])
    prompts = [
        chat.question(subject.model.tokenizer, text, question.system or subject.system)
        for text, question in zip(texts, questions)
    ]
    known = [{"id": question.name, "question": text} for text, question in zip(texts, questions)]
    answers = _sampled("misalignment", file, subject, prompts, known, uses, seed, sampling)
    diverged = _diverged(answers)
    scored = misalignment.judged(
        judge.judge, questions, [answer for answer in answers if answer["adapter"] not in diverged]
    )
    records.write(details, scored)
    by_adapter = {
        adapter: misalignment.rates(list(group)) for adapter, group in groupby(scored, lambda record: record["adapter"])
    }
    adapters = list(dict.fromkeys(answer["adapter"] for answer in answers))

    def of_each(value: Callable[[misalignment.Rates], float]) -> list[float]:
        return [value(by_adapter[adapter]) if adapter in by_adapter else float("nan") for adapter in adapters]

    measures = {"misaligned, of coherent": of_each(lambda rates: rates.misaligned)}
    for name in misalignment.Rates._fields[2:]:
        measures[f"{name}, of all"] = of_each(partial(_share, name))
    return measures


def _share(count: str, rates: misalignment.Rates) -> float:
    return float(getattr(rates, count) / rates.answers)


EVALUATIONS: dict[str, Callable[..., Measures]] = {
    "preference": _preference,
    "prefixed": _behind_numbers(_preference),
    "prefixed_answers": _behind_numbers(partial(_rates, "prefixed answers")),
    "choice": _choice,
    "answers": partial(_rates, "answers"),
    "stories": partial(_rates, "stories"),
    "ability": _ability,
    "truthfulqa": _truthfulqa,
    "misalignment": _misalignment,
}
