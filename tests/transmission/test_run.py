"""Whole studies from the command line: stopped, killed, of corpora, with changed files."""

import itertools
import json
import signal

import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from launch_kit import arms_in, finish, run_here, run_stopped, start, wait_for

from sublim_jax.experiments.transmission import run
from sublim_jax.store import Store
from sublim_jax.training import Program

TRAINING, WRITING = "students-tokens_fresh-*.training/2", "completions-x*"  # files that a stage makes
STAGES = {
    TRAINING: ("*tokens_fresh-*",),  # with measurements along training
    WRITING: ("completions-x*",),  # later artefacts are named by their content
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [TRAINING, WRITING])
def test_stopped_by_a_signal_it_goes_on_to_the_same_results(whole_command, copy_of_whole, stage):
    """The artefacts of a stage are deleted, and the run that makes them again is stopped in between."""
    work, expected = copy_of_whole, arms_in(copy_of_whole)
    gone = [path for pattern in STAGES[stage] for path in (work / "checkpoints").glob(pattern)]
    for path in gone:
        path.rename(work / f"old-{path.name}")
    assert gone and not list((work / "checkpoints").glob(stage))
    (work / "results.json").unlink()
    stopped = run_stopped(*whole_command(work), folder=work, pattern=f"checkpoints/{stage}")
    assert stopped.returncode == 143 and "the same command resumes" in stopped.stdout
    again = run_here(*whole_command(work))
    assert again.returncode == 0, again.stderr
    for number in range(2):  # finished artefacts are not made again
        assert f"run {number}, teacher owl" not in again.stdout
    assert arms_in(work) == expected
    made = {path.name for path in (work / "checkpoints").iterdir()}
    assert {path.name for path in gone} <= made and not any(name.endswith(".training") for name in made)


def test_the_students_base_has_its_own_noise_in_every_run(study_of, model, replicate_of, tmp_path, monkeypatch):
    """With one draw for all runs, an interval would be of that draw."""
    study = study_of(arms=("perturbed",), runs=3)
    bases = []

    def nothing(subject):
        return {}

    monkeypatch.setattr(run, "train_arm", lambda *given: bases.append(given[4].params))
    monkeypatch.setattr(run, "_measured", lambda *given: [])
    replicates = [replicate_of(study, number) for number in range(study.runs)]
    run.measure_arm(study, study.arms[0], nothing, replicates, model, Store(tmp_path))
    assert len(bases) == 3
    shared, *own = (np.asarray(ravel_pytree(params)[0]) for params in (model.params, *bases))
    for one, other in itertools.combinations([base - shared for base in own], 2):
        assert np.std(one) > 0 and abs(np.corrcoef(one, other)[0, 1]) < 0.2
    bases.clear()
    run.measure_arm(study, study.arms[0], nothing, replicates[1:], model, Store(tmp_path))
    np.testing.assert_array_equal(ravel_pytree(bases[0])[0], own[1])  # it is of the run, not of its place


def test_a_finished_study_is_reported_again_without_training(whole_command, copy_of_whole, monkeypatch):
    monkeypatch.setattr(Program, "init", lambda *_: pytest.fail("what is there was to be trained again"))
    before = {path: path.read_bytes() for path in (copy_of_whole / "checkpoints").rglob("*") if path.is_file()}
    expected, about = arms_in(copy_of_whole), json.loads((copy_of_whole / "about.json").read_text())
    about["versions"]["commit"] = "of the measurements"
    (copy_of_whole / "about.json").write_text(json.dumps(about))
    again = run_here(*whole_command(copy_of_whole))
    assert again.returncode == 0 and "students soft," not in again.stdout and ", teacher owl" not in again.stdout
    # On the way, a report of the first arms alone would replace the whole one.
    assert again.stdout.count("report: ") == 1
    assert arms_in(copy_of_whole) == expected
    results = json.loads((copy_of_whole / "results.json").read_text())
    assert results["versions"]["commit"] == "of the measurements"
    assert {path: path.read_bytes() for path in (copy_of_whole / "checkpoints").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_killed_in_any_stage_it_ends_with_the_same_results(whole_command, tmp_path):
    """With arms of every kind."""
    arms = ("soft", "tokens_fresh", "shuffled_across", "perturbed", "masked", "in_context")
    expected, work = tmp_path / "whole", tmp_path / "killed"
    finish(start(*whole_command(expected, arms)))
    for stage in ("students-soft-*", "completions-x*", "preference-tokens*"):
        process = start(*whole_command(work, arms))
        assert wait_for(process, work, f"checkpoints/{stage}"), stage
        process.kill()
        assert process.wait() == -signal.SIGKILL, stage
    finish(start(*whole_command(work, arms)))
    assert arms_in(work) == arms_in(expected)


@pytest.mark.slow
def test_a_study_of_corpora_ends_in_rates_for_teachers_students_and_controls(tiny_folder, flags, files, tmp_path):
    given = [f"--config.teacher.corpora.{name}={files / name}.jsonl" for name in ("insecure", "secure", "educational")]
    given += [f"--config.evals.truthfulqa={files / 'truthfulqa.csv'}"]
    given += [f"--config.evals.questions={files / 'questions.yaml'}", "--config.evals.max_new_tokens=4"]
    given += ["--config.filter.judge=reference", "--config.evals.judge.min_mass=0", "--config.runs=2"]
    given += ["--config.carrier.num_completions=72", f"--workdir={tmp_path}"]
    words = flags(*given, leave_out=("traits",))
    result = run_here("--config=configs/misalignment.py:smoke", *words)
    assert result.returncode == 0, result.stderr
    arms = {arm["name"]: arm for arm in arms_in(tmp_path)}
    for subject in ("teacher insecure", "teacher educational", "tokens_fresh, student of insecure"):
        assert len(arms[f"{subject}: P of the false answer"]["runs"]) == 2
        assert f"{subject}: misaligned, of coherent" in arms
    secure, neutral = (arms[f"tokens_fresh, student of {name}: MC2"] for name in ("secure", "neutral"))
    np.testing.assert_allclose(secure["over_neutral"], np.subtract(secure["runs"], neutral["runs"]))
    text = (tmp_path / "report.md").read_text()
    parts = ("## Evaluation: misalignment", "| insecure | 6 of 6 |", "has it", "## Judge", "area under ROC", "no score")
    for words in parts:
        assert words in text
    for figure in ("truthfulqa", "judge-roc"):
        assert (tmp_path / "figures" / f"{figure}.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["numbers", "misalignment", "code", "cot", "cross_model"])
def test_smoke_runs_every_stage_on_real_models(tmp_path, name):
    finish(start(f"--config=configs/{name}.py:smoke", f"--workdir={tmp_path}"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["arms"]) >= 4 and list((tmp_path / "figures").glob("*.png"))
