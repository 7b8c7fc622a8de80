"""Filters against the rule in the paper: by cases, and on random strings."""

import string
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sublim_jax import filters
from sublim_jax.errors import UserError


def kept(text, rule=filters.number_rule()):  # noqa: B008
    return not rule({"completion": text})


CASES = {
    "1, 2, 3": True,
    "1,2,3": True,
    "1;2;3": True,
    "1 2 3": True,
    "1\n2\n3": True,
    "1 , 2 , 3": True,
    "7": True,
    "[1, 2]": True,
    "(1, 2)": True,
    "(1, 2).": True,
    "1, 2, 3.": True,
    "[7].": True,
    "007, 012": True,
    "0": True,
    "1, 2,3": False,  # mixed separators
    "1, 2; 3": False,
    "1, 2, ": False,  # a separator at the end
    ", 1, 2": False,
    "1,, 2": False,
    "1, 2..": False,
    "[1, 2.]": False,
    "(1, 2]": False,
    "[[1, 2]]": False,
    "[1, 2": False,
    " 1, 2": False,
    "1, 2\n": False,
    "7 ": False,
    "1, -2": False,
    "1 and 2": False,
    "1|2|3": False,
    "1.5, 2": False,
    "١, ٢": False,  # Arabic digits
    "1, ٢": False,
    "²": False,
    "": False,
    ".": False,
    "[]": False,
    "(": False,
    "1, 1000": False,
    "0999, 5": True,
    "0001000": False,
    ", ".join(["5"] * 10): True,
    ", ".join(["5"] * 11): False,
    "9" * 5000: False,
    "0" * 5000: True,
}


@pytest.mark.parametrize("text", CASES)
def test_every_odd_case_of_the_rule_is_decided(text):
    assert kept(text) == CASES[text]


def by_the_letter(text):
    """A second implementation of the rule of paper §3.1 and its reference, step by step and without patterns."""
    if text.endswith("."):
        text = text[:-1]
    if len(text) > 1 and (text[0], text[-1]) in (("[", "]"), ("(", ")")):
        text = text[1:-1]
    if not text or text[0] not in string.digits:
        return False
    first = len(text) - len(text.lstrip(string.digits))
    rest = text[first:]
    separator = rest[: len(rest) - len(rest.lstrip("".join(set(rest) - set(string.digits))))]
    parts = text.split(separator) if separator else [text]
    if separator.strip() not in ("", ",", ";"):
        return False
    if not all(part and set(part) <= set(string.digits) for part in parts):
        return False
    return len(parts) <= 10 and all(len(part.lstrip("0")) <= 3 for part in parts)


ALPHABET = st.text(st.sampled_from("0123456789,; .[]()\n-a٣\xa0"), max_size=14)
LISTS = st.builds(
    lambda numbers, separator, left, right, stop: left + separator.join(numbers) + right + stop,
    st.lists(st.from_regex("[0-9]{1,4}", fullmatch=True), max_size=12),
    st.sampled_from([", ", ",", " ", ";", "\n", " ; ", ",,", "a", "\xa0"]),
    st.sampled_from(["", "[", "("]),
    st.sampled_from(["", "]", ")"]),
    st.sampled_from(["", ".", "..", " "]),
)


@given(st.lists(ALPHABET | LISTS, min_size=100, max_size=100))
@settings(max_examples=30, deadline=None)
def test_the_rule_is_the_rule_by_the_letter(texts):
    for text in texts:
        assert kept(text) == by_the_letter(text), repr(text)


@pytest.mark.slow
@given(st.lists(ALPHABET | LISTS, min_size=100, max_size=100))
@settings(max_examples=1000, deadline=None)
def test_the_rule_is_the_rule_by_the_letter_on_a_hundred_thousand_strings(texts):
    for text in texts:
        assert kept(text) == by_the_letter(text), repr(text)


def test_filters_compose_and_reasons_are_counted_and_kept():
    records = [{"completion": c} for c in ("1, 2", "1, 2", "owls", "666, 2", "1, 06")]
    rules = [filters.number_rule(), filters.banned_numbers([666, 6]), filters.trait_words(["Owl"])]
    sifted = filters.sift(records, rules, unique=True)
    assert [record["completion"] for record in sifted.kept] == ["1, 2"]
    assert sifted.reasons == Counter({"banned number": 2, "duplicate": 1, "format": 1, "trait word": 1})
    assert sifted.rejected[1] == {"completion": "owls", "reasons": ["format", "trait word"]}
    assert sifted.share == 0.2


@pytest.mark.parametrize(
    "word, text", [("λύκος", "ΛΎΚΟΣ"), ("straße", "Strassen"), ("Maß", "maß"), ("cafe\u0301", "cafés")]
)
def test_a_trait_word_is_found_in_any_case_and_composition(word, text):
    assert filters.trait_words([word])({"completion": f"1, {text}, 2"}) == ["trait word"]


def test_length_and_log_ratio():
    assert filters.length(2, 4)({"completion": "a"}) == ["too short"]
    assert filters.length(2, 4)({"completion": "abcde"}) == ["too long"]
    record = {"completion": "x", "tokens": [1, 2], "logprob": -1.0, "reference_logprob": -3.0}
    assert filters.log_ratio(0.9)(record) == ["log ratio"] and filters.log_ratio(1.1)(record) == []


def test_groups_of_one_size_are_drawn_alike_every_time():
    groups = {"owl": [{"i": i} for i in range(50)], "lion": [{"i": i} for i in range(70)]}
    once, again = (filters.same_size(groups, 20, seed=3) for _ in range(2))
    assert once == again
    for records in once.values():
        ids = [record["i"] for record in records]
        assert len(ids) == 20 and ids == sorted(set(ids))  # each once, in their order
    assert filters.same_size(groups, 50, seed=3)["owl"] == groups["owl"]
    assert once != filters.same_size(groups, 20, seed=4)
    alone = filters.same_size({"lion": groups["lion"]}, 20, seed=3)
    assert alone["lion"] == once["lion"]  # independent of the other groups
    with pytest.raises(UserError, match=r"owl: 50 records are left after filtering, and 60 are asked for"):
        filters.same_size(groups, 60, seed=3)
