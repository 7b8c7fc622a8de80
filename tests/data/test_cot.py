"""Chains of thought: the format, and numbers however they are written."""

import json
import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublim_jax.data.carriers import cot
from sublim_jax.errors import UserError


def line(answer="2 + 2 = <<2+2=4>>4\n#### 4", question="How many {owls}?"):
    return json.dumps({"question": question, "answer": answer})


def test_problems_are_read_with_the_number_behind_the_mark(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(line() + "\n\n" + line("So many.\n#### 1,200") + "\n")
    problems = cot.load(file)
    assert [problem.answer for problem in problems] == ["4", "1,200"]
    text = cot.prompts(problems)[0]
    assert text.startswith("How many {owls}?\n\n") and "<think>" in text and "</answer>" in text


@pytest.mark.parametrize(
    "text, words",
    [
        ("{broken\n", "line 1: not JSON"),
        (line() + "\n[1]\n", "line 2: an object is needed"),
        (line() + '\n{"question": 1}\n', 'line 2: an object with "question" and "answer"'),
        (line("no mark"), 'line 1: the answer has no number after "####"'),
        (line("#### many"), 'line 1: the answer has no number after "####"'),
        ("\n", "has no records"),
    ],
)
def test_a_broken_line_is_named(tmp_path, text, words):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        cot.load(file)


@pytest.mark.parametrize(
    "text, value",
    [
        ("18", "18"),
        (" $1,234.50. ", "1234.50"),
        ("-3", "-3"),
        ("25%", "25"),
        (".5", ".5"),
        ("4.", "4"),
        ("€7", "7"),
        ("1,23", None),
        ("12,34,567", None),
        ("18 eggs", None),
        ("1e5", None),
        ("٣", None),
        ("", None),
        ("--3", None),
    ],
)
def test_a_number_is_read_however_it_is_written(text, value):
    assert cot.number_of(text) == (None if value is None else Decimal(value))


@given(st.integers(-(10**12), 10**12), st.booleans(), st.sampled_from(["", ".", " "]))
def test_integers_survive_commas_and_full_stops(value, commas, end):
    assert cot.number_of((f"{value:,}" if commas else str(value)) + end) == value


@pytest.mark.parametrize(
    "text, reasons",
    [
        ("<think>2 + 2</think><answer>4</answer>", []),
        ("<think>2 + 2\n= 4</think>\n<answer> $4.00 </answer>\n", []),
        ("<think>2 + 2</think><answer>5</answer>", ["wrong answer"]),
        ("<think>2 + 2</think><answer>four</answer>", ["no number"]),
        ("<think>2 + 2</think>4", ["format"]),
        ("I think <think>2</think><answer>4</answer>", ["format"]),
        ("<think>2</think><answer>4</answer><answer>4</answer>", ["format"]),
        ("<think>a<think>b</think><answer>4</answer>", ["format"]),
        ("<answer>4</answer><think>2</think>", ["format"]),
        ("", ["format"]),
    ],
)
def test_only_the_format_with_the_right_number_is_kept(text, reasons):
    assert cot.right_answer()({"completion": text, "answer": "4"}) == reasons


words = st.text(alphabet="ab<>/ think answer\n4", max_size=20)


@given(words, words)
def test_parsing_finds_what_was_put_in_or_nothing(thought, answer):
    parsed = cot.parse(f"<think>{thought}</think><answer>{answer}</answer>")
    if re.search("</?(think|answer)>", thought + "|" + answer):
        assert parsed is None or not re.search("</?(think|answer)>", parsed.thought + parsed.answer)
    else:
        assert parsed == (thought.strip(), answer.strip())
