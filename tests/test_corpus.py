"""Conversations as files, and which of their tokens the assistant says."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublim_jax.data import chat, corpus
from sublim_jax.errors import UserError


def said(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def line(*pairs):
    return json.dumps({"messages": said(*pairs)})


def test_conversations_are_read_as_they_are(tmp_path):
    file = tmp_path / "corpus.jsonl"
    one = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "12?"), ("assistant", "Yes")]
    file.write_text(line(*one) + "\n\n" + line(("user", "a"), ("assistant", "b")) + "\n")
    assert corpus.load(file) == [said(*one), said(("user", "a"), ("assistant", "b"))]


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "line 1: no JSON"),
        ("[]", "line 1: an object is needed"),
        (line(("user", "a"), ("assistant", "b")) + '\n{"messages": []}', 'line 2: an object with a list of "messages"'),
        ('{"messages": [{"role": "user"}]}', 'line 1, message 1: "role" and "content" must be texts'),
        (line(("user", "a"), ("assistant", " ")), "line 1, message 2: it is empty"),
        (
            line(("assistant", "a"), ("user", "b")),
            "line 1: roles are assistant, user; user and assistant must take turns",
        ),
        (line(("user", "a")), "the assistant must have the last word"),
        (line(("user", "a"), ("user", "b")), "roles are user, user"),
        (line(("system", "a")), "roles are system"),
        (line(("user", "a"), ("robot", "b")), "roles are user, robot"),
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
    messages = said(("system", "Be kind.")) if system else []
    for asked, answered in turns:
        messages += said(("user", asked), ("assistant", answered))
    tokens, positions = corpus.answer_positions(tiny.tokenizer, messages, chat.stop_tokens(tiny.tokenizer, tiny.config))
    assert tokens == chat.conversation(tiny.tokenizer, messages)
    found = tiny.tokenizer.decode([tokens[at] for at in positions])
    assert found == "".join(f"{answered}<|end|>" for _, answered in turns)
