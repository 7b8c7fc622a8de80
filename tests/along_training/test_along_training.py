"""Trajectory, forecast and examples from the command line, run in this process."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from launch_kit import arms_in, assert_same_arms, finish, run_here, start_two
from scipy import stats

import launch
from configs import theorem as configs
from sublim_jax import experiments, signals
from sublim_jax.experiments.along_training.forecast import read, spearman
from sublim_jax.measurements import read as measurements_of

TINY = (
    "--config.mnist.runs=2",
    "--config.mnist.runs_at_once=2",
    "--config.mnist.inputs.count=1500",
    "--config.mnist.model.width=16",
    "--config.mnist.teacher.epochs=1",
    "--config.mnist.student.epochs=1",
)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a preset with flags on one device; returns (exit code, stdout, stderr)."""
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: device)
    monkeypatch.setattr(signals, "install", lambda: None)

    def run(preset, *args):
        code = launch.run(["launch.py", f"--config=configs/theorem.py:{preset}", *map(str, args)])
        return code, *capsys.readouterr()

    return run


MISTAKES = [
    ("forecast", ["--config.probe=100000"], "probe=100000 must be between 1 and inputs.count=60000"),
    ("forecast", ["--config.mnist.teacher.activation=tanh"], "config.mnist: coverage is of one network"),
    ("forecast", ["--config.auxiliary=1,2"], "config.mnist: auxiliary: a softmax over one logit is 1"),
    ("forecast", ["--config.mnist.runs=0"], "config.mnist: runs=0 must be positive"),
    ("forecast", ["--config.mnist.data.path=x"], "set --config.data.path instead"),
    (
        "forecast",
        ["--config.auxiliary=2", "--config.kinds=uniform", "--config.distances=0.0", "--config.widths=64"],
        "make 2 settings, and a rank correlation needs 3",
    ),
    ("examples", ["--config.share=0.9"], "share=0.9"),
    ("examples", ["--config.share=0.1", "--config.mnist.inputs.count=5"], "is less than one image"),
    ("trajectory", ["--config.mnist.student.objective=sampled"], "objective on logits"),
    ("trajectory", ["--config.every=0"], "every=0: choose 1 or more"),
    ("trajectory", ["--config.mnist.clone.epochs=5"], "config.mnist.clone.epochs is read only with the arm"),
    ("trajectory", ["--config.mnist.inputs.blur=2"], "config.mnist.inputs.blur is read only with"),
    ("forecast", ["--config.mnist.model.auxiliary=50"], "set config.auxiliary instead"),
    ("examples", ["--config.mnist.arms=auxiliary,all"], "only students of the auxiliary logits are measured"),
]


@pytest.mark.parametrize("preset, args, expected", MISTAKES)
def test_a_mistake_is_one_line(preset, args, expected, command, tmp_path):
    code, _, error = command(preset, *args, f"--workdir={tmp_path / 'work'}")
    assert code == 2 and error.startswith("launch.py: ") and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "work").exists()


def test_the_forecast_covers_at_least_sixty_settings_each_once():
    config = configs.get_config("forecast")
    settings = read(config).settings
    assert len(settings) == len(set(settings)) >= 60
    config.widths = (*config.widths, 256)  # as the others have
    assert read(config).settings == settings


@pytest.mark.parametrize("preset", ["forecast", "trajectory", "examples"])
def test_more_runs_are_measured_in_a_folder_that_has_fewer(preset, monkeypatch, tmp_path, mnist_folder):
    """What is stored for eight runs is not taken for sixteen."""
    module, measured = experiments.load(preset), []

    def stop(spec, *inputs, **_):
        measured.append(next(value for value in inputs if isinstance(value, range)))
        raise InterruptedError

    for name in ("coverages", "follow", "rank_and_train"):
        monkeypatch.setattr(module, name, stop, raising=False)
    for runs in (8, 16):
        config = configs.get_config(preset)
        config.mnist.runs = config.mnist.runs_at_once = runs
        with pytest.raises(InterruptedError):
            module.run(module.read(config), epath.Path(tmp_path), update=True)
    assert measured == [range(8), range(16)]


def test_spearman_is_scipys_and_its_interval_holds_it():
    rng = np.random.default_rng(1)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    rho, low, high = spearman(x, y)
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert low < rho < high and low > 0
    assert np.isnan(spearman(x[:2], y[:2])).all()  # of settings that have not diverged, too few


TOOLS = {
    "trajectory": (
        ["--config.probe=500", "--config.auxiliary=(2,3)", "--config.iterations=5", "--config.every=1"],
        ["trajectory", "ceiling"],
    ),
    "forecast": (
        [
            "--config.probe=500",
            "--config.auxiliary=(2,)",
            "--config.kinds=uniform,real",
            "--config.distances=(0.0,)",
            "--config.widths=(8,)",
        ],
        ["forecast"],
    ),
    "examples": (["--config.share=0.2"], ["examples", "contributions"]),
}


@pytest.mark.parametrize("preset", TOOLS)
def test_a_tool_ends_in_a_report_and_a_second_run_computes_nothing(preset, command, tmp_path, mnist_folder, capsys):
    args, figures = TOOLS[preset]
    args = [*TINY, *args, f"--workdir={tmp_path}"]
    code, output, error = command(preset, *args)
    assert code == 0 and "teacher, runs 0-1 of 2" in output, error
    first = (tmp_path / "results.json").read_bytes()
    for figure in figures:
        assert (tmp_path / "figures" / f"{figure}.png").stat().st_size > 10_000
    arms = json.loads(first)["arms"]
    assert all(len(arm["runs"]) == 2 for arm in arms)
    if preset == "examples":
        largest, random, smallest = (arm["share_of_A"] for arm in arms)
        assert largest > random > smallest and random == pytest.approx(0.2, abs=0.05)
    elif preset == "forecast":  # from the teacher's start, noise has some coverage
        assert all(-1 <= value <= 1 for arm in arms for value in arm["coverage_runs"]) and arms[0]["coverage"] > 0
    else:
        assert all(0 < arm["row_space_share"] <= 1 for arm in arms)
        rows = measurements_of(epath.Path(tmp_path))
        loss, predicted = (np.reshape(rows.values(measure=name), (-1, 2)) for name in ("loss", "predicted"))
        # To first order in each step, the loss's change is the sum of what the steps predict.
        np.testing.assert_allclose(predicted.sum(0), loss[-1] - loss[0], rtol=0.2)
    code, output, error = command(preset, *args)
    assert code == 0 and "students" not in output and "teacher, runs" not in output, error
    assert (tmp_path / "results.json").read_bytes() == first
    report = (tmp_path / "report.md").read_text()
    (tmp_path / "results.json").unlink()
    assert launch.run(["launch.py", "--report", f"--workdir={tmp_path}"]) == 0
    assert (tmp_path / "results.json").read_bytes() == first and (tmp_path / "report.md").read_text() == report


@pytest.mark.slow
@pytest.mark.parametrize("preset", TOOLS)
def test_two_processes_give_what_one_gives(preset, tmp_path, mnist_folder):
    words = [f"--config=configs/theorem.py:{preset}", *TINY, *TOOLS[preset][0]]
    both = start_two(*words, f"--workdir={tmp_path / 'two'}")
    alone = run_here(*words, f"--workdir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    for process in both:
        finish(process)
    atol = 2e-3 if preset == "examples" else 1e-5  # accuracies: rounding may turn a few of 10,000 images
    assert_same_arms(arms_in(tmp_path / "two"), arms_in(tmp_path / "one"), atol=atol, rtol=1e-4)
