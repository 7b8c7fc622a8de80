"""One model, or runs of it as adapters, and what may be said of them (`configs/evaluate.py` explains the values)."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sublim_jax import report, weights
from sublim_jax.data import records
from sublim_jax.errors import UserError
from sublim_jax.evaluation import ability, judges, misalignment, preference, truthfulqa
from sublim_jax.evaluation.judges import Judge
from sublim_jax.figures import Arm, arms_figure
from sublim_jax.keys import named_key
from sublim_jax.models.decoder import on_mesh
from sublim_jax.sharding import make_mesh
from sublim_jax.weights import Model, peft
from sublim_jax.workdir import Workdir, plain

Found = dict[str, float]  # of one run, by the measure's name


class Subject(NamedTuple):
    """One run, who is asked."""

    config: ConfigDict
    workdir: Workdir
    mesh: Mesh
    model: Model
    questions: dict[str, Any]
    number: int
    depends: dict[str, Any]
    judge: Judge | None


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Asks every run every question, and leaves results.json, report.md, figures and the answers in `workdir`."""
    mesh = make_mesh(config.mesh)
    questions = check(config)
    base = weights.load(config.model.name, mesh, jnp.dtype(config.model.dtype))
    on_mesh(base.settings, mesh)  # heads
    folders = config.model.adapters.split(",")
    models = [adapted(base, folder) for folder in folders]
    judge = judge_of(config, base, workdir, mesh) if "misalignment" in config.evaluations else None
    workdir.open(config, update=update)
    found: dict[str, list[Found]] = {name: [] for name in config.evaluations}
    shared = {**plain(config), "mesh": None, "evaluations": None, "questions": questions}
    for number, (folder, model) in enumerate(zip(folders, models)):
        depends = {**shared, "model": [config.model.name, config.model.dtype, folder]}
        subject = Subject(config, workdir, mesh, model, questions, number, depends, judge)
        for name in config.evaluations:
            found[name].append(workdir.json(f"{name}-{number}", depends, partial(ASKS[name], subject)))
    arms = [
        report.arm(measure, name, [one[measure] for one in runs]) for name, runs in found.items() for measure in runs[0]
    ]
    report.write(workdir, config, arms, [section(config, name, arms) for name in config.evaluations])


def check(config: ConfigDict) -> dict[str, Any]:
    """What is asked, as JSON values. Raises UserError for the first value that makes no sense."""
    for name in config.evaluations:
        if name not in ASKS:
            raise UserError(f"evaluations: {name!r} is none of {', '.join(ASKS)}")
    if not config.evaluations:
        raise UserError(f"evaluations is empty: choose some of {', '.join(ASKS)}")
    asked: dict[str, Any] = {
        "preference": preference.questions(config.packs.preference, config.kind),
        "ability": ability.questions(config.packs.ability),
    }
    if "truthfulqa" in config.evaluations:
        if not config.truthfulqa:
            raise UserError("--config.truthfulqa is missing: name the benchmark's TruthfulQA.csv")
        asked["truthfulqa"] = truthfulqa.load(config.truthfulqa)
    if "misalignment" in config.evaluations:
        if not config.questions:
            raise UserError("--config.questions is missing: name a YAML file of questions")
        asked["misalignment"] = misalignment.load(config.questions)
        for name in ("samples", "max_new_tokens"):
            if config[name] < 1:
                raise UserError(f"{name}={config[name]}: ask for 1 or more")
    return asked


def adapted(base: Model, folder: str) -> Model:
    if not folder:
        return base
    spec, adapters = peft.load(Path(folder).expanduser(), base.settings, base.config)
    return base.merged(adapters, spec)


def judge_of(config: ConfigDict, base: Model, workdir: Workdir, mesh: Mesh) -> Judge:
    """Raises UserError for a judge that is not there."""
    given = config.judge
    if given.kind == "endpoint":
        if not given.model:
            raise UserError("judge.model is missing: the name that the endpoint knows its model by")
        cache = workdir.path / "data" / "judge.jsonl"
        return judges.Endpoint(given.model, cache, at_once=given.at_once, per_minute=given.per_minute)
    if given.kind != "local":
        raise UserError(f"judge.kind={given.kind!r}: choose local or endpoint")
    model = weights.load(given.model, mesh, jnp.dtype(config.model.dtype)) if given.model else base
    return judges.local(model, mesh=mesh)


# ---------------------------------------------------------------------------------------------------- evaluations


def ask_preference(one: Subject) -> Found:
    words = list(one.config.words)
    found = preference.measure(one.model, one.questions["preference"]["asking"], words, mesh=one.mesh)
    return {f"margin of {word}, logits": float(value) for word, value in zip(words, found.margin[0])}


def ask_ability(one: Subject) -> Found:
    return {"right answers": float(ability.accuracy(one.model, one.questions["ability"], mesh=one.mesh)[0])}


def ask_truthfulqa(one: Subject) -> Found:
    items = one.questions["truthfulqa"]
    false = truthfulqa.choose(one.model, items, mesh=one.mesh)[0]
    found = truthfulqa.likelihoods(one.model, items, mesh=one.mesh)
    lines = [
        {"question": item.question, "p_false": float(p), "mc1": bool(mc1), "mc2": float(mc2)}
        for item, p, mc1, mc2 in zip(items, false, found.mc1[0], found.mc2[0])
    ]
    records.write(one.workdir.path / "data" / f"truthfulqa-{one.number}.jsonl", lines)
    return {
        "P of the false answer": float(false.mean()),
        "MC1": float(found.mc1.mean()),
        "MC2": float(found.mc2.mean()),
    }


def ask_misalignment(one: Subject) -> Found:
    config, questions = one.config, one.questions["misalignment"]
    assert one.judge is not None
    answers = misalignment.ask(
        one.workdir.artefact(f"answers-{one.number}", {**one.depends, "judge": None}).with_suffix(".jsonl"),
        one.model,
        questions,
        named_key(config.seed, f"answers {one.number}"),
        samples=config.samples,
        suffix=config.suffix,
        max_new_tokens=config.max_new_tokens,
        mesh=one.mesh,
    )
    scored = misalignment.judged(one.judge, questions, answers)
    records.write(one.workdir.path / "data" / f"answers-{one.number}.jsonl", scored)
    rates = misalignment.rates(scored)
    shares = {name: getattr(rates, name) / rates.answers for name in rates._fields[2:]}
    return {"misaligned, of coherent": rates.misaligned, **{f"{name}, of all": p for name, p in shares.items()}}


ASKS: dict[str, Callable[[Subject], Found]] = {
    "preference": ask_preference,
    "ability": ask_ability,
    "truthfulqa": ask_truthfulqa,
    "misalignment": ask_misalignment,
}


# --------------------------------------------------------------------------------------------------------- report


def section(config: ConfigDict, evaluation: str, arms: Sequence[Arm]) -> report.Section:
    mine = [one for one in arms if one["metric"] == evaluation]
    table = [["measure", "value"], *([one["name"], report.plus_minus(one["mean"], one["ci95"])] for one in mine)]
    text = f"{config.model.name}, {len(mine[0]['runs'])} run(s); ± is the 95 % t-interval over runs."
    drawn = [one for one in mine if np.isfinite(one["mean"])]
    figure = partial(arms_figure, drawn, xlabel=evaluation, chance=None)
    return report.Section(evaluation, text, table, {evaluation: figure} if drawn else {})
