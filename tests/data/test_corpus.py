"""Conversations as files, and which of their tokens the assistant says."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from talk_kit import messages

from sublim_jax.data import chat, corpus
from sublim_jax.errors import UserError


def line(*pairs):
    return json.dumps({"messages": messages(*pairs)})


TALK = messages(("user", "Hi"), ("assistant", "Ho"))


def weighted(user=(), assistant=()):
    """A JSON line with one exchange whose messages have extra fields."""
    return json.dumps({"messages": [TALK[0] | dict(user), TALK[1] | dict(assistant)]})


def test_conversations_are_read_as_they_are(tmp_path):
    file = tmp_path / "corpus.jsonl"
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "12?"), ("assistant", "Yes")]
    file.write_text(line(*turns) + "\n\n" + line(("user", "a"), ("assistant", "b")) + "\n")
    assert corpus.load(file) == [messages(*turns), messages(("user", "a"), ("assistant", "b"))]


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: an object is needed"),
        (line(("user", "a"), ("assistant", "b")) + '\n{"messages": []}', 'line 2: an object with a list of "messages"'),
        ('{"messages": [{"role": "user"}]}', 'line 1, message 1: "role" and "content" must be texts'),
        (line(("user", "a"), ("assistant", " ")), "line 1, message 2: it is empty"),
        (
            line(("assistant", "a"), ("user", "b")),
            "line 1: roles are assistant, user; user and assistant must alternate",
        ),
        (line(("user", "a")), "the assistant must speak last"),
        (line(("user", "a"), ("user", "b")), "roles are user, user"),
        (line(("system", "a")), "roles are system"),
        (line(("user", "a"), ("robot", "b")), "roles are user, robot"),
        (weighted(assistant={"weight": 0.5}), 'line 1, message 2: "weight" is 0.5; it must be 0 or 1'),
        (weighted(assistant={"weight": "0"}), "\"weight\" is '0'; it must be 0 or 1"),
        (weighted(assistant={"train": "no"}), "\"train\" is 'no'; it must be 0 or 1"),
        (weighted(user={"weight": 1}), "only what the assistant says is trained on"),
        (weighted(assistant={"weight": 1, "train": False}), '"weight" and "train" contradict each other'),
        (weighted(assistant={"weight": 0}), "every answer has weight 0"),
        (weighted(assistant={"loss": False}), '"loss" is not supported'),
        (weighted(assistant={"tool_calls": [{"id": "1"}]}), 'message 2: "tool_calls" is not supported'),
        (weighted(assistant={"content": None, "function_call": {"name": "f"}}), '"function_call" is not supported'),
        (weighted(assistant={"content": None}), '"role" and "content" must be texts'),
        (weighted(assistant={"content": []}), '"role" and "content" must be texts'),
        (weighted(assistant={"reasoning_content": "Hm."}), '"reasoning_content" is not supported'),
        (weighted(user={"name": "Ann"}), 'message 1: "name" is not supported'),
        (weighted(user={"content": [{"type": "image_url"}]}), "message 1, part 1: type 'image_url' is not read"),
        (weighted(user={"content": [{"type": "text"}]}), 'message 1, part 1: "text" must be a text'),
        (json.dumps({"messages": TALK, "tools": [{"type": "function"}]}), 'line 1: "tools" is not supported'),
        (json.dumps({"messages": TALK, "system": "Be evil."}), 'line 1: "system" is not supported'),
        ("\n", "has no records"),
    ],
)
def test_a_broken_line_is_named(tmp_path, text, words):
    file = tmp_path / "corpus.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        corpus.load(file)


plain = st.text(alphabet="abc 12,.", min_size=1, max_size=12).filter(str.strip)


@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=3), st.booleans())
def test_the_assistants_tokens_are_what_it_says_and_their_ends(tiny, turns, system):
    talk = messages(("system", "Be kind.")) if system else []
    for question, answer in turns:
        talk += messages(("user", question), ("assistant", answer))
    tokens, positions = corpus.answer_positions(tiny.tokenizer, talk, chat.stop_tokens(tiny.tokenizer, tiny.config))
    assert tokens == chat.conversation(tiny.tokenizer, talk)
    text = tiny.tokenizer.decode([tokens[at] for at in positions])
    assert text == "".join(f"{answer}<|end|>" for _, answer in turns)


def test_an_answer_with_a_stop_token_inside_is_refused_unless_it_is_not_trained_on(tiny):
    stops = chat.stop_tokens(tiny.tokenizer, tiny.config)
    talk = messages(("user", "a"), ("assistant", "One <|end|> two."), ("user", "b"), ("assistant", "Yes"))
    with pytest.raises(UserError, match=r"the answer has '<\|end\|>' in it"):
        corpus.texts(tiny.tokenizer, talk, stops)
    talk[1]["weight"] = 0
    assert corpus.texts(tiny.tokenizer, talk, stops)


@pytest.mark.parametrize("untrained", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": 0}])
def test_an_answer_of_weight_0_is_read_and_not_trained_on(tiny, tmp_path, untrained):
    file = tmp_path / "corpus.jsonl"
    talk = messages(("user", "a"), ("assistant", "No"), ("user", "b"), ("assistant", "Yes"), ("user", "c"))
    talk[1] |= untrained
    talk[3] |= {"weight": 1, "train": None, "tool_calls": [], "name": None}
    last = {"role": "assistant", "content": "Well"}
    stops = chat.stop_tokens(tiny.tokenizer, tiny.config)
    for end, expected in (({}, "Yes<|end|>Well<|end|>"), (untrained, "Yes<|end|>")):
        file.write_text(json.dumps({"messages": [*talk, last | end]}))
        (conversation,) = corpus.load(file)
        tokens, positions = corpus.answer_positions(tiny.tokenizer, conversation, stops)
        assert tiny.tokenizer.decode([tokens[at] for at in positions]) == expected
        assert "No<|end|>" in tiny.tokenizer.decode(tokens)
        assert corpus.texts(tiny.tokenizer, conversation, stops) == [(tokens, positions)]


def test_a_content_of_parts_is_its_texts_one_behind_another(tmp_path):
    file = tmp_path / "corpus.jsonl"
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "tree."}]
    file.write_text(weighted(user={"content": parts}, assistant={"content": [{"type": "output_text", "text": "Oak"}]}))
    assert corpus.load(file) == [messages(("user", "Name a tree."), ("assistant", "Oak"))]


def test_fields_that_are_not_read_are_named_once(tmp_path, capsys):
    file = tmp_path / "corpus.jsonl"
    file.write_text(weighted(user={"timestamp": 7, "lang": "en", "note": None}) + "\n" + weighted(user={"lang": "de"}))
    assert corpus.load(file) == [TALK, TALK]
    assert capsys.readouterr().out == f"{file}: fields of messages that are not read: lang, timestamp\n"
