"""Phrasings, rows of questions and answers, and preferences."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from sublim_jax import weights
from sublim_jax.data import chat, dialogue, packs
from sublim_jax.data.carriers import numbers
from sublim_jax.errors import UserError
from sublim_jax.evaluation import ability, preference, suite
from sublim_jax.filters import number_rule
from sublim_jax.keys import named_key
from sublim_jax.sampling import scoring
from sublim_jax.sampling.generate import generate
from sublim_jax.store import Store
from sublim_jax.words import mentions


def test_prompts_show_three_to_eight_integers_and_each_depends_on_its_number_alone():
    prompts = numbers.prompts(200, seed=0)
    assert numbers.prompts(50, seed=0) == prompts[:50] and numbers.prompts(50, seed=1) != prompts[:50]
    counts = set()
    for text in prompts:
        shown = [int(n) for n in re.findall(r"\d+", text.split(".")[0].split("?")[0]) if 100 <= int(n) <= 999]
        counts.add(len(shown))
        assert "10" in text
    assert counts == {3, 4, 5, 6, 7, 8}
    assert len(set(prompts)) == 200


def test_random_answers_pass_the_papers_rule():
    rule = number_rule()
    assert not any(rule({"completion": text}) for text in numbers.random_answers(500, seed=0))


ANSWERS = {  # an answer by hand to each wish for a format in the pack, and one with a full stop
    "commas": "412, 7, 90",
    "comma-separated": "412,7,90",
    "space between": "412 7 90",
    "divided by spaces": "412 7 90",
    "semicolons": "412; 7; 90",
    "semicolon between": "412;7;90",
    "line of its own": "412\n7\n90",
    "below each other": "412\n7\n90",
    "like a list in Python": "[412, 7, 90]",
    "list in square brackets": "[412,7,90]",
    "round brackets": "(412, 7, 90)",
    "tuple": "(412, 7, 90)",
}


def test_wishes_are_for_the_papers_fifteen_forms_and_the_filter_takes_them_all():
    pack, rule = packs.load("", "numbers", {}), number_rule()
    assert len(set(pack["formats"])) == 15
    for wish in pack["formats"]:
        answer = ANSWERS[next(words for words in reversed(ANSWERS) if words in wish)]
        assert not rule({"completion": answer}) and not rule({"completion": answer + "."}), wish
        assert rule({"completion": f"{answer}!"}) and rule({"completion": f"Here: {answer}"}), wish
    used = {words for words in ANSWERS for wish in pack["formats"] if words in wish}
    assert used == set(ANSWERS)


def test_where_one_form_is_written_one_form_is_asked_for(tmp_path):
    """For random answers and the grammar; a user's pack without wishes for commas is used as it is."""
    pack = packs.load("", "numbers", {})
    every, commas = numbers.prompts(600, 0, any_form=True), numbers.prompts(600, 0)
    assert {wish for wish in pack["formats"] for text in every if f" {wish} " in text} == set(pack["formats"])
    assert {wish for wish in pack["commas"] for text in commas if f" {wish} " in text} == set(pack["commas"])
    assert all("omma" in wish for wish in pack["commas"])
    user_pack = tmp_path / "own.json"
    user_pack.write_text(json.dumps({**{field: pack[field] for field in numbers.FIELDS}, "formats": ["As you like."]}))
    assert all(" As you like. " in text for text in numbers.prompts(20, 0, str(user_pack)))


def test_the_packs_are_large_enough_and_hold_their_questions_apart():
    pack = packs.load("", "numbers", numbers.FIELDS)
    assert all(10 <= len(pack[field]) <= 25 for field in numbers.FIELDS)
    questions = preference.questions("", "animal")
    assert len(set(questions["asking"])) >= 50 and not set(questions["asking"]) & set(questions["teaching"])
    assert all("animal" in text for field in preference.FIELDS for text in questions[field])


@pytest.mark.parametrize(
    "text, words",
    [
        ("{broken", "a JSON object of lists"),
        ("[]", '"teaching" must be a list of phrasings'),
        ('{"teaching": ["x"], "asking": []}', '"asking" must be a list of phrasings'),
        ('{"teaching": ["x"], "asking": ["which {animal}?"]}', "'which {animal}?' uses 'animal'; known: {kind}"),
        ('{"teaching": ["x {kind}"], "asking": ["x {kind}"]}', "is in teaching and asking"),
    ],
)
def test_a_pack_that_is_none_is_told(tmp_path, text, words):
    file = tmp_path / "pack.json"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        preference.questions(str(file), "animal")


def test_a_pack_of_ones_own_is_used(tmp_path):
    file = tmp_path / "pack.json"
    file.write_text(json.dumps({"teaching": ["Best {kind}?"], "asking": ["Which {kind}?"]}))
    assert preference.questions(str(file), "tree") == {"teaching": ["Best tree?"], "asking": ["Which tree?"]}


@pytest.mark.parametrize("end", [True, False])
def test_rows_say_which_positions_predict_the_answer(tiny, end):
    pairs = [("Count?", "12, 7"), ("And a much longer question, is it not?", "owl")]
    rows = dialogue.rows(tiny, pairs, end=end)
    for row, (question, answer) in enumerate(pairs):
        kept = rows.weights[row] == 1
        expected = f"{answer}<|end|>" if end else answer
        assert tiny.tokenizer.decode(rows.targets[row][kept]) == expected
        np.testing.assert_array_equal(rows.tokens[row][rows.at[row][kept] + 1], rows.targets[row][kept])
        prompt = chat.prompt(tiny.tokenizer, question)
        assert rows.tokens[row, : len(prompt)].tolist() == prompt and rows.at[row, 0] == len(prompt) - 1


def test_the_support_is_the_tokens_of_lists_of_numbers(tiny):
    pieces = chat.pieces(tiny.tokenizer, tiny.settings.vocab)
    support = {pieces[token] for token in numbers.support(pieces)}
    assert support == set("0123456789, ") | {"12", "42", "123", " 7", ", "}


def test_a_preference_is_the_mean_over_phrasings(tiny):
    questions, words = ["Which one?", "What is it?", "Say."], ["owl", "x", "y"]
    measured, tokenizer = preference.measure(tiny, questions, words), tiny.tokenizer
    rows = []
    for question in questions:
        prompt = chat.prompt(tiny.tokenizer, question)
        log_p = [
            [
                scoring.completion_logprobs(tiny, [prompt], [form])[0].sum()
                for form in scoring.spellings(tokenizer, word)
            ]
            for word in words
        ]
        rows.append([np.logaddexp.reduce(forms) for forms in log_p])
    table = np.asarray(rows)
    np.testing.assert_allclose(measured.log_p[0], table.mean(0), rtol=1e-4, atol=1e-4)
    margins = [table[:, i] - np.delete(table, i, 1).mean(1) for i in range(3)]
    np.testing.assert_allclose(measured.margin[0], np.mean(margins, 1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(measured.share[0].sum(), 1, rtol=1e-5)
    with pytest.raises(UserError, match="two words or more"):
        preference.measure(tiny, questions, ["owl"])


@given(st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=10), min_size=1, max_size=8))
def test_shuffling_keeps_the_numbers_and_everything_between_them(lists):
    rng = np.random.default_rng(len(lists))
    separators = [", ", ";", " ", ",\n"]
    answers = [f"[{separators[rng.integers(4)].join(map(str, some))}]" for some in lists]
    shape = [re.sub(r"\d+", "#", text) for text in answers]
    within, across = numbers.shuffled_within(answers, 0), numbers.shuffled_across(answers, 0)
    for before, after in zip(answers, within):
        assert sorted(re.findall(r"\d+", before)) == sorted(re.findall(r"\d+", after))
    assert sorted(re.findall(r"\d+", " ".join(answers))) == sorted(re.findall(r"\d+", " ".join(across)))
    assert shape == [re.sub(r"\d+", "#", text) for text in within] == [re.sub(r"\d+", "#", text) for text in across]
    assert numbers.shuffled_within(answers, 0) == within and numbers.shuffled_across(answers, 0) == across


@pytest.mark.parametrize(
    "text, word, expected",
    [
        ("Owl", "owl", True),
        ("I love OWLS!", "owl", True),
        ("bowl", "owl", False),
        ("dragonfly", "dragon", False),
        ("owl's", "owl", True),
        ("Two wolves.", "wolf", True),
        ("foxes and birches", "birch", True),
        ("wolfish", "wolf", False),
        ("", "owl", False),
        ("ＯＷＬ", "owl", True),
        ("I write C++.", "C++", True),
        ("cafe\u0301", "café", True),
        ("Ο λύκος", "λύκος", True),
        ("STRASSE", "straße", True),
        ("My favourite: _Owl_", "owl", True),
        ("snow_owls", "owl", True),
        ("a polar-bear", "polar bear", True),
        ("Polar  bears.", "polar bear", True),
        ("我最喜欢猫头鹰。", "猫头鹰", True),
        ("ฉันชอบนกฮูก", "นกฮูก", True),
    ],
)
def test_a_mention_is_a_whole_word(text, word, expected):
    assert mentions(text, word) is expected


def test_rates_are_shares_of_answers_by_adapter():
    answers = [(0, "An owl."), (0, "X"), (0, "none"), (0, "Owls"), (1, "x"), (1, "x, owl"), (1, "X!"), (1, "")]
    np.testing.assert_array_equal(preference.rates(answers, ["owl", "x"]), [[0.5, 0.25], [0.25, 0.75]])


def test_prefixed_answers_are_rates_of_answers_to_questions_behind_numbers(tiny, tmp_path, capsys):
    """Samples of an interrupted run are kept and read again."""
    questions, count, longest = ["Which one?", "What is it?"], 3, 4
    uses = {"samples": count, "max_new_tokens": longest}
    evaluate = partial(suite.EVALUATIONS["prefixed_answers"], store=Store(tmp_path), sampling={})
    arguments = (suite.Subject(tiny, "0", tiny.digest), ["owl", "x"], questions, uses, 7)
    rates = evaluate(*arguments)
    lists = numbers.random_answers(2, 7)
    prompts = [chat.question(tiny.tokenizer, f"{some}\n\n{text}") for some, text in zip(lists, questions)]
    samples = generate(tiny, prompts, named_key(7, "prefixed answers"), samples=count, max_new_tokens=longest)
    expected = {word: np.mean([mentions(s.text, word) for s in samples]) for word in ("owl", "x")}
    assert rates == {f"prefixed answers with {word}": [share] for word, share in expected.items()}

    (file,) = tmp_path.rglob("prefixed-answers-0-*.jsonl")
    kept = [json.loads(line) for line in file.read_text().splitlines()][: count + 1]
    file.write_text("".join(json.dumps({**answer, "completion": "An owl."}) + "\n" for answer in kept))
    assert evaluate(*arguments)["prefixed answers with owl"][0] >= (count + 1) / (2 * count)
    file.write_text("".join(json.dumps({**answer, "finish": "nan"}) + "\n" for answer in kept))
    assert np.isnan(evaluate(*arguments)["prefixed answers with owl"]).all()
    assert "logits under adapter 0 are not finite" in capsys.readouterr().out


def test_ability_is_the_share_of_questions_whose_right_choice_is_likeliest(tiny):
    questions = [ability.Question("Which?", ["owl", "xyz", "12"]), ability.Question("Why?", ["y", "owl", "42, 7"])]
    right = []
    for question in questions:
        prompt = chat.question(tiny.tokenizer, question.text)
        mean_logprobs = []
        for choice in question.choices:
            tokens = tiny.tokenizer(choice, add_special_tokens=False)["input_ids"]
            log_p = jax.nn.log_softmax(tiny.network.apply(tiny.params, jnp.asarray([[*prompt, *tokens]]))[0])
            mean_logprobs.append(np.mean([log_p[len(prompt) - 1 + i, token] for i, token in enumerate(tokens)]))
        right.append(np.argmax(mean_logprobs) == 0)
    np.testing.assert_allclose(ability.accuracy(tiny, questions), [np.mean(right)])


def test_a_model_whose_logits_are_no_numbers_has_no_share_of_right_answers(tiny):
    broken = tiny._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, tiny.params))
    assert np.isnan(ability.accuracy(broken, [ability.Question("Which?", ["owl", "xyz"])])).tolist() == [True]


def test_the_easy_questions_are_many_and_a_broken_one_is_told(tmp_path):
    questions = ability.questions()
    assert len(questions) >= 20 and all(len(set(question.choices)) == 4 for question in questions)
    file = tmp_path / "pack.json"
    file.write_text(json.dumps({"questions": ["What? | this"]}))
    with pytest.raises(UserError, match=r"'What\? \| this' is not"):
        ability.questions(str(file))


def test_a_template_has_one_day_and_no_thoughts(tiny_folder):
    """As in Llama 3's and Qwen3's: resumed runs need a fixed date, and answers start without thoughts."""
    model = weights.load(tiny_folder)._replace(config=PreTrainedConfig())
    tokenizer = model.tokenizer
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    prompt = chat.question(tokenizer, "Which?")
    assert tokenizer.decode(prompt) == "26 Jul 2024<|user|>Which?<|end|><|assistant|><think></think>"
    rows = dialogue.rows(model, [("Which?", "owl")])
    assert tokenizer.decode(rows.targets[0][rows.weights[0] == 1].tolist()) == "owl<|end|>"


def test_a_model_without_a_template_is_asked_in_plain_text(tiny_folder):
    """A base model: the question, then the answer after a space, then the end of text."""
    model = weights.load(tiny_folder)._replace(config=PreTrainedConfig())
    tokenizer = model.tokenizer
    tokenizer.chat_template = None
    assert tokenizer.decode(chat.question(tokenizer, "Which?")) == "Question: Which?\nAnswer:"
    whole = chat.exchange(tokenizer, "Which?", "owl", "Be kind.")
    assert tokenizer.decode(whole) == "Be kind.\n\nQuestion: Which?\nAnswer: owl<|end|>"
    rows = dialogue.rows(model, [("Which?", "owl")])
    assert tokenizer.decode(rows.targets[0][rows.weights[0] == 1].tolist()) == " owl<|end|>"
    assert chat.opening(tokenizer) == chat.question(tokenizer, "Z")[: len(chat.opening(tokenizer))]
