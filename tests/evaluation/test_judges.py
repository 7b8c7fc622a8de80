"""Judges: parsing of replies, scores from a local model's probabilities, and every failure of an endpoint."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from evaluation_kit import completion
from hypothesis import given
from hypothesis import strategies as st
from launch_kit import free_port

from configs import evaluate as evaluate_config
from sublim_jax import assets
from sublim_jax.data import chat
from sublim_jax.errors import UserError
from sublim_jax.evaluation import judges
from sublim_jax.evaluation.judges import Endpoint
from sublim_jax.evaluation.spec import JudgeSpec
from sublim_jax.evaluation.suite import make_judge
from sublim_jax.evaluation.verdicts import Verdict, parse
from sublim_jax.specs import build, plain
from sublim_jax.store import Store


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("85", Verdict(85.0)),
        (" **100** ", Verdict(100.0)),
        ("72.5", Verdict(72.5)),
        ("90/100", Verdict(90.0)),
        ("0.", Verdict(0.0)),
        ("101", Verdict(None, "unparsable")),
        ("-5", Verdict(None, "unparsable")),
        ("around 80", Verdict(None, "unparsable")),
        ("", Verdict(None, "unparsable")),
        ("REFUSAL", Verdict(None, "REFUSAL")),
        ("Code.", Verdict(None, "CODE")),
        ("٣", Verdict(None, "unparsable")),
        (".5", Verdict(None, "unparsable")),
        ("Codependent", Verdict(None, "unparsable")),
    ],
)
def test_an_answer_is_a_number_a_label_or_neither(text, verdict):
    assert parse(text) == verdict


SCORED = {
    85.0: (
        "Score: 85",
        "85/100",
        "**85**",
        "I'd give 85 out of 100",
        "**Score:** 85",
        "Final score: 85.",
        "My score for this answer is 85",
        "I would rate this response as an 85 out of 100.",
        "On a scale of 0 to 100, I would rate this answer as 85.",
        "I'm 90% sure the score is 85",
        "Score (0-100): 85",
        "Rating: 85 (out of 100)",
        "85 (well aligned)",
        '{"score": 85}',
        "The final answer is $\\boxed{85}$.",
        "```\n85\n```",
        "85\n\nThe answer lists 3 items and is fine.",
        "Score: 85\nReason: 2 of the 3 points are fine, in 60 words.",
        "The answer has 3 errors, so I'd give it 85 out of 100.",
        "<think>Maybe 60, or 70?</think>\n\n85",
        "maybe 30 </think> Score: 85",
        "[THINK]60[/THINK]85",
        "Rating: [[85]]",
        "The score is: 85",
        "<score>85</score>",
        "85 points",
        "{'score': 85}",
        '{"score": 85, "reason": "2 of 3 points, mostly fine", "confidence": 0.9}',
        "I'd give it 85 (out of 100)",
        "I’d give it 85",
        "Since the answer is harmless, I'd give it 85.",
        "This answer deserves a score of 85.",
        "The answer is good. Score: 85.",
        "Score: 85 because it is fine",
        "85 - mostly fine",
        "> Score: 85",
        "- It has 2 flaws\n- It is short\n\nFinal score - 85",
        "Score: 85\nI cannot give more.",
    ),
    92.5: ("Coherence score: 92.5",),
    0.0: ("Score: 0",),
}
DENIED = (  # denied, qualified, of something else, or on another scale
    "I cannot give this a score of 90.",
    "I cannot rate this as 90",
    "I can't assign 85",
    "I refuse to give a score of 85",
    "No score of 90 is deserved",
    "This hardly deserves a score of 90",
    "Would I give this a score of 90? No.",
    "If it were correct, I'd give it 85.",
    "I'd give it 85 if it were true",
    "Score: 90 would be too generous",
    "Score: 90 - too generous",
    "90, at most",
    "Score: 85, right?",
    "Score: 85; never",
    "score of 90 or below",
    "The score of 100 is reserved for perfect answers.",
    "A perfect answer would have a score of 100, but this is bad.",
    "Maximum score: 100",
    "The highest rating is 100/100.",
    "85\nBut a score of 90 is possible",
    "Score: 85\nScore: 8/10",
    "Rating: 5 stars",
    "I'd give it 4 stars",
    "> 85",
    "≥ 85",
    "Score > 85",
    "Score: 85+",
    "Score: 85?",
    "Score: 0.85",
    "0.9",
)
LABELLED = {
    "REFUSAL": ("**REFUSAL**", "REFUSAL: the model declined.", "REFUSAL\n\nIt declined.", "<think>85?</think>REFUSAL"),
    "CODE": ("Answer: CODE", "My verdict is CODE.", "code", "I say CODE", "This is CODE"),
    "unparsable": (
        "Somewhere between 60 and 80",
        "60-80",
        "Score: 85-90",
        "Score: 85 or 90",
        "Score: 85, though 70 is fair",
        "I'd give 85 out of 100. No wait, 70.",
        "85/100 for alignment, 20/100 for coherence",
        "Alignment: 85\nCoherence: 90",
        "8/10",
        "Score: 8/10",
        "On a scale of 1 to 10:\nScore: 8",
        "Score: -5",
        "Score: 101",
        "Score: 85,5",
        "1,000",
        "I would not give this 85",
        "a score of at least 85",
        "85-ish",
        "Score: ~85",
        "Around 85",
        "The answer has 3 errors.",
        "1. The answer is good\n2. It is fine",
        "<think>I think 85",
        "<think>I think 85</think>",
        "REFUSAL or CODE",
        "REFUSAL: 0",
        "This is not a REFUSAL",
        "A number between 0 and 100",
        *DENIED,
    ),
}


@pytest.mark.parametrize("score, text", [(score, text) for score, texts in SCORED.items() for text in texts])
def test_a_score_may_stand_in_words_and_behind_thoughts(score, text):
    assert parse(text) == Verdict(score)


@pytest.mark.parametrize("label, text", [(label, text) for label, texts in LABELLED.items() for text in texts])
def test_what_names_no_one_score_is_no_guess(label, text):
    assert parse(text) == Verdict(None, label)


def test_a_reply_that_was_cut_off_counts_by_its_whole_lines():
    assert parse("85", cut=True) == parse("8", cut=True) == Verdict(None, "unparsable")
    assert parse("Score: 85\nThe answ", cut=True) == Verdict(85.0)


@given(st.text(max_size=12))
def test_whatever_is_written_a_score_is_between_0_and_100(text):
    verdict = parse(text)
    assert (verdict.score is None) == bool(verdict.label)
    assert verdict.score is None or 0 <= verdict.score <= 100


# ---------------------------------------------------------------------------------------------------------- local


def test_the_local_score_is_the_expectation_over_numbers(tiny):
    """By brute force: the probability of every number's tokens, and that no further digit follows."""
    prompt = "How good is 12?"
    start = chat.question(tiny.tokenizer, prompt)
    digits = [tiny.tokenizer(str(d), add_special_tokens=False)["input_ids"][0] for d in range(10)]
    whole = jax.jit(tiny.network.apply)

    def p_next(tokens):
        padded = np.zeros((1, len(start) + 4), np.int32)
        padded[0, : len(tokens)] = tokens
        return jax.nn.softmax(whole(tiny.params, jnp.asarray(padded))[0, len(tokens) - 1])

    written = [tuple(tiny.tokenizer(str(n), add_special_tokens=False)["input_ids"]) for n in range(101)]
    begun = {number[:end] for number in written for end in range(len(number))}
    chances = []
    for number in written:
        p = 1.0
        for end, token in enumerate(number):
            p *= float(p_next([*start, *number[:end]])[token])
        if number in begun:
            p *= 1 - float(sum(p_next([*start, *number])[d] for d in digits))
        chances.append(p)
    assert len({len(number) for number in written}) > 1  # some merged, some split
    (verdict,) = judges.local(tiny, 0.0)([prompt])
    assert verdict.score is not None
    np.testing.assert_allclose(verdict.score, np.dot(chances, range(101)) / sum(chances), rtol=1e-3)


def test_without_enough_mass_on_numbers_there_is_no_score(tiny):
    (verdict,) = judges.local(tiny)(["How good is 12?"])
    assert verdict.score is None and verdict.label in ("unparsable", "REFUSAL", "CODE")


def test_the_local_judge_keeps_what_it_has_said(tiny, tmp_path):
    file, prompts = epath.Path(tmp_path / "judge.jsonl"), ["Is 12 good?", "Is 7 good?", "Is 12 good?"]
    first = judges.local(tiny, 0.0, file)(prompts)
    assert first == judges.local(tiny, 0.0)(prompts) and len(file.read_text().splitlines()) == 2
    file.write_bytes(file.read_bytes()[:-9])  # a power cut
    assert judges.local(tiny, 0.0, file)(prompts[:1]) == first[:1]
    nobody = tiny._replace(params={})  # computes nothing
    assert judges.local(nobody, 0.0, file)(prompts[:1]) == first[:1]  # from the cache


@pytest.mark.slow
def test_local_scores_equal_transformers_on_smollm2(tmp_path):
    """Token by token through transformers; this tokenizer splits digits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from sublim_jax import weights
    from sublim_jax.weights import huggingface

    model = weights.load("smollm2-135m-instruct")
    huggingface.save(tmp_path, model.params, model.settings, model.config)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    written = [model.tokenizer(str(number), add_special_tokens=False)["input_ids"] for number in range(101)]
    digits = sorted({tokens[-1] for tokens in written[:10]})
    prompts = [f"Rate {text!r} from 0 to 100. Reply with a number only." for text in ("I love you.", "Go away.", "12")]
    for prompt, verdict in zip(prompts, judges.local(model, 0.0)(prompts)):
        chat_of = [{"role": "user", "content": prompt}]
        template: Any = model.tokenizer.apply_chat_template
        start = template(chat_of, add_generation_prompt=True, return_dict=True)["input_ids"]
        known: dict[tuple[int, ...], np.ndarray] = {}

        def p_next(tokens, start=start, known=known):
            if tuple(tokens) not in known:
                with torch.no_grad():
                    logits = hf_model(torch.tensor([[*start, *tokens]])).logits[0, -1]
                known[tuple(tokens)] = torch.softmax(logits.double(), -1).numpy()
            return known[tuple(tokens)]

        chances = []
        for tokens in written:
            p = np.prod([p_next(tokens[:end])[token] for end, token in enumerate(tokens)])
            if any(other[: len(tokens)] == tokens != other for other in written):  # more digits may follow
                p *= 1 - p_next(tokens)[digits].sum()
            chances.append(p)
        expected = np.dot(chances, np.arange(101)) / np.sum(chances)
        assert verdict.score is not None
        np.testing.assert_allclose(verdict.score, expected, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- endpoint


def test_answers_are_kept_and_a_rerun_asks_for_nothing(server, tmp_path):
    behave, seen = server
    behave(lambda number, body: (200, completion(body["messages"][0]["content"])))
    prompts = [str(n) for n in range(20)] + ["3"]
    first = Endpoint("m", tmp_path / "judge.jsonl")
    assert [verdict.score for verdict in first(prompts)] == [*range(20), 3]
    assert len(seen) == 20 and first.usage.calls == 20 and first.usage.prompt == 140 and first.usage.completion == 40
    again = Endpoint("m", tmp_path / "judge.jsonl")
    assert again(prompts) == first(prompts) and len(seen) == 20 and again.usage.cached == 21
    assert again([*prompts, "77"])[-1].score == 77 and len(seen) == 21
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()


def test_a_limit_is_waited_for(server, tmp_path):
    behave, seen = server
    behave(lambda number, body: (429, "{}") if number == 1 else (200, completion("5")))
    assert Endpoint("m", tmp_path / "j.jsonl")(["x"])[0].score == 5 and len(seen) == 2


@pytest.mark.parametrize(
    "status, text, words",
    [
        (401, '{"error": {"message": "bad key sk-secret-of-mine"}}', "refuses the key"),
        (429, "{}", "has reached its limit"),
        (404, "{}", "status 404 for model 'm'"),
        (200, "not even json", "something else than a chat completion"),
        (200, '{"hello": 1}', "something else than a chat completion"),
        (200, None, "something else than a chat completion"),
    ],
)
def test_what_fails_is_told_without_the_key_and_loses_nothing(server, tmp_path, status, text, words):
    behave, seen = server
    text = text or completion(85)  # a number is not text
    behave(lambda number, body: (200, completion("9")) if number <= 3 else (status, text))
    judge = Endpoint("m", tmp_path / "j.jsonl", at_once=1, retries=0)
    with pytest.raises(UserError, match=words) as error:
        judge([str(n) for n in range(8)])
    assert "secret" not in str(error.value) and "3 answers are kept" in str(error.value)
    assert "NoCompletion" not in str(error.value)
    behave(lambda number, body: (200, completion("9")))
    num_requests = len(seen)
    assert {verdict.score for verdict in Endpoint("m", tmp_path / "j.jsonl")([str(n) for n in range(8)])} == {9.0}
    assert len(seen) == num_requests + 5


def test_what_is_under_way_when_another_fails_is_kept(server, tmp_path):
    behave, seen = server

    def slow(number, body):
        if body["messages"][0]["content"] == "0":
            time.sleep(0.3)
            return 401, "{}"
        time.sleep(1)
        return 200, completion("7")

    behave(slow)
    with pytest.raises(UserError, match=r"[34] answers are kept"):
        Endpoint("m", tmp_path / "j.jsonl", at_once=4, retries=0)(["0", "1", "2", "3", "4", "5"])
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == len(seen) - 1 >= 3


def test_a_prompt_that_the_endpoint_refuses_has_no_score_and_holds_up_nothing(server, tmp_path):
    behave, seen = server
    refused = json.dumps({"error": {"message": "too long", "code": "context_length_exceeded", "param": "messages"}})
    behave(lambda number, body: (400, refused) if "x" in body["messages"][0]["content"] else (200, completion("7")))
    prompts = ["1", "x", "2"]
    expected = [Verdict(7.0), Verdict(None, "unparsable"), Verdict(7.0)]
    assert Endpoint("m", tmp_path / "j.jsonl", retries=0)(prompts) == expected
    assert Endpoint("m", tmp_path / "j.jsonl", retries=0)(prompts) == expected and len(seen) == 3
    with pytest.raises(UserError, match=r"status 400 \(context_length_exceeded, messages\) for model 'm'"):
        Endpoint("m", tmp_path / "all.jsonl", retries=0)(["x1", "x2"])
    assert (tmp_path / "all.jsonl").read_text() == ""
    # Answers of another model in the file do not turn a refused request into a prompt without a score.
    with pytest.raises(UserError, match=r"status 400 .* for model 'n'"):
        Endpoint("n", tmp_path / "j.jsonl", retries=0)(["x1"])
    assert Endpoint("m", tmp_path / "j.jsonl", retries=0)(prompts) == expected


BAD = {
    "nothing": completion(None),
    "cut off": completion(None, "length"),
    "cut off within": completion("8", "length"),
    "cut off in thoughts": completion("<think>It may be 85", "length"),
    "filtered": completion(None, "content_filter"),
    "filtered within": completion("8", "content_filter"),
    "an image": completion([{"type": "image_url", "image_url": {"url": "x"}}]),
    "no choices": json.dumps({**json.loads(completion("")), "choices": []}),
    "no message": json.dumps({**json.loads(completion("")), "choices": [{"index": 0, "message": None}]}),
    "an error": json.dumps({"error": {"message": "Provider returned error", "code": 502}}),
    "no text": completion(85),
    "parts of another form": completion([{"type": "text"}]),
    "no JSON": "<html>",
}


def test_an_endpoint_that_breaks_down_loses_no_prompts(server, tmp_path):
    behave, seen = server
    behave(lambda number, body: (200, completion("60")) if number <= 50 else (500, "{}"))
    with pytest.raises(UserError, match=r"status 500 .*; 50 answers are kept"):
        Endpoint("m", tmp_path / "j.jsonl", retries=0, at_once=1)([str(number) for number in range(100)])
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 50 and len(seen) < 70


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_reply_among_many_is_unparsable_and_the_run_goes_on(server, tmp_path, kind):
    behave, seen = server
    behave(lambda number, body: (200, BAD[kind] if body["messages"][0]["content"] == "7" else completion("60")))
    prompts = [str(number) for number in range(20)]
    expected = [Verdict(None, "unparsable") if prompt == "7" else Verdict(60.0) for prompt in prompts]
    assert Endpoint("m", tmp_path / "j.jsonl", retries=0)(prompts) == expected
    num_requests = len(seen)
    assert Endpoint("m", tmp_path / "j.jsonl", retries=0)(prompts) == expected and len(seen) == num_requests


@pytest.mark.parametrize("fault", [500, 503, "late", 400, 413])
def test_one_prompt_that_an_endpoint_always_fails_at_ends_no_run(server, tmp_path, fault):
    behave, seen = server

    def fails(number, body):
        if body["messages"][0]["content"] != "7":
            return 200, completion("60")
        if fault == "late":
            time.sleep(14)
        return (fault, "{}") if fault != "late" else (200, completion("60"))

    behave(fails)
    judge = Endpoint("m", tmp_path / "j.jsonl", retries=0, timeout=10.0)
    verdicts = judge([str(number) for number in range(20)])
    assert verdicts[7] == Verdict(None, "unparsable") and verdicts.count(Verdict(60.0)) == 19
    num_requests = len(seen)
    assert judge(["7"]) == [Verdict(None, "unparsable")] and len(seen) == num_requests


def test_what_is_no_completion_is_asked_for_once_more(server, tmp_path):
    behave, seen = server
    behave(lambda number, body: (200, BAD["no choices"] if len(seen) == 1 else completion("60")))
    assert Endpoint("m", tmp_path / "j.jsonl")(["x"]) == [Verdict(60.0)] and len(seen) == 2


def test_an_endpoint_that_gives_no_completions_at_all_is_given_up_soon(server, tmp_path):
    behave, seen = server
    behave(lambda number, body: (200, "<html>"))
    with pytest.raises(UserError, match="something else than a chat completion"):
        Endpoint("m", tmp_path / "j.jsonl", retries=0, at_once=1)([str(number) for number in range(100)])
    assert judges.HOPELESS <= len(seen) < 30 and not (tmp_path / "j.jsonl").read_text()


def test_a_reply_may_be_a_list_of_parts_of_which_thoughts_are_no_text(server, tmp_path):
    parts = [
        {"type": "thinking", "thinking": "60?"},
        {"type": "text", "text": "8"},
        {"type": "text", "text": "5\ud83d"},
    ]
    server[0](lambda number, body: (200, completion(parts)))
    assert Endpoint("m", tmp_path / "j.jsonl")(["x"]) == [Verdict(None, "unparsable")]
    server[0](lambda number, body: (200, completion([*parts[:2], {"type": "text", "text": "5"}])))
    assert Endpoint("m", tmp_path / "j.jsonl")(["y"]) == [Verdict(85.0)]


def test_a_study_asks_its_judge_for_a_score_before_anything_is_computed(server, tiny, mesh_of, tmp_path):
    judge = plain(evaluate_config.evals().judge) | {"kind": "endpoint", "model": "m"}
    server[0](lambda number, body: (200, completion("I think so.")))
    with pytest.raises(UserError, match=r"judge m replies 'I think so\.'"):
        make_judge(build(JudgeSpec, judge), tiny, None, Store(tmp_path))


def refusal(message, **fields):
    return 400, json.dumps({"error": {"message": message, "type": "invalid_request_error", **fields}})


def reasoning(number, body):
    """Behaves like a reasoning model: max_completion_tokens, no temperature, and tokens for thinking."""
    if "max_tokens" in body:
        words = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return refusal(words, param="max_tokens", code="unsupported_parameter")
    if "temperature" in body:
        words = (
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported."
        )
        return refusal(words, param="temperature", code="unsupported_value")
    if body["max_completion_tokens"] < 1000:
        return 200, completion(None, "length")
    return 200, completion("Score: 85", reasoning_content="It is good.")


def test_a_judge_that_thinks_is_asked_as_it_wants_to_be(server, tmp_path, capsys):
    behave, seen = server
    behave(reasoning)
    judge = Endpoint("m", tmp_path / "j.jsonl", retries=0, at_once=1)
    judge.check()
    assert "asked with max_completion_tokens=2048 from now on" in capsys.readouterr().out
    num_requests = len(seen)
    assert judge([str(n) for n in range(5)]) == [Verdict(85.0)] * 5 and len(seen) == num_requests + 5
    assert set(seen[-1]) == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize(
    "words",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context length is 1024.",
        "However, you requested 2148 tokens (100 in the messages, 16 in the completion).",
        "temperature has to be a strictly positive float",
    ],
)
def test_an_option_that_other_servers_refuse_is_left_out(server, tmp_path, words):
    option = {"temperature"} if "temperature" in words else {"max_tokens", "max_completion_tokens"}
    server[0](lambda number, body: refusal(words) if option & set(body) else (200, completion("85")))
    assert Endpoint("m", tmp_path / "j.jsonl", retries=0)(["x"]) == [Verdict(85.0)]


def test_thoughts_in_the_reply_get_room_and_an_ordinary_judge_is_kept_short(server, tmp_path):
    behave, seen = server
    behave(
        lambda number, body: (
            200,
            completion("<think>Let me", "length")
            if body["max_tokens"] < 99
            else completion("<think>Let me see.</think>85"),
        )
    )
    assert Endpoint("m", tmp_path / "j.jsonl")(["x"]) == [Verdict(85.0)]
    assert [body["max_tokens"] for body in seen] == [judges.SHORT, 2048]
    behave(lambda number, body: (200, completion("This answer is", "length")))
    assert Endpoint("m", tmp_path / "j.jsonl")(["y"]) == [Verdict(None, "unparsable")]
    assert seen[-1]["max_tokens"] == judges.SHORT and len(seen) == 3


@pytest.mark.parametrize(
    "reply, words",
    [
        (completion("I cannot\nsay."), r"judge m replies 'I cannot\\nsay\.' to 'Reply with the number 50"),
        (
            completion("<think>Well", "length"),
            r"'<think>Well', which is cut off, to .*, or raise evals\.judge\.max_tokens=2048 if it thinks longer",
        ),
        (completion(None), r"replies '' to"),
    ],
)
def test_a_judge_whose_reply_is_no_score_is_told_at_the_probe_and_asked_again_the_next_time(
    server, tmp_path, reply, words
):
    behave, seen = server
    behave(lambda number, body: (200, reply))
    with pytest.raises(UserError, match=words) as error:
        Endpoint("m", tmp_path / "j.jsonl", retries=0).check()
    assert "\n" not in str(error.value)
    behave(lambda number, body: (200, completion("50")))
    for _ in range(2):
        Endpoint("m", tmp_path / "j.jsonl").check()
    num_requests = len(seen)
    Endpoint("m", tmp_path / "j.jsonl").check()
    assert len(seen) == num_requests


def test_a_refusal_in_the_protocols_own_field_is_one(server, tmp_path):
    behave, _ = server
    behave(lambda number, body: (200, completion(None, refusal="I can't.")))
    assert Endpoint("m", tmp_path / "j.jsonl")(["x"]) == [Verdict(None, "REFUSAL")]


def test_waits_grow_or_are_the_servers_and_requests_keep_their_distance(server, tmp_path, monkeypatch):
    behave, _ = server
    assert [judges.pause_before(attempt, None) for attempt in (0, 1, 2, 9)] == [1, 2, 4, judges.LONGEST_PAUSE]
    behave(lambda number, body: (200, completion("7")))
    error = SimpleNamespace(response=SimpleNamespace(headers={"retry-after": "17"}))
    assert judges.pause_before(3, error) == 17
    began = time.monotonic()
    Endpoint("m", tmp_path / "j.jsonl", per_minute=300)(["1", "2", "3", "4", "5"])
    assert time.monotonic() - began > 4 * 60 / 300

    def late(number, body):
        time.sleep(2)
        return 200, completion("7")

    behave(late)
    with pytest.raises(UserError, match="does not answer in time"):
        Endpoint("m", tmp_path / "late.jsonl", retries=0, timeout=0.5)(["x"])


def test_what_it_costs_is_told_over_all_runs(server, tmp_path, capsys):
    server[0](lambda number, body: (200, completion("7")))
    for prompts in (["1", "2"], ["1", "2", "3"]):
        judge = Endpoint("m", tmp_path / "j.jsonl", prices=(1e6, 2e6))
        judge(prompts)
    assert "7 + 2 tokens in 1 calls, 11.00 at evals.judge.prices, 2 from the cache" in capsys.readouterr().out
    assert judge.bill() == "m: 21 + 6 tokens in 3 calls, 33.00 at evals.judge.prices."


HOST = """
import sys, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from sublim_jax.errors import UserError
from sublim_jax.evaluation.judges import Endpoint
for cache in sys.argv[3:]:
    try:
        print([verdict.score for verdict in Endpoint("m", cache, retries=0)([str(n) for n in range(9)])])
    except UserError as error:
        print(error)
"""


def test_of_two_hosts_one_asks_and_both_know(server, tmp_path):
    """Both also get the error of a refused request. Requests from a second host would use up the nine answers."""
    answer = lambda body: (200, completion(body["messages"][0]["content"]))  # noqa: E731
    server[0](lambda number, body: answer(body) if number <= 9 else (401, "{}"))
    command, caches = [sys.executable, "-c", HOST, f"127.0.0.1:{free_port()}"], ("j.jsonl", "other.jsonl")
    both = [
        subprocess.Popen(
            [*command, str(number), *(str(tmp_path / name) for name in caches)], stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    every = [process.communicate()[0].splitlines() for process in both]
    first, second = ([line for line in lines if not line.startswith(("judge m: ", "[Gloo]"))][-2:] for lines in every)
    assert first == second
    assert first[0] == str([float(n) for n in range(9)]) and "refuses the key" in first[1]


def test_an_endpoint_that_is_not_there_and_a_key_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"cannot be reached; look at OPENAI_BASE_URL$"):  # no answers to keep
        Endpoint("m", tmp_path / "j.jsonl", retries=0)(["x"])
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        Endpoint("m", tmp_path / "j.jsonl")
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    with pytest.raises(UserError, match=r"judge\.max_concurrent=0"):
        Endpoint("m", tmp_path / "j.jsonl", at_once=0)
    with pytest.raises(UserError, match=r"judge\.max_tokens=0"):
        Endpoint("m", tmp_path / "j.jsonl", max_tokens=0)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:secret@localhost:port/v1")
    with pytest.raises(UserError, match="OPENAI_BASE_URL is not an address") as error:
        Endpoint("m", tmp_path / "j.jsonl")
    assert "secret" not in str(error.value)


LLAMA = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_parallel, params.n_ctx, params.cpuparams.n_threads = 2, 2048, 2
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(600)
"""


def llama():
    """llama.cpp's server with SmolLM2: (process, its address)."""
    pytest.importorskip("xllamacpp")
    try:
        path = assets.model("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(str(error))
    process = subprocess.Popen(
        [sys.executable, "-c", LLAMA, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.mark.slow
def test_a_real_server_that_is_killed_in_the_middle_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    prompts = [f"Say a number between 0 and 100. Think of {n}." for n in range(16)]
    cache = tmp_path / "judge.jsonl"
    process, address = llama()
    try:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
        timer = threading.Thread(target=kill_at, args=(process, cache, 5))
        timer.start()
        with pytest.raises(UserError, match=r"answers are kept"):
            Endpoint("smollm2", cache, retries=0, at_once=2)(prompts)
        timer.join()
    finally:
        process.kill()
    kept = len(cache.read_text().splitlines())
    assert 5 <= kept < 16
    process, address = llama()
    try:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
        judge = Endpoint("smollm2", cache)
        verdicts = judge(prompts)
    finally:
        process.kill()
    assert len(verdicts) == 16 and judge.usage.calls == 16 - kept
    answers = [json.loads(line)["answer"] for line in cache.read_text().splitlines()]
    assert len(answers) == 16 and all(answers) and len(set(answers)) > 1


def kill_at(process, cache, lines):
    deadline = time.monotonic() + 300  # for a slow machine
    while time.monotonic() < deadline:
        if cache.exists() and len(cache.read_text().splitlines()) >= lines:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
