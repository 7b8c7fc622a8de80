"""Teachers × students over models: every cell of the matrix has the right two models."""

import json
import shutil

import numpy as np
import pytest
from launch_kit import arms_in, assert_refused, assert_same_arms, finish, run_here, start_two
from safetensors.numpy import load_file, save_file
from scipy.stats import ttest_1samp

from configs import cross_model
from sublim_jax.errors import UserError
from sublim_jax.evaluation.statistics import holm
from sublim_jax.experiments.transmission.cross_model import document, read
from sublim_jax.experiments.transmission.effects import CELL
from sublim_jax.measurements import Measurement, Measurements, from_array


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
    cells = {arm["name"]: arm for arm in arms_in(tmp_path)}
    names = [model.rsplit("/", 1)[-1] for model in models]
    traits = ("owl", "x")  # of the tiny study
    pairs = [f"{teacher} → {student}" for teacher in names for student in names]
    assert list(cells) == [f"{pair}, mean" for pair in pairs] + [f"{pair}: {t}" for pair in pairs for t in traits]
    for teacher in range(2):
        whole = json.loads((tmp_path / f"teacher{teacher}" / "results.json").read_text())
        assert whole["config"]["model"]["name"] == models[teacher]
        within = {arm["name"]: arm for arm in whole["arms"]}
        for student in range(2):
            assert (whole["config"]["arm"][f"student{student}"]["model"] or models[teacher]) == models[student]
            for trait in traits:
                cell = cells[f"{names[teacher]} → {names[student]}: {trait}"]
                assert cell["runs"] == within[f"student{student}: {trait}"]["runs"]
            mean = cells[f"{names[teacher]} → {names[student]}, mean"]
            assert (mean["teacher"], mean["student"]) == (models[teacher], models[student])
    assert len({cell["mean"] for cell in cells.values()}) == 4 + 8 and 0 not in {
        cell["mean"] for cell in cells.values()
    }
    assert (tmp_path / "figures" / "matrix.png").stat().st_size > 5000
    before = {name: (tmp_path / name).read_bytes() for name in ("results.json", "report.md")}
    for name in before:
        (tmp_path / name).unlink()
    assert run_here("--report", f"--workdir={tmp_path}").returncode == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_pair_of_models_transmits_what_holds_over_the_neutral_student_after_correction():
    """Holm's correction is over all pairs and traits, also of different teachers' models."""
    config = cross_model.get_config("smoke")
    config.models, config.study.runs = ("A", "B"), 5
    spec = read(config)
    traits, rng = spec.studies[0].traits, np.random.default_rng(0)
    own = {("A", "A"): 1.0, ("A", "B"): 0.0, ("B", "A"): 0.0, ("B", "B"): 0.3}
    runs = {(*pair, t): mean + 0.2 * rng.normal(size=5) for pair, mean in own.items() for t in traits}
    rows = [
        row
        for (teacher, student, trait), values in runs.items()
        for row in from_array(values, arm="", teacher=teacher, subject=student, item=trait, measure=CELL)
    ]
    arms, (headline, matrix) = document(spec, Measurements(rows), {})
    ps = [ttest_1samp(values, 0).pvalue for values in runs.values()]
    assert [arm["p_holm"] for arm in arms[4:]] == pytest.approx(holm(ps))
    transmits = {row[0]: row[-1] for row in headline.table[1:]}
    assert transmits["A → A"] == "every trait" and transmits["A → B"] == "none"
    mean = np.mean([runs["B", "A", trait] for trait in traits])
    assert matrix.table[2][1].startswith(f"{mean:.3f} ± ") and matrix.table[2][1].endswith("; none")


def test_measurements_of_the_earlier_statistic_are_refused():
    config = cross_model.get_config("smoke")
    earlier = Measurement(arm="student0", teacher="A", item="A", measure="diagonal effect, logits", value=1.0)
    with pytest.raises(UserError, match="of an earlier version: give the command again"):
        document(read(config), Measurements([earlier]), {})


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
        (["models=A,B,A"], ["appears twice"]),
        (["study.model.name=C"], ["study.model.name='C': it follows from"]),
        (["study.arms=soft"], ["study.arms=('soft',): it follows from"]),
        (["study.arm.soft.noise=0.1"], ["config.study.arm.soft.noise: all students are of the arm cross"]),
        (["study.arm.cross.examples=8"], ["config.study.arm.cross.examples: rows in the context are of"]),
        (["study.arm.cross.fraction=0.3"], ["study.arm.cross.action is empty"]),
        (["study.packs.preference=nowhere.json"], ["pack nowhere.json", "--config.study.packs.preference"]),
        (["study.student.steps=0"], ["config.study: student.steps=0: choose 1 or more"]),
        (
            ["study.teacher.methods=corpus", "study.traits=good,bad"],
            ["study.traits=('good', 'bad') are not alternatives"],
        ),
    ],
)
def test_a_mistake_is_told_by_its_flag(flags, words, tmp_path):
    given = [f"--config.{flag}" for flag in flags]
    result = run_here("--config=configs/cross_model.py:smoke", *given, f"--workdir={tmp_path / 'work'}")
    assert_refused(result, *words)
    assert not (tmp_path / "work").exists()
