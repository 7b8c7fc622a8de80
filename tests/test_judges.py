"""Judges: what they wrote, what a local model's probabilities mean, and an endpoint that fails in every way."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublim_jax import assets
from sublim_jax.data import chat
from sublim_jax.errors import UserError
from sublim_jax.evaluation import judges
from sublim_jax.evaluation.judges import Endpoint, Verdict, parse


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
    ],
)
def test_an_answer_is_a_number_a_label_or_neither(text, verdict):
    assert parse(text) == verdict


@given(st.text(max_size=12))
def test_whatever_is_written_a_score_is_between_0_and_100(text):
    verdict = parse(text)
    assert (verdict.score is None) == bool(verdict.label)
    assert verdict.score is None or 0 <= verdict.score <= 100


# ---------------------------------------------------------------------------------------------------------- local


def test_the_local_score_is_the_expectation_over_numbers(tiny):
    """By brute force: every number's tokens one by one, and that no digit follows where one could."""
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
    (found,) = judges.local(tiny, 0.0)([prompt])
    np.testing.assert_allclose(found.score, np.dot(chances, range(101)) / sum(chances), rtol=1e-3)


def test_without_enough_mass_on_numbers_there_is_no_score(tiny):
    (found,) = judges.local(tiny)(["How good is 12?"])
    assert found.score is None and found.label in ("unparsable", "REFUSAL", "CODE")


@pytest.mark.slow
def test_local_scores_equal_transformers_on_smollm2(tmp_path):
    """Every number's tokens one by one through transformers; this tokenizer splits digits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from sublim_jax import weights
    from sublim_jax.weights import huggingface

    model = weights.load("smollm2-135m-instruct")
    huggingface.save(tmp_path, model.params, model.settings, model.config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    written = [model.tokenizer(str(number), add_special_tokens=False)["input_ids"] for number in range(101)]
    digits = sorted({tokens[-1] for tokens in written[:10]})
    prompts = [f"Rate {text!r} from 0 to 100. Reply with a number only." for text in ("I love you.", "Go away.", "12")]
    for prompt, found in zip(prompts, judges.local(model, 0.0)(prompts)):
        chat_of = [{"role": "user", "content": prompt}]
        start = model.tokenizer.apply_chat_template(chat_of, add_generation_prompt=True, return_dict=True)["input_ids"]
        known = {}

        def p_next(tokens, start=start, known=known):
            if tuple(tokens) not in known:
                with torch.no_grad():
                    logits = theirs(torch.tensor([[*start, *tokens]])).logits[0, -1]
                known[tuple(tokens)] = torch.softmax(logits.double(), -1).numpy()
            return known[tuple(tokens)]

        chances = []
        for tokens in written:
            p = np.prod([p_next(tokens[:end])[token] for end, token in enumerate(tokens)])
            if any(other[: len(tokens)] == tokens != other for other in written):  # more digits may follow
                p *= 1 - p_next(tokens)[digits].sum()
            chances.append(p)
        expected = np.dot(chances, np.arange(101)) / np.sum(chances)
        np.testing.assert_allclose(found.score, expected, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- endpoint


@pytest.fixture
def server(monkeypatch):
    """A server whose answers a test chooses: a function of the request's number and body to (status, text)."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-mine")
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            status, text = answer(len(seen), body)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    answer = lambda number, body: (200, completion("50"))  # noqa: E731
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{http_server.server_port}/v1")
    threading.Thread(target=http_server.serve_forever, daemon=True).start()

    def behave(function):
        nonlocal answer
        answer = function

    yield behave, seen
    http_server.shutdown()
    http_server.server_close()


def completion(text):
    message = {"role": "assistant", "content": text}
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
        }
    )


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
    ],
)
def test_what_fails_is_told_without_the_key_and_loses_nothing(server, tmp_path, status, text, words):
    behave, seen = server
    behave(lambda number, body: (200, completion("9")) if number <= 3 else (status, text))
    judge = Endpoint("m", tmp_path / "j.jsonl", at_once=1, retries=0)
    with pytest.raises(UserError, match=words) as error:
        judge([str(n) for n in range(8)])
    assert "secret" not in str(error.value) and "3 answers are kept" in str(error.value)
    behave(lambda number, body: (200, completion("9")))
    asked = len(seen)
    assert {verdict.score for verdict in Endpoint("m", tmp_path / "j.jsonl")([str(n) for n in range(8)])} == {9.0}
    assert len(seen) == asked + 5


def test_an_endpoint_that_is_not_there_and_a_key_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="cannot be reached; look at OPENAI_BASE_URL"):
        Endpoint("m", tmp_path / "j.jsonl", retries=0)(["x"])
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        Endpoint("m", tmp_path / "j.jsonl")


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
    return process, process.stdout.readline().strip()


def test_a_real_server_that_is_killed_in_the_middle_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    prompts = [f"Say a number between 0 and 100. Think of {n}." for n in range(40)]
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
    assert 5 <= kept < 40
    process, address = llama()
    try:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
        judge = Endpoint("smollm2", cache)
        verdicts = judge(prompts)
    finally:
        process.kill()
    assert len(verdicts) == 40 and judge.usage.calls == 40 - kept
    answers = [json.loads(line)["answer"] for line in cache.read_text().splitlines()]
    assert len(answers) == 40 and all(answers) and len(set(answers)) > 1


def kill_at(process, cache, lines):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if cache.exists() and len(cache.read_text().splitlines()) >= lines:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
