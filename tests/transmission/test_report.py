"""Outputs of a finished study: a matrix, tables, figures and measurements; --report writes them again."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from launch_kit import assert_refused, run_here
from scipy import stats

from bench.docs import RESULTS, Run
from sublim_jax import measurements, report, weights
from sublim_jax.evaluation import preference
from sublim_jax.experiments.transmission.report import document
from sublim_jax.experiments.transmission.teachers import phrasings
from sublim_jax.measurements import Measurement
from sublim_jax.weights import peft

COLUMNS = ["experiment", "arm", "run", "teacher", "subject", "measure", "item", "step", "value"]


def results_in(work):
    return json.loads((work / "results.json").read_text())


def test_a_study_ends_in_a_matrix_a_table_and_numbers(whole):
    work, screen = whole
    results = results_in(work)
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert {"soft", "tokens_fresh", "perturbed", "in_context"} <= set(arms)
    assert "soft: student of owl, margin of x over the neutral student's" in arms
    assert all(len(arm["runs"]) == 2 for arm in results["arms"] if arm.get("subject") != "the model as it is")
    assert arms["soft: owl"]["runs"] == arms["soft: student of owl, margin of owl over the neutral student's"]["runs"]
    assert arms["soft: owl"]["p_holm"] >= arms["soft: owl"]["p"]
    assert "soft, student of owl: answers with owl" in arms and "teacher x: P of x's letter" in arms
    soft = arms["soft"]
    np.testing.assert_allclose(soft["runs"], np.mean([soft["by_trait"][t] for t in ("owl", "x")], 0))
    assert soft["held_out"][1] < soft["held_out"][0] and set(soft["coverage"]) == {"own", "others", "neutral"}
    assert arms["perturbed"]["coverage"] is None and arms["in_context"]["held_out"] is None
    for figure in ("arms", "matrix-soft", "margins-soft", "matrix-in_context", "margins-tokens_fresh"):
        assert (work / "figures" / f"{figure}.png").stat().st_size > 5000
    text = (work / "report.md").read_text()
    parts = (
        "## Each trait in the students of its teacher",
        "## Arms compared",
        "a single log-odds difference",
        "| neutral |",
        "P(own trait) among numbers",
        "## Filters",
        "answers with owl",
        "by x",
    )
    for words in (*parts, "KL(teacher ‖ student)"):
        assert words in text
    assert "teacher owl" in screen and "students soft, 2 run(s) × 3 teachers" in screen
    assert (work / "data" / "run1" / "numbers-owl-rejected.jsonl").exists()


def test_log_p_shows_what_a_margin_is_made_of():
    """Of shipped measurements: log P by hand from the table, and the margin is what it says."""
    folder = RESULTS / "numbers-smollm2"
    run = Run(folder)
    (section,) = (section for section in run.sections if section.title == "log P of each trait")
    log_p = {}
    for row in pq.read_table(folder / "measurements.parquet").to_pylist():
        if row["measure"] == "log_p" and row["subject"] == "student" and row["step"] == 60:
            log_p[row["run"], row["teacher"], row["item"]] = row["value"]
    arms = {arm["name"]: arm for arm in run.arms}
    words = run.spec.alternatives
    for line in section.table[1:]:
        teacher = line[1]
        changes = {
            word: [log_p[number, teacher, word] - log_p[number, "neutral", word] for number in range(5)]
            for word in words
        }
        others = np.mean([changes[word] for word in words if word != teacher], 0)
        for cell, values in zip(line[2:], [*(changes[trait] for trait in run.spec.traits), others]):
            half_width = stats.t.ppf(0.975, 4) * stats.sem(values)
            assert cell == f"{np.mean(values):.3f} ± {half_width:.3f}"
        np.testing.assert_allclose(np.subtract(changes[teacher], others), arms[f"soft: {teacher}"]["runs"], atol=1e-5)
        name = f"soft: student of {teacher}, log P of {teacher} over the neutral student's"
        np.testing.assert_allclose(arms[name]["runs"], changes[teacher])


def test_students_and_teachers_are_left_as_peft_folders(whole, study):
    """Loaded, applied to the plain model and evaluated again, they give the margins of the results."""
    work, _ = whole
    arms = {arm["name"]: arm["runs"] for arm in results_in(work)["arms"]}
    base = weights.load(study.model.name)
    margin = {}
    for name in ("owl", "x", "neutral"):
        spec, adapters = peft.load(work / "adapters" / f"run1-soft-{name}", base.settings, base.config)
        merged = base.merged(adapters, spec)
        margin[name] = preference.measure(merged, phrasings(study), list(study.alternatives)).margin[0]
    for name in ("owl", "x"):
        for column, trait in enumerate(("owl", "x")):
            expected = arms[f"soft: student of {name}, margin of {trait} over the neutral student's"][1]
            np.testing.assert_allclose(margin[name][column] - margin["neutral"][column], expected, atol=1e-4)
    assert (work / "adapters" / "run0-teacher-neutral" / "adapter_config.json").exists()
    assert not list((work / "adapters").glob("*perturbed*"))  # its base is not a published model


# ---------------------------------------------------------------------------------------------------- measurements


def test_the_table_of_measurements_is_read_by_others(whole):
    table = pq.read_table(whole[0] / "measurements.parquet")
    assert table.column_names == COLUMNS
    kinds = {name: str(table.schema.field(name).type) for name in COLUMNS}
    assert kinds == dict.fromkeys(COLUMNS, "string") | {"run": "int32", "step": "int64", "value": "double"}
    assert set(table["experiment"].to_pylist()) == {"transmission"}
    rows = table.to_pylist()
    margins = [
        row
        for row in rows
        if (row["arm"], row["measure"], row["item"], row["teacher"], row["step"]) == ("soft", "margin", "x", "owl", 6)
    ]
    assert [row["run"] for row in margins] == [0, 1] and {row["subject"] for row in margins} == {"student"}
    assert {row["subject"] for row in rows} == {"student", "teacher", "base"}
    assert {row["step"] for row in rows if row["arm"] == "soft"} == {0, 3, 6}


def test_every_number_of_the_results_is_of_the_table(whole):
    """Computed by hand for one cell and one evaluation."""
    work, _ = whole
    arms = {arm["name"]: arm["runs"] for arm in results_in(work)["arms"]}
    rows = measurements.read(epath.Path(work))
    owl, neutral = (rows.values(arm="soft", measure="margin", item="x", teacher=t, step=6) for t in ("owl", "neutral"))
    expected = arms["soft: student of owl, margin of x over the neutral student's"]
    np.testing.assert_array_equal(np.subtract(owl, neutral), expected)
    given = {"arm": "soft", "measure": "answers", "item": "answers with owl", "teacher": "owl"}
    assert rows.values(**given) == arms["soft, student of owl: answers with owl"]


def test_a_table_is_written_as_it_is_read(tmp_path):
    rows = [Measurement("a", "margin", 1.5, run=1, teacher="owl", subject="student", item="ö", step=3)]
    rows.append(Measurement("", "steps", float("nan")))
    folder = epath.Path(tmp_path)
    measurements.write(folder, "any", rows)
    table = measurements.read(folder)
    assert table[0] == rows[0] and np.isnan(table[1].value) and table[1][:2] == ("", "steps")
    assert table.where(arm="a").values(measure="margin") == [1.5] and table.names("arm") == ["a", ""]


# ------------------------------------------------------------------------------------------------------- --report


def forbidden(*args, **options):
    raise AssertionError("a report computes nothing")


def test_the_report_is_written_again_from_measurements_alone(copy_of_whole, monkeypatch):
    """To the byte, from the table, the notes and the config."""
    work = copy_of_whole
    before = {path.relative_to(work): path.read_bytes() for path in work.rglob("*") if path.is_file()}
    for path in before:
        if path.name not in ("measurements.parquet", "about.json", "config.json"):
            (work / path).unlink()
    monkeypatch.setattr(weights, "load", forbidden)
    monkeypatch.setattr(jax, "jit", forbidden)
    result = run_here("--report", f"--workdir={work}")
    assert result.returncode == 0, result.stderr
    for name in ("results.json", "report.md", "measurements.parquet", "about.json", "config.json"):
        assert (work / name).read_bytes() == next(text for path, text in before.items() if path.name == name), name
    figures = {path.name for path in before if path.parent.name == "figures"}
    assert figures == {path.name for path in (work / "figures").iterdir()}


def test_a_report_is_a_function_of_the_table(copy_of_whole):
    """Changed numbers in it change the results of the same arms."""
    folder = epath.Path(copy_of_whole)
    rows = measurements.read(folder)
    doubled = [row._replace(value=2 * row.value) if row.measure == "margin" else row for row in rows]
    before = results_in(copy_of_whole)["arms"]
    measurements.write(folder, "transmission", doubled)
    assert run_here("--report", f"--workdir={copy_of_whole}").returncode == 0
    after = results_in(copy_of_whole)["arms"]
    assert [arm["name"] for arm in after] == [arm["name"] for arm in before]
    np.testing.assert_allclose(after[0]["runs"], 2 * np.asarray(before[0]["runs"]))


def test_a_report_of_nothing_is_refused(copy_of_whole, tmp_path):
    assert_refused(run_here("--report", f"--workdir={tmp_path / 'nowhere'}"), "holds no run")
    assert_refused(run_here("--report", "--config=configs/numbers.py"), "--report goes with --workdir=DIR alone")
    (copy_of_whole / "measurements.parquet").unlink()
    assert_refused(run_here("--report", f"--workdir={copy_of_whole}"), "holds no measurements of a run")


def test_a_study_that_was_stopped_after_an_arm_has_the_report_of_that_arm(whole, study_of):
    """Arms without rows are left out of the document."""
    rows = measurements.read(epath.Path(whole[0]))
    study = study_of(arms=("soft", "tokens_fresh"), runs=2)
    soft_rows = rows.where(arm="soft")
    teachers = measurements.Measurements(row for row in rows if not row.arm and row.subject == "teacher")
    notes = json.loads((whole[0] / "about.json").read_text())["notes"]
    arms, sections = document(study, measurements.Measurements((*teachers, *soft_rows)), notes)
    assert arms[0]["name"] == "soft: owl" and not any(arm["name"].startswith("tokens") for arm in arms)
    assert [section.title for section in sections if section.title.startswith("Students")] == ["Students: soft"]
    assert sections[0].text == "1 of 2 arms so far; still to come: tokens_fresh."


def test_a_control_is_a_row_of_the_matrix_and_part_of_no_test(whole, study_of):
    """A control whose students are those of x: the same differences, and the same statistics without it."""
    rows = measurements.read(epath.Path(whole[0]))
    notes = json.loads((whole[0] / "about.json").read_text())["notes"]
    kept = [row for row in rows if row.arm in ("", "soft") and row.measure != "coverage" and row.subject != "base"]
    kept = [row for row in kept if not row.item.startswith(("answers", "P of"))]
    more = [row._replace(teacher="oak") for row in kept if row.teacher == "x"]
    more += [row._replace(item="oak") for row in (*kept, *more) if row.measure == "inside_numbers" and row.item == "x"]
    order = {"": 0, "owl": 0, "x": 1, "oak": 2, "neutral": 3}
    both = measurements.Measurements(sorted((*kept, *more), key=lambda row: order[row.teacher]))
    given = {"arms": ("soft",), "runs": 2}
    before, _ = document(study_of(**given), measurements.Measurements(kept), notes)
    arms, sections = document(study_of(controls=("tree:oak",), **given), both, notes)
    after = {arm["name"]: arm for arm in arms}
    means = {"held_out": None, "ability": None}  # over all students
    assert all({**after[arm["name"]], **means} == {**arm, **means} for arm in before)
    (table,) = (section.table for section in sections if section.title == "Students: soft")
    assert [row[0] for row in table[1:]] == ["owl", "x", "oak", "neutral"] and table[3][1:] == table[2][1:]
    assert len(after) == len(before) + 4  # margin and log P of two traits in the control's row


def test_ability_at_the_end_is_told_apart_from_ability_along_training(whole, study_of):
    """Both are measurements of students with the same name; only the evaluation's rows have an item."""
    rows = measurements.read(epath.Path(whole[0]))
    study = study_of(arms=("soft",), runs=2, **{"evals.names": ("ability",)})
    notes = json.loads((whole[0] / "about.json").read_text())["notes"]
    axes, about = {"run": range(2), "teacher": study.teachers}, {"measure": "ability", "item": "right answers"}
    more = measurements.from_array([0.5], arm="", subject="base", **about)
    more += measurements.from_array([0.5] * 6, axes, arm="", subject="teacher", **about)
    more += measurements.from_array([0.25] * 6, axes, arm="soft", subject="student", **about)
    arms = {arm["name"]: arm for arm in document(study, measurements.Measurements((*rows, *more)), notes)[0]}
    before = {arm["name"]: arm for arm in results_in(whole[0])["arms"]}
    assert arms["soft"]["ability"] == before["soft"]["ability"]
    assert arms["soft, student of owl: right answers"]["runs"] == [0.25, 0.25]
    assert arms["the model as it is: right answers"]["runs"] == [0.5]


def test_a_folder_of_no_known_experiment_has_no_report(tmp_path):
    (tmp_path / "config.json").write_text('{"experiment": "lab"}')
    assert_refused(run_here("--report", f"--workdir={tmp_path}"), "holds a run of an unknown experiment")


@pytest.mark.parametrize("name", ["about.json", "measurements.parquet"])
def test_a_damaged_table_is_told_in_one_line(copy_of_whole, name):
    (copy_of_whole / name).write_bytes((copy_of_whole / name).read_bytes()[:-9])
    assert_refused(run_here("--report", f"--workdir={copy_of_whole}"), "holds no measurements of a run")


def test_brackets_in_a_table_are_not_markup(tmp_path, capsys):
    spec = SimpleNamespace(experiment="numbers", preset="smoke", values={})
    table = [["why"], ['after [/INST], see "sublim_jax[judge]" and :owl:']]
    report.finish(epath.Path(tmp_path), spec, [], lambda *_: ([], [report.Section("[title]", "", table, {})]))
    printed = capsys.readouterr().out
    assert table[1][0] in printed and "[title]" in printed
