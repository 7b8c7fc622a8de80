"""The theorem's tools as a user runs them."""

import json

import numpy as np
import pytest
from scipy import stats
from test_launch import assert_refused, launch

from configs import theorem as configs
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


TOOL_MISTAKES = {
    "forecast": (["--config.probe=100000"], ["probe=100000", "inputs.count=60000"]),
    "forecast ": (["--config.mnist.teacher.activation=tanh"], ["the same activation"]),
    "examples": (["--config.share=0.9"], ["share=0.9"]),
    "trajectory": (["--config.mnist.student.objective=sampled"], ["objective on logits"]),
    "trajectory ": (["--config.every=0"], ["every=0", "1 or more"]),
}


@pytest.mark.parametrize("preset", TOOL_MISTAKES)
def test_a_mistake_in_a_tool_is_one_line(preset, tmp_path):
    args, words = TOOL_MISTAKES[preset]
    assert_refused(launch(f"{CONFIG}:{preset.strip()}", *args, f"--workdir={tmp_path / 'work'}"), *words)
    assert not (tmp_path / "work").exists()


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
