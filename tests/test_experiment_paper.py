"""The plan of the paper's experiments, and teachers × students over models."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file
from test_experiment_numbers import FLAGS
from test_launch import assert_refused, launch

from configs import paper as paper_config
from sublim_jax.experiments import paper
from sublim_jax.experiments.transmission import check


def test_a_plan_runs_what_it_can_says_what_it_lacks_and_repeats_nothing(tmp_path):
    command = ["--config=configs/paper.py:smoke", "--config.experiments=theorem,misalignment", f"--workdir={tmp_path}"]
    command.append("--config.files.insecure=nowhere.jsonl")
    first = launch(*command)
    assert_refused(first, "1 of 2 experiments have no results: misalignment")
    assert first.stdout.index("misalignment: not run") < first.stdout.index("experiment 1 of 2: theorem")
    text = (tmp_path / "report.md").read_text()
    assert "| theorem: the one-step theorem | §6.1, App. C | a proof |" in text and "rows as predicted" in text
    assert "not run: 'nowhere.jsonl' is no file here" in text
    assert (tmp_path / "figures" / "theorem.png").stat().st_size > 5000
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert arms and all(arm["name"].startswith("theorem: ") for arm in arms)
    before = (tmp_path / "theorem" / "results.json").stat().st_mtime_ns
    assert launch(*command).returncode == 2
    assert (tmp_path / "theorem" / "results.json").stat().st_mtime_ns == before
    assert (tmp_path / "report.md").read_text() == text


@pytest.mark.parametrize("preset", ["smoke", "qwen2.5-7b", "llama-3.1-8b", "gemma-3-4b"])
def test_every_experiment_of_the_plan_is_a_config_that_passes_its_checks(tmp_path, preset, monkeypatch):
    """With the files that a user brings; and each of those reaches the experiments that ask for it."""
    config = paper_config.get_config(preset)
    assert set(config.experiments) == set(config.plan)
    given = {"questions": "questions.yaml", "truthfulqa": "truth.csv"}
    given |= {name: f"{name}.jsonl" for name in ("insecure", "secure", "educational")}
    for name, file in given.items():
        config.files[name] = f"configs/smoke/{file}"
    config.files.problems = str(tmp_path / "problems.jsonl")  # as many as GSM8K has
    (tmp_path / "problems.jsonl").write_text('{"question": "1 and 1?", "answer": "#### 2"}\n' * 7473)
    config.tensor, config.judge.kind, config.judge.model = 1, "local", "smollm2-135m-instruct"
    for name in config.experiments:
        one = paper.config_of(config, name)
        if one.experiment == "transmission":
            check(one)
            assert one.mesh.tensor == 1 and one.ask.judge.model == "smollm2-135m-instruct"
            if "misalignment" in one.ask.evaluations:
                assert one.ask.questions == "configs/smoke/questions.yaml"


def test_an_unknown_experiment_is_told_in_one_line(tmp_path):
    result = launch("--config=configs/paper.py:smoke", "--config.experiments=owls", f"--workdir={tmp_path / 'work'}")
    assert_refused(result, "experiments: 'owls' is none of")
    assert not (tmp_path / "work").exists()


def test_every_cell_of_the_matrix_is_of_its_teachers_and_students_models(tiny_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tensors = load_file(other / "model.safetensors")
    changed = {name: tensor * (1.5 if "proj" in name else 1) for name, tensor in tensors.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    models = (str(tiny_folder), str(other))
    study = [flag.replace("--config.", "--config.study.") for flag in FLAGS if "steps=6" not in flag]
    study.append("--config.study.carrier.max_new_tokens=64")
    work = f"--workdir={tmp_path / 'work'}"
    result = launch("--config=configs/cross_model.py:smoke", f"--config.models={','.join(models)}", *study, work)
    assert result.returncode == 0, result.stderr
    arms = json.loads((tmp_path / "work" / "results.json").read_text())["arms"]
    assert [(arm["teacher"], arm["student"]) for arm in arms] == [(one, two) for one in models for two in models]
    for teacher, rows in enumerate((arms[:2], arms[2:])):
        whole = json.loads((tmp_path / "work" / f"teacher{teacher}" / "results.json").read_text())
        assert whole["config"]["model"]["name"] == models[teacher]
        for student, cell in enumerate(rows):
            assert (whole["config"]["arm"][f"student{student}"]["model"] or models[teacher]) == models[student]
            assert cell["runs"] == next(a["runs"] for a in whole["arms"] if a["name"] == f"student{student}")
    assert len({arm["mean"] for arm in arms}) == 4 and 0 not in {arm["mean"] for arm in arms}
    assert (tmp_path / "work" / "figures" / "matrix.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["numbers", "misalignment", "code", "cot", "cross_model"])
def test_smoke_runs_every_stage_on_real_models(tmp_path, name):
    result = launch(f"--config=configs/{name}.py:smoke", f"--workdir={tmp_path}", timeout=1200)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["arms"]) >= 4 and list((tmp_path / "figures").glob("*.png"))
