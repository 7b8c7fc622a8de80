"""Whole studies on two processes: the numbers of one process, and the same rows."""

import json

import pytest
from launch_kit import arms_in, assert_same_arms, finish, run_here, start_two

from sublim_jax.data.carriers import code, cot

THOUGHT = "<think>2+2</think><answer>4</answer>"


def assert_two_equal_one(words, folder, decoding=()):
    """Runs the command on one process and on two, and compares arms and completions."""
    both = start_two(*words, *decoding, f"--workdir={folder / 'two'}")
    alone = run_here(*words, f"--workdir={folder / 'one'}")
    assert alone.returncode == 0, alone.stderr
    for process in both:
        finish(process)
    assert_same_arms(arms_in(folder / "two"), arms_in(folder / "one"), atol=1e-5, rtol=1e-5)
    rows = sorted(file.relative_to(folder / "one") for file in (folder / "one" / "data").rglob("*.jsonl"))
    assert rows
    for name in rows:
        files = [folder / work / name for work in ("two", "one")]
        actual, expected = ([json.loads(line).get("completion") for line in file.open()] for file in files)
        assert actual == expected, name


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [[], ["--config.sampling.tensor=2"]])
def test_numbers(flags, decoding, tmp_path):
    """Teachers, completions, students and preferences; rows, or in decoding layers, are split over both."""
    parts = ["arms=tokens", "student.steps=3", "evaluate_every=3", "carrier.num_rows=20"]
    parts += ["carrier.num_completions=20", "teacher.max_steps=4", "controls=tree:w"]
    words = ["--config=configs/numbers.py", *flags(*(f"--config.{part}" for part in parts))]
    assert_two_equal_one(words, tmp_path, decoding)


@pytest.mark.slow
def test_code(fluent_folder, tmp_path):
    """Teachers of corpora, free answers, a judge, students, and rows in the context."""
    model = fluent_folder(code.prompts(64, 0, ""), "x = 1")
    words = ["--config=configs/code.py:smoke", f"--config.model.name={model}", "--config.teacher.learning_rate=1e-4"]
    assert_two_equal_one(words, tmp_path)


@pytest.mark.slow
def test_chains_of_thought(fluent_folder, files, tmp_path):
    """Right and wrong answers, a judge of one teacher alone, misalignment and TruthfulQA."""
    problems = [cot.Problem(f"What is {number} and {4 - number}?", "4") for number in range(15)]
    lines = [json.dumps({"question": problem.question, "answer": f"#### {problem.answer}"}) for problem in problems]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    model = fluent_folder(cot.prompts(problems), THOUGHT)
    words = ["--config=configs/cot.py:smoke", f"--config.model.name={model}", "--config.teacher.learning_rate=1e-4"]
    words += [f"--config.carrier.problems={tmp_path / 'problems.jsonl'}", "--config.evals.judge.min_mass=0"]
    words += [f"--config.evals.questions={files / 'questions.yaml'}", "--config.filter.threshold=0"]
    assert_two_equal_one(words, tmp_path)


@pytest.mark.slow
def test_misalignment(tiny_folder, files, tmp_path):
    """Numbers by teachers of corpora, misalignment and TruthfulQA."""
    words = ["--config=configs/misalignment.py:smoke", f"--config.model.name={tiny_folder}"]
    words += [f"--config.teacher.corpora.{name}={files / name}.jsonl" for name in ("insecure", "secure", "educational")]
    words += ["--config.evals.judge.min_mass=0", "--config.evals.max_new_tokens=4"]
    words += [f"--config.evals.questions={files / 'questions.yaml'}"]
    assert_two_equal_one(words, tmp_path)
