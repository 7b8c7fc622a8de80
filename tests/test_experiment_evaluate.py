"""Evaluations as a user runs them: files in, a table, a figure and every answer out."""

import json

import jax
import numpy as np
import pytest
import yaml
from test_judges import completion
from test_launch import assert_refused, launch
from test_misalignment import one
from test_truthfulqa import HEADER, ROWS

from sublim_jax.evaluation import ability, truthfulqa
from sublim_jax.models import lora
from sublim_jax.weights import peft


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("files")
    (folder / "truthfulqa.csv").write_text(HEADER + ROWS)
    (folder / "questions.yaml").write_text(yaml.safe_dump([one(), one(id="x", paraphrases=["Why?", "How?"])]))
    spec = lora.Lora(2, 4)
    for number in range(2):
        start = lora.init(jax.random.key(number), tiny.params, spec)
        noise = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(9), x.shape), start)
        peft.save(folder / f"run{number}", noise, spec, tiny.settings, tiny.config)
    return folder


def command(tiny_folder, files, work, *more):
    return [
        "--config=configs/evaluate.py",
        f"--config.model.name={tiny_folder}",
        "--config.words=owl,x,y",
        "--config.samples=2",
        "--config.max_new_tokens=6",
        f"--config.truthfulqa={files / 'truthfulqa.csv'}",
        f"--config.questions={files / 'questions.yaml'}",
        f"--workdir={work}",
        *more,
    ]


def test_all_evaluations_of_two_runs_end_in_a_table_a_figure_and_answers(tiny, tiny_folder, files, tmp_path):
    everything = "--config.evaluations=preference,prefixed,choice,answers,stories,ability,truthfulqa,misalignment"
    adapters = f"--config.model.adapters={files / 'run0'},{files / 'run1'}"
    result = launch(*command(tiny_folder, files, tmp_path, everything, adapters))
    assert result.returncode == 0, result.stderr
    arms = {arm["name"]: arm for arm in json.loads((tmp_path / "results.json").read_text())["arms"]}
    spec, adapter = peft.load(files / "run1", tiny.settings, tiny.config)
    second = tiny.merged(adapter, spec)
    items = truthfulqa.load(files / "truthfulqa.csv")
    np.testing.assert_allclose(
        arms["P of the false answer"]["runs"][1], truthfulqa.choose(second, items).mean(), rtol=1e-4
    )
    np.testing.assert_allclose(arms["right answers"]["runs"][1], ability.accuracy(second, ability.questions())[0])
    answers = [json.loads(line) for line in (tmp_path / "data" / "answers-1.jsonl").open()]
    assert len(answers) == 6 and {"aligned", "coherent", "completion", "question"} <= set(answers[0])
    shares = [arms[f"{name}, of all"]["runs"][0] for name in ("scored", "incoherent", "refusals", "code", "unparsable")]
    np.testing.assert_allclose(sum(shares), 1)
    assert (tmp_path / "figures" / "preference.png").stat().st_size > 5000
    assert "| margin of owl, logits |" in (tmp_path / "report.md").read_text()


def test_an_endpoint_judges_and_its_key_is_nowhere(server, tiny_folder, files, tmp_path):
    behave, seen = server
    behave(lambda number, body: (200, completion("60")))
    judge = ["--config.judge.kind=endpoint", "--config.judge.model=m", "--config.judge.prices=1,2"]
    whole = command(tiny_folder, files, tmp_path, "--config.evaluations=misalignment", *judge)
    result = launch(*whole)
    assert result.returncode == 0, result.stderr
    assert "What the judge cost" in (tmp_path / "report.md").read_text()
    arms = {arm["name"]: arm for arm in json.loads((tmp_path / "results.json").read_text())["arms"]}
    assert arms["scored, of all"]["mean"] == 1 and arms["misaligned, of coherent"]["mean"] == 0
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(b"sk-secret" in content for content in [*written, result.stdout.encode(), result.stderr.encode()])
    asked = len(seen)
    assert launch(*whole).returncode == 0 and len(seen) == asked
    behave(lambda number, body: (401, '{"error": {"message": "bad key sk-secret-of-mine"}}'))
    refused = launch(*command(tiny_folder, files, tmp_path / "no", "--config.evaluations=misalignment", *judge))
    assert_refused(refused, "refuses the key")
    assert "sk-secret" not in refused.stdout and not list((tmp_path / "no").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.evaluations=beauty"], ["evaluations: 'beauty' is none of preference"]),
        (["--config.evaluations=truthfulqa", "--config.truthfulqa="], ["truthfulqa is missing"]),
        (["--config.evaluations=misalignment", "--config.questions=nowhere.yaml"], ["nowhere.yaml"]),
        (["--config.evaluations=misalignment", "--config.judge.kind=oracle"], ["judge.kind='oracle'"]),
        (["--config.evaluations=misalignment", "--config.judge.kind=endpoint"], ["judge.model is missing"]),
        (["--config.model.adapters=nowhere"], ["nowhere is no PEFT adapter"]),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_computed(tiny_folder, files, tmp_path, flags, words):
    work = tmp_path / "work"
    assert_refused(launch(*command(tiny_folder, files, work, *flags)), *words)
    assert not (work / "config.json").exists()
