"""The check of the theorem as a user runs it, and verdicts that can fail."""

import json

import jax
import numpy as np
import pytest

from sublim_jax import objectives, theorem
from sublim_jax.experiments.alignment import run
from sublim_jax.experiments.alignment.report import AS_PREDICTED, CONSISTENT, NOT, Measured, judge, power
from sublim_jax.experiments.alignment.settings import controls, make_settings, qualifying

CONFIG = "--config=configs/theorem.py"


@pytest.fixture
def few_settings(monkeypatch):
    """The first of the settings, and two of their objectives."""
    make, all_of = make_settings, qualifying
    monkeypatch.setattr(run, "make_settings", lambda *args: make(*args)[:1])
    monkeypatch.setattr(run, "qualifying", lambda s: {name: all_of(s)[name] for name in ("kl", "reverse kl")})


def check(folder, command):
    """The arms of the check's results, every one of which is as predicted."""
    assert command(f"{CONFIG}:smoke", f"--workdir={folder}")[0] == 0
    arms = json.loads((folder / "results.json").read_text())["arms"]
    assert [arm["name"] for arm in arms if arm["verdict"] != AS_PREDICTED] == []
    return arms


@pytest.mark.slow
def test_the_check_finds_every_row_as_predicted(tmp_path, mnist_folder, command):
    assert len(check(tmp_path, command)) == 12 * 7 + 6 + 1


def test_a_check_of_few_rows_is_as_predicted_and_its_report_is_written_again(
    tmp_path, mnist_folder, command, few_settings
):
    arms = check(tmp_path, command)
    assert len(arms) == 2 + 6 + 1
    cubic = next(arm for arm in arms if "|z − y|³" in arm["name"])
    assert cubic["mean"] == pytest.approx(2, abs=0.1)
    files = ("results.json", "report.md")
    before = [(tmp_path / name).read_bytes() for name in files]
    assert "no guarantee: its gradient at agreement is not 0" in before[1].decode()
    assert before[1].count(b"figures/") == 3
    for name in (*files, "figures/lemma.png"):
        (tmp_path / name).unlink()
    assert command("--report", f"--workdir={tmp_path}")[0] == 0
    assert [(tmp_path / name).read_bytes() for name in files] == before
    assert (tmp_path / "figures" / "lemma.png").exists()


MISTAKES = {
    "a step below float64": (["steps.min=-15"], ["float64 cannot resolve", "1e-15"]),
    "steps too large to be judged": (["steps.min=-2", "steps.max=3"], ["4 decades", "0.004"]),
    "a support of one logit": (["support=(10,)"], ["support=(10,)", "2 logits or more"]),
    "a support outside the logits": (["support=(10,13)"], ["support=(10, 13)", "13 logits"]),
    "a logit twice": (["support=(10,10)"], ["support: 10 is there twice"]),
    "too few steps": (["steps.num=2"], ["steps", "at least 5"]),
    "too many steps": (["steps.num=2000"], ["steps.num=2000", "1000 or less"]),
    "no draws": (["num_draws=0"], ["num_draws=0", "positive"]),
    "fewer examples than the transformer needs": (["examples=3"], ["examples=3", "4 or more"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, tmp_path, refused):
    flags, words = MISTAKES[mistake]
    line = refused(CONFIG, *(f"--config.{flag}" for flag in flags), f"--workdir={tmp_path / 'work'}")
    assert all(word in line for word in words), line
    assert not (tmp_path / "work").exists()


def measured(slope=1.0, factor=1.0, explicit=1.0):
    moved = np.logspace(-8, 0, 17)
    inner = factor * moved * (1 + 0.3 * moved**slope)
    return Measured(moved, moved, 2.3, inner, -0.1 * inner, 1.0, explicit)


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
    assert judge(numbers, rate=0.1, smooth=True).verdict == verdict


def test_of_a_network_with_kinks_the_sign_and_the_bound_are_judged():
    assert judge(measured(slope=1.2), rate=0.1, smooth=False).verdict == AS_PREDICTED
    assert judge(measured(factor=-1.0), rate=0.1, smooth=False).verdict == NOT


def test_the_fit_finds_an_exponent_and_leaves_rounding_out():
    moved = np.logspace(-8, 0, 17)
    values = moved**1.7 + 1e-9
    fit = power(moved, values, values > 1e-6)
    assert fit.slope == pytest.approx(1.7, abs=0.01)
    assert np.isnan(power(moved, values, moved > 0.1).slope)


def test_objectives_are_marked_as_the_theorem_sorts_them():
    support = objectives.support_mask((1, 2, 4), 6)
    with jax.enable_x64(True):
        logits = jax.random.normal(jax.random.key(0), (20, 6), "float64")
        for name, objective in qualifying(support).items():
            assert theorem.no_guarantee(objective, logits) == "", name
        reasons = [theorem.no_guarantee(control.objective, logits) for control in controls(support)]
    assert [bool(reason) for reason in reasons] == [True, True, True, False], reasons
