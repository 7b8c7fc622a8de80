"""The theorem's report as a user makes it, and verdicts that can fail."""

import json

import jax
import numpy as np
import pytest
from test_launch import assert_refused, launch

from configs import theorem as configs
from sublim_jax import objectives, theorem
from sublim_jax.experiments import alignment, alignment_report
from sublim_jax.experiments.alignment_report import AS_PREDICTED, CONSISTENT, NOT, Measured, Row

CONFIG = "--config=configs/theorem.py"


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


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path):
    args, words = MISTAKES[mistake]
    assert_refused(launch(CONFIG, *args, f"--workdir={tmp_path / 'work'}"), *words)
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
