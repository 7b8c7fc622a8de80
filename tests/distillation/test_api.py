"""The public functions refuse what would give students that say nothing."""

import jax
import numpy as np
import pytest

import sublim_jax as sl
from sublim_jax.errors import UserError
from sublim_jax.models.lora import EVERY_LINEAR, Lora


def test_students_on_tokens_are_of_one_teacher_who_wrote_them(tiny):
    """Those of several teachers on the same rows would be the same student."""
    model = tiny.adapted(Lora(2, 2.0))
    teachers = [sl.teachers.prompt(model, "You love owls.", seed=seed) for seed in range(2)]
    rows = [("Count?", "1, 2")]
    with pytest.raises(UserError, match="students of 2 teachers would be the same"):
        sl.students.distill(model, teachers, rows, objective="tokens")
    for given, pairs in ((teachers, []), ([], rows)):
        with pytest.raises(UserError, match="no students without both"):
            sl.students.distill(model, given, pairs)


@pytest.mark.parametrize("layers", [(4,), (-1,)])
def test_adapters_of_a_layer_that_does_not_exist_are_refused(tiny, layers):
    with pytest.raises(UserError, match=r"none of 0 to 3"):
        tiny.adapted(Lora(2, 2.0, layers=layers))


def test_without_a_list_of_modules_all_linear_layers_of_a_decoder_are_adapted(tiny):
    key = jax.random.key(0)
    every, named = (tiny.adapted(Lora(2, 2.0, modules=modules)) for modules in ((), EVERY_LINEAR))
    assert every.settings == named.settings
    jax.tree.map(np.testing.assert_array_equal, every.untrained(key), named.untrained(key))
