"""What is asked of a model, or of many adapters over it (`configs/evaluate.py` explains the values).

Each evaluation is a function to measures by name, with one value for every adapter.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sublim_jax import assets, report, weights
from sublim_jax.data import chat, records
from sublim_jax.errors import UserError
from sublim_jax.evaluation import ability, judges, misalignment, preference, truthfulqa
from sublim_jax.evaluation.judges import Judge
from sublim_jax.experiments.door import MOST_ROWS, check_file, check_one_of, check_whole
from sublim_jax.keys import named_key
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.overrides import check_distinct
from sublim_jax.progress import say
from sublim_jax.sampling import scoring
from sublim_jax.weights import Model
from sublim_jax.workdir import Workdir

MOST_AT_ONCE = 1000  # requests, each with a thread
WORDS = {"preference": 2, "prefixed": 2, "choice": 2, "answers": 1, "stories": 1}  # that an evaluation needs
Found = dict[str, list[float]]  # by the measure's name: of every adapter


class Asking(NamedTuple):
    """What is asked, read and checked."""

    given: ConfigDict
    words: list[str]  # among which a preference is
    questions: dict[str, Any]  # of each evaluation, as JSON values

    def depends(self, name: str) -> dict[str, Any]:
        """What the answers to one evaluation depend on, beside who answers."""
        given = {key: self.given[key] for key in SAMPLED.get(name, ())}
        if name == "misalignment":
            given["judge"] = identity(self.given.judge)
        return {"given": given, "words": self.words, "questions": self.questions[name]}


class Subject(NamedTuple):
    """Who is asked."""

    model: Model
    adapters: Params | None  # stacked; None: the model itself
    mesh: Mesh
    workdir: Workdir
    name: str  # for files of answers
    depends: Any  # what this subject is made of, as JSON values
    seed: int
    sampling: dict[str, int]  # slots and steps of `generate.stream`, where others than its own
    system: str = ""  # a system prompt
    steering: Steering | None = None

    @property
    def where(self) -> dict[str, Any]:
        return {"adapters": self.adapters, "mesh": self.mesh, "system": self.system, "steering": self.steering}


def check_values(given: ConfigDict) -> None:
    """Raises UserError for the first value that makes no sense, whatever files say."""
    for name in given.evaluations:
        check_one_of("evaluations", name, EVALUATIONS)
    check_distinct("evaluations", given.evaluations)
    check_whole(given, ("max_new_tokens",))
    check_whole(given, ("samples",), most=MOST_ROWS)
    check_whole(given, ("most",), least=0)
    judge = given.judge
    if judge.kind not in ("local", "endpoint"):
        raise UserError(f"judge.kind={judge.kind!r}: choose local or endpoint")
    if not 0 <= judge.least_mass < 1:
        raise UserError(f"judge.least_mass={judge.least_mass} is a probability below 1")
    try:
        weights.float_type(judge.dtype)
    except UserError as error:
        raise UserError(f"judge.{error}") from error
    check_whole(given, ("judge.at_once",), most=MOST_AT_ONCE)
    check_whole(given, ("judge.max_tokens",))
    check_whole(given, ("judge.per_minute",), least=0)
    if len(judge.prices) != 2 or min(judge.prices) < 0:
        raise UserError(
            f"judge.prices={tuple(judge.prices)}: name two, of a million tokens asked and answered, such as 1,2"
        )


def check_packs(packs: ConfigDict, kind: str) -> None:
    """Raises UserError for a file of phrasings that is none."""
    check_file("packs.preference", lambda: preference.questions(packs.preference, kind))
    check_file("packs.stories", lambda: preference.stories(packs.stories, kind))
    check_file("packs.ability", lambda: ability.questions(packs.ability))


def asking(given: ConfigDict, kind: str, words: Sequence[str], packs: ConfigDict) -> Asking:
    """Reads the questions of `given.evaluations`. Raises UserError for the first value that makes no sense."""
    check_values(given)
    needed = max((words_of for name, words_of in WORDS.items() if name in given.evaluations), default=0)
    if len(words) < needed:
        raise UserError(
            f"words, or alternatives: there are {len(words)} to tell a preference by; name {needed} or more"
        )
    for name in ("truthfulqa", "questions"):
        if given[name] and not assets.is_file(given[name]):
            raise UserError(f"{name}={given[name]}: there is no such file")
    if "choice" in given.evaluations:
        preference.check_options(words)
    if "misalignment" in given.evaluations:
        check_judge(given.judge)
    found: dict[str, Any] = {}
    for name in given.evaluations:
        every = _questions(name, given, kind, packs)
        found[name] = every[: given.most] if given.most else every
    return Asking(given, list(words), found)


def _questions(name: str, given: ConfigDict, kind: str, packs: ConfigDict) -> Any:
    if name == "ability":
        return ability.questions(packs.ability)
    if name == "stories":
        return preference.stories(packs.stories, kind)
    if name == "truthfulqa":
        if not given.truthfulqa:
            raise UserError("truthfulqa is missing: name the benchmark's TruthfulQA.csv")
        return truthfulqa.load(given.truthfulqa)
    if name == "misalignment":
        if not given.questions:
            raise UserError("questions are missing: name a YAML file of questions for the evaluation misalignment")
        return misalignment.load(given.questions)
    return preference.questions(packs.preference, kind)["asking"]


def check_model(asking: Asking, model: Model) -> None:
    """Raises UserError for words and questions that the model cannot be asked."""
    if set(asking.questions) & {"preference", "prefixed", "choice"}:
        for word in asking.words:
            scoring.spellings(model.tokenizer, word)
    for question in asking.questions.get("misalignment", ()):
        chat.question(model.tokenizer, question.text, question.system)


def check_judge(judge: ConfigDict) -> None:
    """Raises UserError for a judge that cannot be asked, as far as that is known without asking."""
    if judge.kind == "endpoint":
        if not judge.model:
            raise UserError("judge.model is missing: the name that the endpoint knows its model by")
        _endpoint(judge, "")


def judge_of(
    given: ConfigDict, model: Model, adapters: Params | None, depends: Any, workdir: Workdir, mesh: Mesh
) -> Judge:
    """The judge of the config; a local one without a name is the model itself, under its first adapter.

    What it says is kept in the folder, which must be open.

    Args:
      depends: what the model is made of, as JSON values.

    Raises UserError for an endpoint that does not answer, or with no score.
    """
    judge = given.judge
    if judge.kind == "endpoint":
        endpoint = _endpoint(judge, workdir.path / "data" / "judge.jsonl")
        endpoint.check()  # what is wrong with it is told now, not when everything is there to be judged
        return endpoint
    if judge.model:
        model, adapters = weights.load(judge.model, mesh, weights.float_type(judge.dtype)), None
        depends = model.source.digest
    keep = workdir.artefact("judge", {"judge": identity(judge), "model": depends}).with_suffix(".jsonl")
    return judges.local(model, judge.least_mass, keep, adapters=adapters, mesh=mesh)


def cost_of(judge: Judge | None) -> list[report.Section]:
    """For a report: what an endpoint has cost."""
    if not isinstance(judge, judges.Endpoint):
        return []
    return [report.Section("What the judge cost", judge.bill(), [], {})]


def _endpoint(judge: ConfigDict, cache: epath.PathLike) -> judges.Endpoint:
    limits = {key: judge[key] for key in ("at_once", "per_minute", "max_tokens")} | {"prices": tuple(judge.prices)}
    return judges.Endpoint(judge.model, cache, **limits)


def identity(judge: ConfigDict) -> dict[str, Any]:
    """Which judge it is, and not how fast it is asked: what judgements depend on."""
    room = ("max_tokens",) if judge.kind == "endpoint" else ()
    return {key: judge[key] for key in ("kind", "model", "dtype", "least_mass", *room)}


def ask(asking: Asking, subject: Subject, judge: Judge | None) -> dict[str, Found]:
    """Every evaluation's measures; what an earlier run has found is not asked again."""
    return {
        name: subject.workdir.json(
            f"{name}-{subject.name}",
            {"of": subject.depends, "seed": subject.seed, **asking.depends(name)},
            partial(EVALUATIONS[name], asking, subject, judge),
        )
        for name in asking.given.evaluations
    }


# ---------------------------------------------------------------------------------------------------- evaluations


def ask_preference(asking: Asking, one: Subject, judge: Judge | None) -> Found:
    return _margins(asking, one, asking.questions["preference"])


def ask_prefixed(asking: Asking, one: Subject, judge: Judge | None) -> Found:
    return _margins(asking, one, preference.prefixed(asking.questions["prefixed"], one.seed))


def _margins(asking: Asking, one: Subject, questions: list[str]) -> Found:
    found = preference.measure(one.model, questions, asking.words, **one.where)
    return _by_word("margin of {}, logits", asking.words, found.margin)


def ask_choice(asking: Asking, one: Subject, judge: Judge | None) -> Found:
    found = preference.choose(one.model, asking.questions["choice"], asking.words, **one.where)
    return _by_word("P of {}'s letter", asking.words, found)


def ask_answers(asking: Asking, one: Subject, judge: Judge | None) -> Found:
    return _rates("answers", asking, one, 12)


def ask_stories(asking: Asking, one: Subject, judge: Judge | None) -> Found:
    return _rates("stories", asking, one, asking.given.max_new_tokens)


def _rates(evaluation: str, asking: Asking, one: Subject, most: int) -> Found:
    questions, key = asking.questions[evaluation], named_key(one.seed, evaluation)
    options = {"samples": asking.given.samples, "max_new_tokens": most, **one.where, **one.sampling}
    found = preference.rates(one.model, questions, asking.words, key, **options)
    return _by_word(f"{evaluation} with {{}}", asking.words, found)


def _by_word(measure: str, words: Sequence[str], found: np.ndarray) -> Found:
    return {measure.format(word): found[:, index].tolist() for index, word in enumerate(words)}


def ask_ability(asking: Asking, one: Subject, judge: Judge | None) -> Found:
    return {"right answers": ability.accuracy(one.model, asking.questions["ability"], **one.where).tolist()}


def ask_truthfulqa(asking: Asking, one: Subject, judge: Judge | None) -> Found:
    items = asking.questions["truthfulqa"]
    found = truthfulqa.likelihoods(one.model, items, **one.where)
    each = {"mc1": found.mc1, "mc2": found.mc2}
    names = {"mc1": "MC1", "mc2": "MC2"}
    if truthfulqa.has_choice(items):
        each = {"p_false": truthfulqa.choose(one.model, items, **one.where), **each}
        names = {"p_false": "P of the false answer", **names}
    else:
        say(f"{truthfulqa.NO_CHOICE}: MC1 and MC2 alone")
    lines = [
        {"adapter": adapter, "question": item.question, **{key: each[key][adapter, place].item() for key in each}}
        for adapter in range(len(found.mc1))
        for place, item in enumerate(items)
    ]
    records.write(one.workdir.path / "data" / f"truthfulqa-{one.name}.jsonl", lines)
    return {names[key]: value.mean(-1).tolist() for key, value in each.items()}


def ask_misalignment(asking: Asking, one: Subject, judge: Judge | None) -> Found:
    given, questions = asking.given, asking.questions["misalignment"]
    assert judge is not None
    depends = {"of": one.depends, "seed": one.seed, **asking.depends("misalignment")}
    depends["given"] = {**depends["given"], "judge": None}
    answers = misalignment.ask(
        one.workdir.artefact(f"answers-{one.name}", depends).with_suffix(".jsonl"),
        one.model,
        questions,
        named_key(one.seed, "misalignment"),
        samples=given.samples,
        suffix=given.suffix,
        max_new_tokens=given.max_new_tokens,
        **{**one.where, **one.sampling},
    )
    scored = misalignment.judged(judge, questions, answers)
    records.write(one.workdir.path / "data" / f"answers-{one.name}.jsonl", scored)
    each = [misalignment.rates(list(mine)) for _, mine in groupby(scored, lambda record: record["adapter"])]
    found = {"misaligned, of coherent": [rates.misaligned for rates in each]}
    for name in each[0]._fields[2:]:
        found[f"{name}, of all"] = [getattr(rates, name) / rates.answers for rates in each]
    return found


EVALUATIONS: dict[str, Callable[[Asking, Subject, Judge | None], Found]] = {
    "preference": ask_preference,
    "prefixed": ask_prefixed,
    "choice": ask_choice,
    "answers": ask_answers,
    "stories": ask_stories,
    "ability": ask_ability,
    "truthfulqa": ask_truthfulqa,
    "misalignment": ask_misalignment,
}
SAMPLED = {  # which values sampled answers depend on
    "answers": ("samples",),
    "stories": ("samples", "max_new_tokens"),
    "misalignment": ("samples", "max_new_tokens", "suffix"),
}
