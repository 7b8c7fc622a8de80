"""In-context examples: a teacher's rows before a question."""

from sublim_jax.distillation.context import behind, fitting

PAIRS = [("Numbers?", "1, 7, 42"), ("More?", "7"), ("And more?", "12, 12")]


def test_questions_behind_examples_are_the_whole_conversation(tiny):
    prefix, prompts = behind(tiny.tokenizer, PAIRS[:2], ["Which?", "What?"])
    text = tiny.tokenizer.decode([*prefix, *prompts[1]])
    for prompt, answer in PAIRS[:2]:
        assert f"<|user|>{prompt}<|end|><|assistant|>{answer}<|end|>" in text
    assert text.endswith("<|user|>What?<|end|><|assistant|>")


def test_as_many_rows_are_shown_as_there_is_room_for(tiny):
    """Room is left for the longest question and for the answer's word."""
    many, questions = PAIRS * 20, ["Which?", "What is it, then?"]
    shown = fitting(tiny, many, questions)
    room = tiny.config.max_position_embeddings

    def length(pairs):
        prefix, prompts = behind(tiny.tokenizer, pairs, questions)
        return len(prefix) + max(map(len, prompts))

    assert 0 < len(shown) < len(many) and shown == many[: len(shown)]
    assert length(shown) < room <= length(many[: len(shown) + 1])
    assert fitting(tiny, PAIRS, questions) == PAIRS
