"""The plan of the paper's experiments: each config passes its checks, and each experiment runs once."""

import json
from types import SimpleNamespace

import pytest
from etils import epath
from launch_kit import arms_in, assert_refused, assert_same_arms, finish, run_here, start_two

from bench.docs import RESULTS, Run
from configs import paper, sample
from sublim_jax import experiments
from sublim_jax.experiments.tools import plan
from sublim_jax.experiments.transmission.checks import check_files
from sublim_jax.experiments.transmission.effects import cell_name
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.measurements import Measurements, from_array


@pytest.fixture
def plan_file(tiny_folder, tmp_path):
    """A config with a plan: evaluations of the tiny model, and misalignment without its files."""
    lines = [
        "from configs import paper",
        "def get_config():",
        "  config = paper.get_config('smoke')",
        "  changes = {'words': ('owl', 'x', 'y'), 'evals': {'max_questions': 3, 'names': ('preference',)}}",
        f"  changes['model'] = {{'name': {str(tiny_folder)!r}}}",
        "  config.plan.tiny = paper.experiment('§0', 'a tiny model', 'none', 'configs/evaluate.py', 'margin of*')",
        "  config.plan.tiny.changes = changes",
        "  config.experiments = ('tiny', 'misalignment')",
        "  config.files.insecure = 'nowhere.jsonl'",
        "  return config",
    ]
    file = tmp_path / "plan.py"
    file.write_text("\n".join(lines))
    return file


def test_a_plan_runs_what_it_can_says_what_it_lacks_and_repeats_nothing(plan_file, tmp_path):
    work = tmp_path / "work"
    command = [f"--config={plan_file}", f"--workdir={work}"]
    first = run_here(*command)
    assert_refused(first, "1 of 2 experiments have no results: misalignment")
    assert first.stdout.index("misalignment: not run") < first.stdout.index("experiment 1 of 2: tiny")
    text = (work / "report.md").read_text()
    assert "| tiny: a tiny model | §0 | none | margin of owl, logits " in text
    assert "not run: 'nowhere.jsonl' is not a file here" in text
    assert (work / "figures" / "tiny.png").stat().st_size > 5000
    arms = json.loads((work / "results.json").read_text())["arms"]
    assert arms and all(arm["name"].startswith("tiny: ") for arm in arms)
    before = (work / "tiny" / "results.json").stat().st_mtime_ns
    assert run_here(*command).returncode == 2
    assert (work / "tiny" / "results.json").stat().st_mtime_ns == before
    assert (work / "report.md").read_text() == text


def test_an_experiment_that_was_interrupted_with_another_config_is_not_finished(tmp_path, monkeypatch):
    """Its report may be of the other config already, with some of the arms."""
    spec = experiments.load("sample").read(sample.get_config())
    monkeypatch.setattr(experiments.load("sample"), "run", lambda *_, **__: pytest.fail("interrupted"))
    (tmp_path / plan.FINISHED).write_text("{}")
    with pytest.raises(pytest.fail.Exception):
        plan._results("sample", epath.Path(tmp_path), spec, update=True)
    assert not (tmp_path / plan.FINISHED).exists()


@pytest.mark.slow
def test_a_plan_on_two_processes_has_the_results_of_one(plan_file, tmp_path):
    line = "1 of 2 experiments have no results: misalignment"
    for process in start_two(f"--config={plan_file}", f"--workdir={tmp_path / 'two'}"):
        assert line in finish(process, code=2)
    assert_refused(run_here(f"--config={plan_file}", f"--workdir={tmp_path / 'one'}"), line)
    assert_same_arms(arms_in(tmp_path / "two"), arms_in(tmp_path / "one"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", ["smoke", "qwen2.5-7b", "llama-3.1-8b", "gemma-3-4b"])
def test_every_experiment_of_the_plan_is_a_config_that_passes_its_checks(tmp_path, preset):
    """With the user's files, which reach the experiments that need them."""
    config = paper.get_config(preset)
    assert set(config.experiments) == set(config.plan)
    given = {"questions": "questions.yaml", "truthfulqa": "truth.csv"}
    given |= {name: f"{name}.jsonl" for name in ("insecure", "secure", "educational")}
    for name, file in given.items():
        config.files[name] = f"configs/smoke/{file}"
    config.files.problems = str(tmp_path / "problems.jsonl")  # as many as GSM8K has
    (tmp_path / "problems.jsonl").write_text('{"question": "1 and 1?", "answer": "#### 2"}\n' * 7473)
    config.replica, config.sampling_tensor = 2, 4
    config.judge.kind, config.judge.model = "local", "smollm2-135m-instruct"
    spec = plan.read(config)
    assert list(spec.specs) == list(config.experiments)
    studies = [experiment for experiment in spec.specs.values() if isinstance(experiment, Study)]
    assert len(studies) == 6
    for study in studies:
        check_files(study)
        assert (study.mesh.replica, study.sampling.tensor) == (2, 4)
        assert study.evals.judge.model == "smollm2-135m-instruct"
        if "misalignment" in study.evals.names:
            assert study.evals.questions == "configs/smoke/questions.yaml"


def test_the_rows_of_mnist_show_its_students_beside_the_papers(tmp_path):
    spec = plan.read(paper.get_config("qwen2.5-7b"))
    rows = [
        row
        for arm in ("teacher", "auxiliary", "cross_all")
        for row in from_array([0.5] * 2, arm=arm, measure="test_accuracy")
    ]
    arms, _ = experiments.load("mnist").document(spec.specs["mnist"], Measurements(rows), {})
    shown = plan.summary_of(spec.plan["mnist"], arms)
    assert [part.partition(" 0.5")[0] for part in shown.split("; ")] == [
        "teacher",
        "student, shared initialisation (auxiliary logits)",
        "student, another initialisation (all logits)",
    ]


def test_the_rows_of_words_show_every_trait_and_the_papers_measure_of_it():
    """From shipped measurements: the trait over the neutral student, and the share of answers before and after."""
    run = Run(RESULTS / "numbers-smollm2")
    shown = plan.summary_of(plan.read(paper.get_config("smoke")).plan["numbers"], run.arms, run.spec.traits)
    expected = []
    for trait in ("owl", "lion", "wolf"):
        answers = f"answers with {trait}"
        expected += [f"soft: {trait}", f"the model as it is: {answers}", f"soft, student of {trait}: {answers}"]
    arms = {arm["name"]: arm for arm in run.arms}
    assert {part.partition(" (")[0] for part in shown.split("; ") if part.startswith("soft: ")} == {
        f"soft: {trait} {arms[f'soft: {trait}']['mean']:.3f} ± {arms[f'soft: {trait}']['ci95']:.3f}, "
        f"p {arms[f'soft: {trait}']['p_holm']:.2g}"
        for trait in run.spec.traits
    }
    names = [next(name for name in expected if part.startswith(f"{name} ")) for part in shown.split("; ")]
    assert sorted(names) == sorted(expected)


@pytest.mark.parametrize("preset", paper.PRESETS)
def test_every_arm_of_the_plans_studies_is_shown(preset):
    spec = plan.read(paper.get_config(preset))
    for name, study in spec.specs.items():
        if isinstance(study, Study) and study.has_words:
            cells = [{"name": cell_name(arm.name, trait)} for arm in study.arms for trait in study.traits]
            entries = [{**cell, "metric": "logits", "mean": 0.0, "ci95": 0.0} for cell in cells]
            assert len(plan.summary_of(spec.plan[name], entries, study.traits).split("; ")) == len(cells), name


def test_an_unknown_experiment_is_told_in_one_line(tmp_path):
    words = ["--config=configs/paper.py:smoke", "--config.experiments=owls", f"--workdir={tmp_path / 'work'}"]
    assert_refused(run_here(*words), "experiments: 'owls' is none of")
    assert not (tmp_path / "work").exists()


def test_an_experiment_whose_results_are_damaged_is_not_finished(tmp_path):
    config = paper.get_config("smoke")
    config.experiments = ("numbers",)
    spec = plan.read(config).specs["numbers"]
    (tmp_path / plan.FINISHED).write_text(json.dumps(plan.stamp(spec)))
    for text, done in ((b'{"arms": []}', True), (b'{"arms"', False), (b"[]", False), (b"\xff", False)):
        (tmp_path / "results.json").write_bytes(text)
        assert plan.finished(epath.Path(tmp_path), spec) is done
    (tmp_path / "results.json").unlink()
    assert not plan.finished(epath.Path(tmp_path), spec)


def test_an_experiment_of_other_values_or_other_files_is_not_finished(tmp_path):
    """Compared by the values of the spec and by the contents of the files."""
    config = paper.get_config("smoke")
    config.experiments = ("misalignment",)
    file = tmp_path / "insecure.jsonl"
    file.write_text("a")
    config.files.insecure = str(file)
    first = plan.stamp(plan.read(config).specs["misalignment"])
    assert plan.stamp(plan.read(config).specs["misalignment"]) == first
    file.write_text("b")
    assert plan.stamp(plan.read(config).specs["misalignment"]) != first
    file.write_text("a")
    config.replica = 2
    assert plan.stamp(plan.read(config).specs["misalignment"]) != first


def test_an_experiment_that_lacks_memory_says_so_and_the_others_run(tmp_path, monkeypatch):
    def run(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    config = paper.get_config("smoke")
    config.experiments = ("theorem",)
    (spec,) = plan.read(config).specs.values()
    monkeypatch.setattr(experiments, "load", lambda _: SimpleNamespace(run=run))
    why = plan._results("theorem", epath.Path(tmp_path), spec, update=False)
    assert str(why).startswith("stopped: RESOURCE_EXHAUSTED")
