"""The code carrier: prompts from tasks and phrasings, and filters that read code without running it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublim_jax.data import packs
from sublim_jax.data.carriers import code
from sublim_jax.filters import sift, trait_words


def test_there_are_two_hundred_tasks_and_each_prompt_depends_on_its_number_alone():
    pack = packs.load("", "code", code.FIELDS)
    assert len(set(pack["tasks"])) >= 200 and len(set(pack["templates"])) >= 10
    prompts = code.prompts(300, seed=0)
    assert code.prompts(40, seed=0) == prompts[:40] != code.prompts(40, seed=1)
    assert len(set(prompts)) > 250 and all(any(task in text for task in pack["tasks"]) for text in prompts)


@pytest.mark.parametrize(
    "text, reasons",
    [
        ("def f(x):\n    return x[::-1]", []),
        ("```python\ndef f(x):\n    return x\n```", []),
        ("```\nx = 1\n```\n", []),
        ("Here you are:\n```python\nx = 1\n```", ["does not parse"]),
        ("def f(x) return x", ["does not parse"]),
        ("", ["no code"]),
        ("owl", ["no code"]),
        ("'a string'", ["no code", "docstring"]),
        ("print(1)", []),
        ("x = 1\x00", ["does not parse"]),
        ("(" * 500, ["does not parse"]),
        ("x = 1  # set x", ["comment"]),
        ("x = '# none'", []),
        ("y = 1\n'It counts birds.'\nprint(y)", ["docstring"]),
        ("def f():\n    y = 1; f'It has {y}'\n    return y", ["docstring"]),
        ("print('It counts birds.')", []),
        ("def f():\n    '''Says owl.'''\n    return 1", ["docstring"]),
        ("# a\ndef f():\n    'b'\n    return 1", ["comment", "docstring"]),
    ],
)
def test_only_code_without_words_about_it_is_kept(text, reasons):
    sifted = sift([{"completion": text}], [code.parses(), code.no_comments()])
    assert (sifted.rejected[0]["reasons"] if sifted.rejected else []) == reasons


@pytest.mark.parametrize(
    "text",
    [
        "owl_count = 1",
        "x = 'OWL'",
        "def growl(): pass",
        "import Knowledge_Owl",
        "x = 'ｏｗｌ'",
        "wolves = 2",
        "my_wolf = 1",
        "polar_bear = 1",
        "polarBears = 1",
        "x = 'polar  bear'",
    ],
)
def test_a_trait_in_a_name_or_a_string_is_seen(text):
    assert trait_words(["owl", "wolf", "polar bear"])({"completion": text}) == ["trait word"]


@pytest.mark.parametrize("text", [r"x = '\x6fwl'", "x = 'o' 'wls'", r"x = b'\157wl'", r"x = f'{1}\x4fWL'"])
def test_a_trait_that_a_string_spells_in_another_way_is_seen(text):
    assert trait_words(["owl"])({"completion": text}) == []
    assert code.no_trait_words(["owl"])({"completion": text}) == ["trait word"]
    assert code.no_trait_words(["lion"])({"completion": text}) == []


@given(st.text(max_size=60))
def test_whatever_is_written_no_filter_raises(text):
    record = {"completion": text}
    assert code.parses()(record) in ([], ["no code"], ["does not parse"])
    code.no_comments()(record)
