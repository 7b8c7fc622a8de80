"""The theorem's report and tools as a user runs them, and verdicts that can fail."""

import json

import jax
import numpy as np
import pytest
from scipy import stats
from test_launch import assert_refused, launch

from configs import theorem as configs
from sublim_jax import objectives, theorem
from sublim_jax.experiments import alignment, alignment_report
from sublim_jax.experiments.alignment_report import AS_PREDICTED, CONSISTENT, NOT, Measured, Row
from sublim_jax.experiments.forecast import settings, spearman

CONFIG = "--config=configs/theorem.py"
TINY = [
    "--config.mnist.runs=2",
    "--config.mnist.runs_at_once=2",
    "--config.mnist.inputs.count=1500",
    "--config.mnist.model.width=16",
    "--config.mnist.teacher.epochs=1",
    "--config.mnist.student.epochs=1",
]


def test_the_check_finds_every_row_as_predicted(tmp_path, mnist_folder):
    result = launch(f"{CONFIG}:smoke", f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert len(arms) == 12 * 7 + 6 + 1
    assert [arm["name"] for arm in arms if arm["verdict"] != AS_PREDICTED] == []
    cubic = next(arm for arm in arms if "|z − y|³" in arm["name"])
    assert cubic["mean"] == pytest.approx(2, abs=0.1)
    report = (tmp_path / "report.md").read_text()
    assert "no guarantee: its gradient at agreement is not 0" in report
    assert report.count("figures/") == 3


MISTAKES = {
    "a step below float64": (["--config.steps.least=-15"], ["float64 cannot resolve", "1e-15"]),
    "steps too large to be judged": (["--config.steps.least=-2", "--config.steps.most=3"], ["4 decades", "0.004"]),
    "a support of one logit": (["--config.support=(10,)"], ["support=(10,)", "2 logits or more"]),
    "a support outside the logits": (["--config.support=(10,13)"], ["support=(10, 13)", "13 logits"]),
    "too few steps": (["--config.steps.number=2"], ["steps", "at least 5"]),
    "no draws": (["--config.draws=0"], ["draws=0", "positive"]),
}
TOOL_MISTAKES = {
    "forecast": (["--config.probe=100000"], ["probe=100000", "inputs.count=60000"]),
    "forecast ": (["--config.mnist.teacher.activation=tanh"], ["the same activation"]),
    "examples": (["--config.share=0.9"], ["share=0.9"]),
    "trajectory": (["--config.mnist.student.objective=sampled"], ["objective on logits"]),
    "trajectory ": (["--config.every=0"], ["every=0", "1 or more"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path):
    args, words = MISTAKES[mistake]
    assert_refused(launch(CONFIG, *args, f"--workdir={tmp_path / 'work'}"), *words)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("preset", TOOL_MISTAKES)
def test_a_mistake_in_a_tool_is_one_line(preset, tmp_path):
    args, words = TOOL_MISTAKES[preset]
    assert_refused(launch(f"{CONFIG}:{preset.strip()}", *args, f"--workdir={tmp_path / 'work'}"), *words)
    assert not (tmp_path / "work").exists()


def measured(slope=1.0, factor=1.0, explicit=1.0):
    moved = np.logspace(-8, 0, 17)
    inner = factor * moved * (1 + 0.3 * moved**slope)
    one = np.ones(1)
    return Measured(moved, moved, 2.3, inner[None], -0.1 * inner[None], one, explicit * one)


@pytest.mark.parametrize(
    "numbers, verdict",
    [
        (measured(), AS_PREDICTED),
        (measured(slope=0.8), NOT),  # an error that falls more slowly than the step
        (measured(slope=1.2), CONSISTENT),
        (measured(factor=1.001), NOT),  # an error that does not vanish
        (measured(factor=-1.0), NOT),
        (measured(explicit=1 + 1e-8), NOT),
    ],
)
def test_a_verdict_can_fail(numbers, verdict):
    row = Row("MLP, tanh", "teacher", "inputs", ["kl"], numbers)
    judged = alignment_report._judge_lemma(configs.get_config(), row, 0)
    assert judged.verdict == verdict


def test_the_fit_finds_an_exponent_and_leaves_rounding_out():
    moved = np.logspace(-8, 0, 17)
    values = moved**1.7 + 1e-9
    fit = alignment_report.power(moved, values, values > 1e-6)
    assert fit.slope == pytest.approx(1.7, abs=0.01)
    assert np.isnan(alignment_report.power(moved, values, moved > 0.1).slope)


def test_objectives_are_marked_as_the_theorem_sorts_them():
    support = objectives.support_mask((1, 2, 4), 6)
    with jax.enable_x64(True):
        logits = jax.random.normal(jax.random.key(0), (20, 6), "float64")
        for name, objective in alignment.qualifying(support).items():
            assert theorem.no_guarantee(objective, logits) == "", name
        reasons = {name: theorem.no_guarantee(f, logits) for name, f in alignment.outside(support).items()}
    assert [bool(reason) for reason in reasons.values()] == [True, True, True, False], reasons


def test_the_forecast_covers_at_least_sixty_settings():
    assert len(settings(configs.get_config("forecast"))) >= 60


def test_spearman_is_scipys_and_its_interval_holds_it():
    rng = np.random.default_rng(1)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    rho, low, high = spearman(x, y)
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert low < rho < high and low > 0


AUXILIARY = ["--config.probe=500", "--config.auxiliary=(2,3)"]
TOOLS = {
    "trajectory": ([*AUXILIARY, "--config.iterations=5", "--config.every=1"], ["trajectory", "ceiling"]),
    "forecast": (
        [*AUXILIARY, "--config.kinds=uniform,real", "--config.distances=(0.0,)", "--config.widths=(8,)"],
        ["forecast"],
    ),
    "examples": (["--config.share=0.2"], ["examples", "contributions"]),
}


@pytest.mark.parametrize("preset", TOOLS)
def test_a_tool_ends_in_a_report_and_a_second_run_computes_nothing(preset, tmp_path, mnist_folder):
    args, figures = TOOLS[preset]
    command = [f"{CONFIG}:{preset}", *TINY, *args, f"--workdir={tmp_path}"]
    result = launch(*command)
    assert result.returncode == 0, result.stderr
    first = (tmp_path / "results.json").read_bytes()
    for figure in figures:
        assert (tmp_path / "figures" / f"{figure}.png").stat().st_size > 10_000
    arms = json.loads(first)["arms"]
    assert all(len(arm["runs"]) == 2 for arm in arms)
    if preset == "examples":
        most, random, least = (arm["share_of_A"] for arm in arms)
        assert most > random > least and random == pytest.approx(0.2, abs=0.05)
    elif preset == "forecast":  # on the teacher's own start, of noise, some of its way is found before any training
        assert all(-1 <= value <= 1 for arm in arms for value in arm["coverage_runs"]) and arms[0]["coverage"] > 0
    else:
        assert all(0 < arm["row_space_share"] <= 1 for arm in arms)
        (path,) = (tmp_path / "checkpoints").glob("trajectory-*.json")
        path = json.loads(path.read_text())
        loss, predicted = np.asarray(path["loss"]), np.asarray(path["predicted"])
        # To first order in each step, the loss's change is the sum of what the steps predict.
        np.testing.assert_allclose(predicted.sum(0), loss[-1] - loss[0], rtol=0.2)
    again = launch(*command)
    assert again.returncode == 0 and "students" not in again.stdout and "teacher, runs" not in again.stdout
    assert (tmp_path / "results.json").read_bytes() == first
