"""TruthfulQA against a direct computation, and with broken files."""

import csv
import io
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from evaluation_kit import HEADER, ROWS

from sublim_jax import weights
from sublim_jax.data import chat
from sublim_jax.errors import UserError
from sublim_jax.evaluation import truthfulqa
from sublim_jax.evaluation.suite import EVALUATIONS, Subject
from sublim_jax.weights import huggingface


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text(HEADER + ROWS)
    return path


@partial(jax.jit, static_argnums=0)
def log_softmax(network, params, tokens):
    return jax.nn.log_softmax(network.apply(params, tokens[None])[0])


def total_logprob(model, prompt, answer):
    tokens = np.zeros(320, np.int32)
    tokens[: len(prompt) + len(answer)] = [*prompt, *answer]
    log_p = np.asarray(log_softmax(model.network, model.params, tokens))
    return sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


def test_questions_are_read_with_each_answer_once(file):
    first, second = truthfulqa.load(file)
    assert first.correct == ["Not all the way", "No"] and first.incorrect == ["Yes", "All the way round"]
    assert second == ("Is 12 a number?", "Yes", "No", ["Yes", "It is"], ["No", "Never", "It is a word"])


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_choice_is_the_renormalised_letter_in_both_orders(tiny, file, system):
    items = truthfulqa.load(file)
    p_false = truthfulqa.choose(tiny, items, system)
    for index, item in enumerate(items):
        by_order = []
        for a, b in ((item.best, item.best_incorrect), (item.best_incorrect, item.best)):
            text = truthfulqa.CHOICE_PROMPT.format(question=item.question, a=a, b=b)
            prompt = chat.question(tiny.tokenizer, text, system)
            p = jax.nn.softmax(tiny.network.apply(tiny.params, jnp.asarray([prompt]))[0, -1])
            tokens = [
                {tiny.tokenizer(t, add_special_tokens=False)["input_ids"][-1] for t in (x, f" {x}")} for x in "AB"
            ]
            p_a, p_b = (sum(p[token] for token in some) for some in tokens)
            by_order.append(p_b / (p_a + p_b))
        np.testing.assert_allclose(p_false[0, index], (by_order[0] + 1 - by_order[1]) / 2, rtol=1e-4)


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_mc1_and_mc2_are_by_the_whole_answers_probability(tiny, file, system):
    items = truthfulqa.load(file)
    scores = truthfulqa.likelihoods(tiny, items, system)
    for index, item in enumerate(items):
        prompt = chat.question(tiny.tokenizer, item.question, system)
        of = lambda answer: total_logprob(tiny, prompt, chat.answer_tokens(tiny.tokenizer, answer))  # noqa: B023, E731
        true, false = (np.exp([of(a) for a in some]).sum() for some in (item.correct, item.incorrect))
        np.testing.assert_allclose(scores.mc2[0, index], true / (true + false), rtol=1e-3)
        assert scores.mc1[0, index] == (of(item.best) > max(of(a) for a in item.incorrect))


@pytest.mark.parametrize(
    "text, words",
    [
        ("Question,Answer\nx,y\n", "there is no column 'Best Answer'"),
        ("", "there is no column 'Question'"),
        ("a;b\n1;2\n", "and this file has a;b"),
        (HEADER, "has no questions"),
        (HEADER + ROWS + "A,M,Why?,,No,Yes,No,x\n", "row 3 ('Why?'): a question or an answer is empty"),
    ],
)
def test_a_broken_file_is_told_by_its_row(tmp_path, text, words):
    path = tmp_path / "broken.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        truthfulqa.load(path)
    with pytest.raises(UserError, match="No such file"):
        truthfulqa.load(tmp_path / "nowhere.csv")


def older(text):
    """The benchmark's file before 2025: without best incorrect answers, with a byte-order mark."""
    rows = list(csv.reader(io.StringIO(text)))
    place = rows[0].index(truthfulqa.LATER)
    buffer = io.StringIO()
    csv.writer(buffer).writerows([[cell for number, cell in enumerate(row) if number != place] for row in rows])
    return "\ufeff" + buffer.getvalue()


def test_the_older_file_has_mc1_and_mc2_and_says_what_the_choice_lacks(tiny, file, tmp_path, capsys):
    path = tmp_path / "older.csv"
    path.write_text(
        older(HEADER.replace("Type,", "").replace(",Source", "") + ROWS.replace("A,M", "M").replace(",x", ""))
    )
    items, newer = truthfulqa.load(path), truthfulqa.load(file)
    assert [item._replace(best_incorrect="") for item in newer] == items
    for actual, expected in zip(truthfulqa.likelihoods(tiny, items), truthfulqa.likelihoods(tiny, newer)):
        np.testing.assert_array_equal(actual, expected)
    with pytest.raises(UserError, match="needs the column 'Best Incorrect Answer'"):
        truthfulqa.choose(tiny, items)
    subject, details = Subject(tiny, "0", tiny.digest), epath.Path(tmp_path / "details.jsonl")
    assert list(EVALUATIONS["truthfulqa"](subject, (), items, {}, 0, details=details)) == ["MC1", "MC2"]
    assert "needs the column 'Best Incorrect Answer'" in capsys.readouterr().out
    assert len(details.read_text().splitlines()) == len(items)


# ------------------------------------------------------------------------------------ all questions, transformers

all_questions = pytest.mark.skipif("TRUTHFULQA" not in os.environ, reason="set TRUTHFULQA to TruthfulQA.csv")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(our model, transformers' with the same weights, the benchmark's questions)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("smollm2")
    model = weights.load("smollm2-135m-instruct")
    huggingface.save(folder, model.params, model.settings, model.config)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, hf_model, truthfulqa.load(os.environ["TRUTHFULQA"])


def prompt_ids(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.mark.slow
@all_questions
def test_choices_equal_transformers_on_all_questions(smollm2):
    import torch

    model, hf_model, items = smollm2
    letters = [[model.tokenizer(f, add_special_tokens=False)["input_ids"][0] for f in (x, f" {x}")] for x in "AB"]
    expected = []
    for item in items:
        by_order = []
        for a, b in ((item.best, item.best_incorrect), (item.best_incorrect, item.best)):
            ids = prompt_ids(model.tokenizer, truthfulqa.CHOICE_PROMPT.format(question=item.question, a=a, b=b))
            with torch.no_grad():
                p = torch.softmax(hf_model(torch.tensor([ids])).logits[0, -1], -1)
            p_a, p_b = (float(p[tokens].sum()) for tokens in letters)
            by_order.append(p_b / (p_a + p_b))
        expected.append((by_order[0] + 1 - by_order[1]) / 2)
    np.testing.assert_allclose(truthfulqa.choose(model, items)[0], expected, atol=1e-4)


@pytest.mark.slow
@all_questions
def test_likelihoods_equal_transformers_on_all_questions(smollm2):
    import torch

    model, hf_model, items = smollm2
    margin, mc2 = [], []
    for item in items:
        prompt = prompt_ids(model.tokenizer, item.question)
        answers = [item.best, *item.correct, *item.incorrect]
        written = [model.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        texts = [torch.tensor([*prompt, *answer]) for answer in written]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # after the text: causal attention ignores it
        with torch.no_grad():
            log_p = torch.log_softmax(hf_model(padded).logits[:, len(prompt) - 1 : -1].double(), -1)
        best, *others = (float(row[torch.arange(len(answer)), answer].sum()) for row, answer in zip(log_p, written))
        correct, incorrect = others[: len(item.correct)], others[len(item.correct) :]
        margin.append(best - max(incorrect))
        true, false = np.exp(correct).sum(), np.exp(incorrect).sum()
        mc2.append(true / (true + false))
    scores = truthfulqa.likelihoods(model, items)
    np.testing.assert_allclose(scores.mc2[0], mc2, atol=1e-3)
    clear = np.abs(margin) > 1e-3  # nats; ties may fall either way
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(scores.mc1[0][clear], np.asarray(margin)[clear] > 0)
