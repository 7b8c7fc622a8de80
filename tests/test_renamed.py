"""Old names of config values: accepted on the command line, refused in a config file."""

import pytest
from ml_collections import ConfigDict

from sublim_jax import renamed
from sublim_jax.errors import UserError


@pytest.mark.parametrize(
    "experiment, old, new",
    [
        ("alignment", "steps.least", "steps.min"),
        ("transmission", "arm.tokens.a", "arm.tokens.lora_init"),
        ("transmission", "ask.most", "evals.max_questions"),
        ("transmission", "ask.judge.at_once", "evals.judge.max_concurrent"),
        ("transmission", "ask.judge.model", "evals.judge.model"),
        ("transmission", "questions", "num_questions"),
        ("cross_model", "study.teacher.means", "study.teacher.methods"),
        ("cross_model", "study.arm.cross.numbers", "study.arm.cross.data"),
        ("evaluate", "questions", "evals.questions"),
        ("evaluate", "judge.prices", "evals.judge.prices"),
        ("evaluate", "most", "evals.max_questions"),
        ("sample", "constraint.most", "constraint.max_integers"),
        ("sample", "most", "most"),
        ("mnist", "arms", "arms"),
    ],
)
def test_an_old_name_has_a_new_one(experiment, old, new):
    assert renamed.current(experiment, old) == new
    assert renamed.current(experiment, new) == new


def config(**steps):
    return ConfigDict({"experiment": "alignment", "steps": {"min": 1, **steps}, "draws": 3})


def test_what_is_typed_for_an_old_name_is_the_new_names_and_said_once(capsys):
    typed = {"steps.least": ["1", "2"], "steps.min": ["3"], "draws": ["4"], "label_draws": ["5"]}
    expected = {"steps.min": ["1", "2", "3"], "draws": ["4"], "label_draws": ["5"]}  # what this config has
    assert renamed.understood(config(), typed) == expected
    assert capsys.readouterr().err == "config.steps.least is now config.steps.min\n"


def test_a_file_with_old_names_is_refused_by_the_new_ones():
    with pytest.raises(UserError) as error:
        renamed.check("--config=mine.py", config(most=2))
    assert str(error.value) == (
        "--config=mine.py: config.draws is now config.num_draws; config.steps.most is now config.steps.max"
    )
