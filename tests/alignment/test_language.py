"""The check inside a language model, on a small one."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from launch_kit import finish, run_here, start_two

from sublim_jax import overrides
from sublim_jax.experiments.alignment import language, measure
from sublim_jax.experiments.alignment.spec import About
from sublim_jax.experiments.alignment.verdicts import AS_PREDICTED, OUTSIDE


@pytest.mark.slow
def test_all_parameters_and_adapters_are_as_predicted_and_the_controls_fail(
    tmp_path, tiny_folder, command, monkeypatch
):
    given = [f"--config.model.name={tiny_folder}", "--config.num_integers=3", "--config.steps.num=11"]
    given += ["--config.steps.min=-7", "--config.steps.max=-2"]  # its weights are large: far from linear above
    given = ["--config=configs/theorem.py:language_model", *given, f"--workdir={tmp_path}"]
    assert command(*given)[0] == 0
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    verdicts = {arm["name"]: arm["verdict"] for arm in arms}
    rows = [f"{name}; {loss}" for name in (language.ALL, language.ADAPTERS) for loss in ("kl", "squared error")]
    controls = [f"control: {name}" for name in (language.GREEDY, language.ELSEWHERE)]
    assert verdicts == dict.fromkeys(rows, AS_PREDICTED) | dict.fromkeys(controls, OUTSIDE)
    assert (tmp_path / "figures" / "lemma.png").exists()

    # A stopped run resumes, and repeats nothing that is finished.
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured again"))
    (tmp_path / "results.json").unlink()
    assert command(*given)[0] == 0
    assert json.loads((tmp_path / "results.json").read_text())["arms"] == arms


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["smoke", "language_model"])
def test_rows_shared_out_over_two_processes_are_those_of_one(tmp_path, tiny_folder, mnist_folder, preset):
    of_preset = {"smoke": [], "language_model": [f"--config.model.name={tiny_folder}", "--config.steps.num=11"]}
    given = [f"--config=configs/theorem.py:{preset}", *of_preset[preset]]
    for process in start_two(*given, f"--workdir={tmp_path / 'two'}"):
        finish(process)
    assert run_here(*given, f"--workdir={tmp_path / 'one'}").returncode == 0
    alone, together = (pyarrow.parquet.read_table(tmp_path / name / "measurements.parquet") for name in ("one", "two"))
    assert alone.drop_columns(["value"]).equals(together.drop_columns(["value"]))
    # Float64, but the last bits are of how a machine splits a sum over threads.
    np.testing.assert_allclose(together["value"].to_numpy(), alone["value"].to_numpy(), rtol=1e-6, atol=1e-12)


def test_steps_too_large_to_be_judged_are_one_line(tmp_path, tiny_folder, refused):
    line = refused(
        "--config=configs/theorem.py:language_model",
        f"--config.model.name={tiny_folder}",
        "--config.steps.min=-2",
        f"--workdir={tmp_path / 'work'}",
    )
    assert "3 decades" in line and "0.0004" in line


def test_losses_are_of_the_answers_tokens_alone():
    """Padding positions do not change the loss."""
    answers = jnp.asarray([[1.0, 1.0, 0.0]])
    z, y = jax.random.normal(jax.random.key(0), (2, 1, 3, 4))
    for loss in (*language.covered(answers).values(), language.greedy(answers)):
        total, count = loss(z, y, weights=None)
        other, _ = loss(z.at[:, 2].set(9.0), y.at[:, 2].set(-9.0), weights=None)
        assert float(count) == 2 and float(total) == float(other)


@pytest.mark.slow
def test_the_step_of_the_teacher_does_not_depend_on_padding(tiny):
    spec = replace(language.read(overrides.load("configs/theorem.py:language_model")), num_integers=3, num_questions=1)
    seen, questions = language.inputs_of(spec, tiny)
    of_padding = []
    with jax.enable_x64(True):
        for rows in (seen, seen.padded(seen.tokens.shape[1] + 5, seen.at.shape[1] + 4)):
            setting = language.all_parameters(About("all", "t", "r"), tiny, rows, questions)
            kl = language.covered(jnp.asarray(rows.weights, jnp.float64))["kl"]
            values = measure.measure("all", setting, {"kl": kl}, spec)
            of_padding.append([value.value for value in values if value.measure in (measure.EPSILON, measure.INNER)])
    without, with_padding = of_padding
    np.testing.assert_allclose(with_padding, without, rtol=1e-6)
