"""Teachers × students over models: every cell of the matrix has the right two models."""

import json
import shutil

import pytest
from launch_kit import arms_in, assert_refused, assert_same_arms, finish, run_here, start_two
from safetensors.numpy import load_file, save_file

from configs import cross_model
from sublim_jax.experiments.transmission.cross_model import read


@pytest.fixture(scope="module")
def models(tiny_folder, tmp_path_factory):
    """The tiny model, and one with other weights."""
    other = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("models") / "other")
    tensors = load_file(other / "model.safetensors")
    changed = {name: tensor * (1.5 if "proj" in name else 1) for name, tensor in tensors.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    return str(tiny_folder), str(other)


@pytest.fixture(scope="module")
def command(models, flags):
    more = ["--config.study.carrier.max_new_tokens=64", "--config.study.student.steps=2"]
    study = flags(*more, prefix="--config.study.", leave_out=("model.name",))
    return ["--config=configs/cross_model.py:smoke", f"--config.models={','.join(models)}", *study]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(command, tmp_path):
    both = start_two(*command, f"--workdir={tmp_path / 'two'}")
    assert run_here(*command, f"--workdir={tmp_path / 'one'}").returncode == 0
    for process in both:
        finish(process)
    assert_same_arms(arms_in(tmp_path / "two"), arms_in(tmp_path / "one"), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_every_cell_of_the_matrix_is_of_its_teachers_and_students_models(models, command, tmp_path):
    result = run_here(*command, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    arms = arms_in(tmp_path)
    assert [(arm["teacher"], arm["student"]) for arm in arms] == [(t, s) for t in models for s in models]
    for teacher, row in enumerate((arms[:2], arms[2:])):
        whole = json.loads((tmp_path / f"teacher{teacher}" / "results.json").read_text())
        assert whole["config"]["model"]["name"] == models[teacher]
        for student, cell in enumerate(row):
            assert (whole["config"]["arm"][f"student{student}"]["model"] or models[teacher]) == models[student]
            assert cell["runs"] == next(a["runs"] for a in whole["arms"] if a["name"] == f"student{student}")
    assert len({arm["mean"] for arm in arms}) == 4 and 0 not in {arm["mean"] for arm in arms}
    assert (tmp_path / "figures" / "matrix.png").stat().st_size > 5000
    before = {name: (tmp_path / name).read_bytes() for name in ("results.json", "report.md")}
    for name in before:
        (tmp_path / name).unlink()
    assert run_here("--report", f"--workdir={tmp_path}").returncode == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_study_for_each_teacher_has_an_arm_for_each_student():
    config = cross_model.get_config("smoke")
    config.models = ("here/A", "there/A", "B/")
    spec = read(config)
    assert [study.model.name for study in spec.studies] == list(config.models)
    assert [[arm.model for arm in study.arms] for study in spec.studies] == [
        ["", "there/A", "B/"],
        ["here/A", "", "B/"],
        ["here/A", "there/A", ""],
    ]
    assert list(spec.labels.values()) == list(config.models)  # two of the names end alike
    config.models = ("here/A", "B/")
    assert list(read(config).labels.values()) == ["A", "B"]
    assert spec.studies[0].num_questions == 2 and spec.studies[0].evals.names == ()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["models=A"], ["models=('A',): name two models or more"]),
        (["models=A,B,A"], ["is there twice"]),
        (["study.model.name=C"], ["study.model.name='C': it follows from"]),
        (["study.arms=soft"], ["study.arms=('soft',): it follows from"]),
        (["study.arm.soft.noise=0.1"], ["config.study.arm.soft.noise: all students are of the arm cross"]),
        (["study.arm.cross.examples=8"], ["config.study.arm.cross.examples: rows in the context are of"]),
        (["study.arm.cross.fraction=0.3"], ["study.arm.cross.action is empty"]),
        (["study.packs.preference=nowhere.json"], ["pack nowhere.json", "--config.study.packs.preference"]),
        (["study.student.steps=0"], ["config.study: student.steps=0: choose 1 or more"]),
        (
            ["study.teacher.methods=corpus", "study.traits=good,bad"],
            ["study.traits=('good', 'bad') are no alternatives"],
        ),
    ],
)
def test_a_mistake_is_told_by_its_flag(flags, words, tmp_path):
    given = [f"--config.{flag}" for flag in flags]
    result = run_here("--config=configs/cross_model.py:smoke", *given, f"--workdir={tmp_path / 'work'}")
    assert_refused(result, *words)
    assert not (tmp_path / "work").exists()
