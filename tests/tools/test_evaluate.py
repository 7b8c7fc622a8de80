"""Evaluations: stacked adapters against each alone, and the command from files to tables and answers."""

import json

import jax
import numpy as np
import pytest
import yaml
from evaluation_kit import HEADER, ROWS, completion, question
from launch_kit import assert_refused, run_here

from configs import evaluate as config_file
from sublim_jax import store
from sublim_jax.distillation.losses import stacked
from sublim_jax.evaluation import ability, suite, truthfulqa
from sublim_jax.evaluation.spec import READ_BY
from sublim_jax.evaluation.suite import NamedJudge, Subject
from sublim_jax.evaluation.verdicts import Verdict
from sublim_jax.experiments.tools.evaluate import read
from sublim_jax.models import lora
from sublim_jax.store import Store
from sublim_jax.weights import peft

SPEC = lora.Lora(2, 4)


@pytest.fixture(scope="module")
def adapters(tiny):
    def noisy(number):
        start = lora.init(jax.random.key(number), tiny.params, SPEC)
        return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(9 + number), x.shape), start)

    return [noisy(number) for number in range(2)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny, adapters):
    folder = tmp_path_factory.mktemp("files")
    (folder / "truthfulqa.csv").write_text(HEADER + ROWS)
    (folder / "questions.yaml").write_text(yaml.safe_dump([question(), question(id="x", paraphrases=["Why?", "How?"])]))
    for number, adapter in enumerate(adapters):
        peft.save(folder / f"run{number}", adapter, SPEC, tiny.settings, tiny.config)
    return folder


@pytest.fixture
def command(tiny_folder, files):
    given = {"num_samples": 2, "max_new_tokens": 6}
    given |= {"truthfulqa": files / "truthfulqa.csv", "questions": files / "questions.yaml"}

    def make(work, *more):
        """The command with those of `given` that its evaluations read."""
        typed = [flag.partition("=")[2].split(",") for flag in more if flag.startswith("evals.names=")]
        names = typed[0] if typed else config_file.get_config().evals.names
        read_here = [name for name in given if {*READ_BY[name]} & {*names}]
        return [
            "--config=configs/evaluate.py",
            f"--config.model.name={tiny_folder}",
            "--config.words=owl,x,y",
            *(f"--config.evals.{name}={given[name]}" for name in read_here),
            f"--workdir={work}",
            *(f"--config.{flag}" for flag in more),
        ]

    return make


# ----------------------------------------------------------------------------------------------------- the functions


def test_stacked_adapters_are_evaluated_as_each_alone_and_as_merged(tiny, adapters, files, tmp_path):
    config = config_file.get_config()
    config.evals.names = ("truthfulqa", "preference", "choice", "misalignment")
    config.evals.truthfulqa, config.evals.questions = (str(files / n) for n in ("truthfulqa.csv", "questions.yaml"))
    config.evals.num_samples, config.evals.max_new_tokens = 1, 6
    spec, work = read(config), Store(tmp_path)
    questions = suite.read_questions(spec.evals, spec.kind, ("owl", "x", "y"), spec.packs)
    model = tiny.adapted(SPEC)
    judge = NamedJudge(lambda prompts: [Verdict(float(len(prompt) % 100)) for prompt in prompts], "by length")

    def evaluated(name, some, judge=judge):
        subject = Subject(model, name, store.digest(model, some), stacked(some))
        return suite.evaluate(spec.evals, questions, subject, 0, work, judge=judge)

    together = evaluated("all", adapters)
    for number, adapter in enumerate(adapters):
        for name, measures in evaluated(f"{number}", [adapter]).items():
            for measure, values in measures.items():
                np.testing.assert_allclose(together[name][measure][number], values[0], rtol=1e-3, atol=1e-4)
    merged = tiny.merged(adapters[1], SPEC)
    expected = truthfulqa.choose(merged, truthfulqa.load(files / "truthfulqa.csv")).mean()
    np.testing.assert_allclose(together["truthfulqa"]["P of the false answer"][1], expected, rtol=1e-3)
    answers = [json.loads(line) for line in (tmp_path / "data" / "answers-all.jsonl").open()]
    assert [record["adapter"] for record in answers] == sorted(record["adapter"] for record in answers)

    def nobody(prompts):
        raise AssertionError("it is there")

    before = (tmp_path / "data" / "answers-all.jsonl").read_text()
    (tmp_path / "data" / "answers-all.jsonl").write_text("of other values, by --update\n")
    again = evaluated("all", adapters, NamedJudge(nobody, "by length"))
    assert json.dumps(again) == json.dumps(together)  # as text, because nan != nan
    assert (tmp_path / "data" / "answers-all.jsonl").read_text() == before
    with pytest.raises(AssertionError):  # another judge scores the same answers anew
        evaluated("all", adapters, NamedJudge(nobody, "another"))


def test_students_of_a_run_answer_with_the_same_draws_and_other_runs_with_others(tiny, adapters, tmp_path):
    """So that runs are independent: rates that share their draws would vary too little over runs."""
    config = config_file.get_config()
    config.evals.names, config.evals.num_samples = ("answers",), 2
    spec, model = read(config), tiny.adapted(SPEC)
    questions = suite.read_questions(spec.evals, spec.kind, ("owl", "x"), spec.packs)
    subject = Subject(model, "students", "d", stacked([adapters[0]] * 3), runs=(0, 0, 1))
    suite.evaluate(spec.evals, questions, subject, 0, Store(tmp_path))
    (file,) = tmp_path.rglob("answers-students*.jsonl")
    answers = [json.loads(line) for line in file.open()]
    texts = [
        [r["completion"] for r in sorted(answers, key=lambda r: (r["index"], r["sample"])) if r["adapter"] == n]
        for n in range(3)
    ]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 2 * len(questions.of["answers"])


def test_an_evaluation_is_named_by_what_it_depends_on_alone(tiny, tmp_path, monkeypatch):
    """Another number of samples gives a new measurement of answers, but the same preference."""
    calls = []

    def measured(*_, **__):
        calls.append(1)
        return {}

    monkeypatch.setattr(suite, "EVALUATIONS", dict.fromkeys(suite.EVALUATIONS, measured))
    work, subject = Store(tmp_path), Subject(tiny, "0", tiny.digest)

    def evaluated(subject=subject, seed=0, **changes):
        config = config_file.get_config()
        config.evals.names = ("preference", "answers")
        config.evals.update(changes)
        spec = read(config)
        questions = suite.read_questions(spec.evals, spec.kind, spec.words, spec.packs)
        calls.clear()
        suite.evaluate(spec.evals, questions, subject, seed, work, sampling={"slots": 3})
        return len(calls)

    assert [evaluated(), evaluated(), evaluated(num_samples=3), evaluated(suffix="x", max_new_tokens=5)] == [2, 0, 1, 0]
    assert evaluated(max_questions=3) == 2 and evaluated(seed=1) == 2
    assert evaluated(subject._replace(digest="other")) == 2 and evaluated(subject._replace(name="other")) == 2


# --------------------------------------------------------------------------------------------------------- a command


def test_all_evaluations_of_two_runs_end_in_a_table_a_figure_and_answers(tiny, files, command, tmp_path):
    every = "evals.names=preference,prefixed,prefixed_answers,choice,answers,stories,ability,truthfulqa,misalignment"
    two = f"model.adapters={files / 'run0'},{files / 'run1'}"
    result = run_here(*command(tmp_path, every, two, "evals.max_questions=4"))
    assert result.returncode == 0, result.stderr
    arms = {arm["name"]: arm for arm in json.loads((tmp_path / "results.json").read_text())["arms"]}
    spec, adapter = peft.load(files / "run1", tiny.settings, tiny.config)
    second = tiny.merged(adapter, spec)
    expected = truthfulqa.choose(second, truthfulqa.load(files / "truthfulqa.csv")).mean()
    np.testing.assert_allclose(arms["P of the false answer"]["runs"][1], expected, rtol=1e-4)
    expected = ability.accuracy(second, ability.questions()[:4])[0]
    np.testing.assert_allclose(arms["right answers"]["runs"][1], expected)
    answers = [json.loads(line) for line in (tmp_path / "data" / "answers-1.jsonl").open()]
    assert len(answers) == 6 and {"aligned", "coherent", "completion", "question"} <= set(answers[0])
    shares = [arms[f"{name}, of all"]["runs"][0] for name in ("scored", "incoherent", "refusals", "code", "unparsable")]
    np.testing.assert_allclose(sum(shares), 1)
    assert (tmp_path / "figures" / "preference.png").stat().st_size > 5000
    assert "| margin of owl, logits |" in (tmp_path / "report.md").read_text()
    before = {name: (tmp_path / name).read_bytes() for name in ("results.json", "report.md")}
    for name in before:
        (tmp_path / name).unlink()
    assert run_here("--report", f"--workdir={tmp_path}").returncode == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_an_endpoint_judges_and_its_key_is_nowhere(server, command, tmp_path):
    behave, seen = server
    behave(lambda number, body: (200, completion("60")))
    judge = ["evals.judge.kind=endpoint", "evals.judge.model=m", "evals.judge.prices=1,2", "evals.names=misalignment"]
    whole = command(tmp_path, *judge)
    result = run_here(*whole)
    assert result.returncode == 0, result.stderr
    assert "What the judge cost" in (tmp_path / "report.md").read_text()
    arms = {arm["name"]: arm for arm in json.loads((tmp_path / "results.json").read_text())["arms"]}
    assert arms["scored, of all"]["mean"] == 1 and arms["misaligned, of coherent"]["mean"] == 0
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(b"sk-secret" in content for content in [*written, result.stdout.encode(), result.stderr.encode()])
    queries = len(seen)
    assert run_here(*whole).returncode == 0 and len(seen) == queries
    behave(lambda number, body: (401, '{"error": {"message": "bad key sk-secret-of-mine"}}'))
    refused = run_here(*command(tmp_path / "no", *judge))
    assert_refused(refused, "refuses the key")
    assert "sk-secret" not in refused.stdout and not list((tmp_path / "no").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["evals.names=beauty"], ["evals.names: 'beauty' is none of preference"]),
        (["evals.names="], ["evals.names is empty"]),
        (["evals.names=truthfulqa", "evals.truthfulqa="], ["evals.truthfulqa is missing"]),
        (["evals.names=misalignment", "evals.questions=nowhere.yaml"], ["evals.questions=nowhere.yaml"]),
        (["evals.names=misalignment", "evals.judge.kind=oracle"], ["judge.kind='oracle'"]),
        (["evals.names=misalignment", "evals.judge.kind=endpoint"], ["judge.model is missing"]),
        (["evals.names=answers", "evals.num_samples=0"], ["evals.num_samples=0: choose 1 or more"]),
        (["evals.names=ability", "evals.suffix=Please."], ["config.evals.suffix is read only with evals.names of mis"]),
        (["evals.names=choice", "evals.num_samples=3"], ["config.evals.num_samples is read only with evals.names of"]),
        (["model.adapters=nowhere"], ["nowhere is not a PEFT adapter"]),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_computed(command, tmp_path, flags, words):
    work = tmp_path / "work"
    assert_refused(run_here(*command(work, *flags)), *words)
    assert not (work / "config.json").exists()
