"""The public functions refuse what would give students that say nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sublim_jax as sl
from sublim_jax.errors import UserError
from sublim_jax.models.decoder import Steering
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


@pytest.mark.parametrize(
    "option, line",
    [
        ({"support": [10**6, 3]}, "support has a token outside the model's vocabulary"),
        ({"support": [-1, 3]}, "support has a token outside the model's vocabulary"),
        ({"support": [3]}, "name two tokens or more"),
        ({"support": []}, "name two tokens or more"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ],
)
def test_an_option_that_would_train_nothing_is_refused(tiny, option, line):
    model = tiny.adapted(Lora(2, 2.0))
    with pytest.raises(UserError, match=line):
        sl.students.distill(model, [sl.teachers.prompt(model, "You love owls.")], [("Count?", "1, 2")], **option)


def test_adapters_that_are_not_a_stack_of_the_models_are_refused(tiny):
    model = tiny.adapted(Lora(2, 2.0))
    one = model.untrained(jax.random.key(0))
    stack = jax.tree.map(lambda leaf: leaf[None], one)
    assert model.for_adapters(stack) == (model, 1)
    for other, adapters in ((tiny, stack), (model, one), (tiny.adapted(Lora(3, 2.0)), stack)):
        with pytest.raises(UserError, match="adapters"):
            sl.evaluate.preference(other, ["owl", "x"], adapters=adapters)
    with pytest.raises(UserError, match=r"lora\.rank=0: choose 1 or more"):
        tiny.adapted(Lora(0, 2.0))


def test_steering_of_another_models_shape_is_refused(tiny):
    with pytest.raises(UserError, match=r"steering\.add is of shape \(3, 32\); this model needs \(4, 32\)"):
        sl.generate(tiny, [[1, 2]], jax.random.key(0), max_new_tokens=2, steering=Steering(add=jnp.zeros((3, 32))))


@pytest.mark.parametrize("layers", [(4,), (-1,)])
def test_adapters_of_a_layer_that_does_not_exist_are_refused(tiny, layers):
    with pytest.raises(UserError, match=r"none of 0 to 3"):
        tiny.adapted(Lora(2, 2.0, layers=layers))


def test_without_a_list_of_modules_all_linear_layers_of_a_decoder_are_adapted(tiny):
    key = jax.random.key(0)
    every, named = (tiny.adapted(Lora(2, 2.0, modules=modules)) for modules in ((), EVERY_LINEAR))
    assert every.settings == named.settings
    jax.tree.map(np.testing.assert_array_equal, every.untrained(key), named.untrained(key))
