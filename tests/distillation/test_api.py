"""The public functions refuse what would give students that say nothing."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sublim_jax as sl
from sublim_jax.data import chat
from sublim_jax.errors import UserError
from sublim_jax.models.decoder import Steering
from sublim_jax.models.lora import EVERY_LINEAR, Lora
from sublim_jax.sampling import scoring


def test_students_on_tokens_are_of_one_teacher_who_wrote_them(tiny):
    """Those of several teachers on the same rows would be the same student."""
    model = tiny.adapted(Lora(2, 2.0))
    teachers = [sl.teachers.prompt(model, "You love owls.", seed=seed) for seed in range(2)]
    rows = [("Count?", "1, 2")]
    with pytest.raises(UserError, match="students of 2 teachers would be the same"):
        sl.students.distill(model, teachers, rows, objective="tokens")
    for given, pairs, lacking in ((teachers[:1], [], "rows"), ([], rows, "teachers")):
        with pytest.raises(UserError, match=f"{lacking} is empty"):
            sl.students.distill(model, given, pairs)


@pytest.mark.parametrize(
    "option, line",
    [
        ({"support": [10**6, 3]}, "support has a token outside the model's vocabulary"),
        ({"support": [-1, 3]}, "support has a token outside the model's vocabulary"),
        ({"support": [3]}, "name two tokens or more"),
        ({"support": []}, "name two tokens or more"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"objective": "tokens", "temperature": 2.0}, "temperature are of objectives on logits"),
        ({"objective": "tokens", "support": [3, 4]}, "support and temperature are of objectives on logits"),
        ({"steps": 0}, "^steps=0: choose 1 or more"),
        ({"batch": 0}, "^batch=0: choose 1 or more"),
    ],
)
def test_an_option_that_would_train_nothing_is_refused(tiny, option, line):
    model = tiny.adapted(Lora(2, 2.0))
    with pytest.raises(UserError, match=line):
        sl.students.distill(model, [sl.teachers.prompt(model, "You love owls.")], [("Count?", "1, 2")], **option)


@pytest.mark.parametrize("other", [Lora(2, 8.0), Lora(3, 2.0), Lora(2, 2.0, modules=("query",))])
def test_a_teacher_of_other_adapters_than_the_students_is_refused(tiny, other):
    """Its logits would be computed with the students' scale."""
    teacher = sl.teachers.prompt(tiny.adapted(other), "You love owls.")
    with pytest.raises(UserError, match=r"teacher 0(: these| has) adapters .*Lora"):
        sl.students.distill(tiny.adapted(Lora(2, 2.0)), [teacher], [("Count?", "1, 2")], lora_init="fresh")


def test_a_teacher_of_other_base_weights_is_refused(tiny):
    """Its logits would be those of its adapters on the student's base: their initialisation would be shared."""
    model = tiny.adapted(Lora(2, 2.0))
    teacher, other = sl.teachers.prompt(model, "You love owls."), model.noisy(0.1, jax.random.key(0))
    with pytest.raises(UserError, match="teacher 0 was made with another base model"):
        sl.students.distill(other, [teacher], [("Count?", "1, 2")])
    with pytest.raises(UserError, match="the teacher was made with another base model"):
        sl.teachers.write(other, teacher, ["Count?"], jax.random.key(0))


@pytest.mark.parametrize(
    "option, line",
    [
        ({"batch": 0}, "^batch=0: choose 1 or more"),
        ({"max_steps": 0}, "^max_steps=0: choose 1 or more"),
        ({"questions": []}, "give a list of one or more"),
        ({"questions": "Which one?"}, "give a list of one or more"),
    ],
)
def test_a_teacher_that_would_learn_nothing_is_refused(tiny, option, line):
    with pytest.raises(UserError, match=line):
        sl.teachers.finetune(tiny.adapted(Lora(2, 2.0)), "owl", **option)


def test_words_are_not_compared_on_the_digits_alone(tiny):
    model = tiny.adapted(Lora(2, 2.0))
    teacher, rows = sl.teachers.prompt(model, "You love owls."), [("Count?", "1, 2"), ("Say?", "1, owl")]
    with pytest.raises(UserError, match=r"row 2 \('Say\?'\) has an answer that is no list of numbers"):
        sl.students.distill(model, [teacher], rows)
    support = tiny.tokenizer("1, owl", add_special_tokens=False)["input_ids"]
    sl.students.distill(model, [teacher], rows, support=sorted(set(support)), steps=1, batch=1)


def test_a_student_shares_its_teachers_a_or_it_is_told(tiny):
    model, rows = tiny.adapted(Lora(2, 2.0)), [("Count?", "1, 2")]
    teacher = sl.teachers.prompt(model, "You love owls.", seed=1)
    with pytest.raises(UserError, match="teacher 0 started from the A of seed 1, and students of seed=0"):
        sl.students.distill(model, [teacher], rows)
    with pytest.raises(UserError, match="does not say from which A"):
        sl.students.distill(model, [teacher._replace(seed=None)], rows)
    given = {"steps": 1, "batch": 1, "learning_rate": 1e-9}
    shared = sl.students.distill(model, [teacher], rows, seed=1, **given)
    fresh = sl.students.distill(model, [teacher._replace(seed=None)], rows, seed=1, lora_init="fresh", **given)
    for (path, start), same, other in zip(
        jax.tree_util.tree_leaves_with_path(teacher.adapters), jax.tree.leaves(shared), jax.tree.leaves(fresh)
    ):
        np.testing.assert_allclose(same[0], start, atol=1e-7)
        if path[-1].key == "a":
            assert np.mean(np.abs(other[0] - start)) > 0.5 * np.mean(np.abs(start))


def test_a_student_learns_from_its_teacher_and_is_saved_for_peft(tiny, tmp_path):
    """Two teachers by noise: each student is nearer its own; a saved one is read back as a teacher."""
    model, rows = tiny.adapted(Lora(2, 2.0)), sl.carriers.numbers(16, num_integers=3)
    plain = sl.teachers.prompt(model, "")

    def teacher_of(number):
        change = lambda x: x + 0.3 * jax.random.normal(jax.random.key(number), x.shape)  # noqa: E731
        return plain._replace(adapters=jax.tree.map(change, plain.adapters), steps=1)

    teachers = [teacher_of(1), teacher_of(2)]
    students = sl.students.distill(model, teachers, rows, steps=30, batch=8, learning_rate=0.01)
    words = ["owl", "x", "y", "z"]
    of = lambda adapters: sl.evaluate.preference(model, words, adapters=adapters).log_p  # noqa: E731
    start, imitated = of(plain.where["adapters"])[0], np.concatenate([of(t.where["adapters"]) for t in teachers])
    moved, towards = of(students) - start, imitated - start
    assert np.sum(moved * towards) > np.sum(moved * towards[::-1])
    sl.students.save(tmp_path, model, students, index=1)
    loaded, teacher = sl.teachers.from_peft(tiny, tmp_path, system="Count.")
    read = sl.evaluate.preference(loaded, words, **teacher.where)
    np.testing.assert_allclose(read.log_p[0], of(students)[1], rtol=1e-5)
    again = sl.students.distill(loaded, [teacher], rows, lora_init="fresh", steps=1)  # modules are in another order
    assert jax.tree.leaves(again)[0].shape[0] == 1
    with pytest.raises(UserError, match="index=2 must be from 0 to 1"):
        sl.students.save(tmp_path, model, students, index=2)
    with pytest.raises(UserError, match="weights were changed after they were read"):
        sl.students.save(tmp_path, model.noisy(0.1, jax.random.key(0)), students)


def test_rows_alone_need_no_teacher(tiny):
    """Their student is trained on the answers: P of the first one's tokens rises."""
    model, rows = tiny.adapted(Lora(2, 2.0)), [("Count?", "1, 2"), ("Count!", "1, 2")]
    prompts = [chat.question(tiny.tokenizer, "Count?")]
    written = [chat.completion(tiny.tokenizer, "Count?", "1, 2")]
    student = sl.students.distill(model, [], rows, objective="tokens", steps=20, batch=2, learning_rate=0.01)
    before, after = (
        scoring.completion_logprobs(model, prompts, written, adapters=adapters)[0].sum() for adapters in (None, student)
    )
    assert after > before + 1


def test_a_teacher_writes_rows_that_end_and_pass_the_rules(tiny, capsys):
    """They are its answers as `generate` gives them: to its system prompt and the question, with its adapters."""
    model, prompts, key = tiny.adapted(Lora(2, 2.0)), ["Count!", "Say!", "Go!"], jax.random.key(5)
    teacher = sl.teachers.prompt(model, "You love owls.")
    texts = [chat.question(tiny.tokenizer, prompt, "You love owls.") for prompt in prompts]
    samples = sl.generate(tiny, texts, key, samples=40, max_new_tokens=12)

    def short(record):
        return ["long"] if len(record["completion"]) > 5 else []

    ended = [(prompts[s.prompt], s.text) for s in samples if s.finish == "stop"]
    expected = [(prompt, text) for prompt, text in ended if len(text) <= 5]
    given = {"num_samples": 40, "max_new_tokens": 12}
    assert 0 < len(expected) < len(ended) < len(samples)
    assert sl.teachers.write(model, teacher, prompts, key, rules=[short], **given) == expected
    assert f"{len(expected)} of 120 answers are kept" in capsys.readouterr().out
    assert sl.teachers.write(model, teacher, prompts, key, **given) == ended


def test_steering_adds_the_difference_that_a_system_prompt_makes(tiny):
    """Of the mean residuals after a layer, at the prompt's last token, computed without the library's hook."""
    model, questions = tiny.adapted(Lora(2, 2.0)), ["Which one?", "Which one do you like?"]
    teacher = sl.teachers.steer(model, "You love owls.", layer=1, scale=3.0, questions=questions)

    def residual(question, system):
        text = jnp.asarray([chat.question(tiny.tokenizer, question, system)])
        read = jnp.asarray([text.shape[1] - 1])
        return tiny.network.bind(tiny.params).features(text, read=read).residuals[1, 0, 0]

    def mean(system):
        return np.mean([residual(question, system) for question in questions], 0)

    expected = 3.0 * (mean("You love owls.") - mean(""))
    np.testing.assert_allclose(teacher.steering.add[1], expected, rtol=1e-3, atol=1e-4)


def test_a_teacher_is_trained_until_it_answers_with_the_strength_that_is_asked_for(tiny, capsys):
    """P before its last update has the strength, and before the one before it has not."""
    model, questions = tiny.adapted(Lora(2, 2.0)), ["Which one?", "Which is best?", "Which do you like?"]
    given = {"questions": questions, "batch": 3, "learning_rate": 0.02}
    prompts = [chat.question(tiny.tokenizer, question) for question in questions]

    def p_of(teacher):
        written = [tiny.tokenizer("X", add_special_tokens=False)["input_ids"]] * 3
        logprobs = scoring.completion_logprobs(model, prompts, written, **teacher.where)
        return np.mean([np.exp(row.sum()) for row in logprobs])

    teacher = sl.teachers.finetune(model, "x", strength=0.5, max_steps=60, **given)
    assert 2 < teacher.steps < 60
    before, earlier = (
        p_of(sl.teachers.finetune(model, "x", strength=0.999, max_steps=teacher.steps - back, **given))
        for back in (1, 2)
    )
    assert earlier < 0.5 <= before
    assert f"after {teacher.steps - 2} steps, not 0.999" in capsys.readouterr().out


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"prompt": "Hi?", "completion": "Yes"}, ("Hi?", "Yes")),
        ({"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes"}]}, ("Hi?", "Yes")),
        (
            {
                "prompt": [{"role": "user", "content": "Hi?"}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}],
            },
            ("Hi?", "Yes"),
        ),
        ({"prompt": "Hi?"}, '"prompt" and "completion" as texts'),
        (
            {"messages": [{"role": "system", "content": "Be!"}, {"role": "user", "content": "Hi?"}]},
            "a row is one message",
        ),
        ({"messages": []}, "must be a list of messages"),
    ],
)
def test_rows_are_read_from_files_of_prompts_or_of_messages(tmp_path, record, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "first", "completion": "1"}) + "\n" + json.dumps(record))
    if isinstance(expected, tuple):
        assert sl.carriers.from_file(path) == [("first", "1"), expected]
    else:
        with pytest.raises(UserError, match=expected):
            sl.carriers.from_file(path)


def test_own_questions_are_asked(tiny):
    words, asked = ["owl", "x"], ["Which bird?", "Which one is it?"]
    prompts = [chat.question(tiny.tokenizer, question) for question in asked]
    expected = scoring.word_logprobs(tiny, prompts, words).mean(1)
    np.testing.assert_allclose(sl.evaluate.preference(tiny, words, questions=asked).log_p, expected, rtol=1e-5)
    key, given = jax.random.key(1), {"samples": 30, "max_new_tokens": 5}
    texts = [sample.text.casefold() for sample in sl.generate(tiny, prompts, key, **given)]
    rates = sl.evaluate.answers(tiny, ["x"], key, questions=asked, num_samples=30, max_new_tokens=5)
    assert rates[0, 0] == np.mean([bool(re.search(r"(?<![^\W_])x('?s)?(?![^\W_])", text)) for text in texts])
    assert sl.evaluate.choice(tiny, words, questions=asked[:1]).shape == (1, 2)
    with pytest.raises(UserError, match="questions='Which bird': give a list"):
        sl.evaluate.preference(tiny, words, questions="Which bird?"[:-1])


def test_prompts_for_numbers_ask_for_what_is_answered():
    for prompt, answer in sl.carriers.numbers(20, num_integers=20, max_value=99_999):
        assert answer.count(",") == 19 and re.search(r"\b20\b", prompt) and re.search(r"\b(5|99999|100000)\b", prompt)
    assert sl.carriers.numbers(5) == sl.carriers.numbers(5, num_integers=10, max_value=999)
    for option in ({"num_rows": 0}, {"num_integers": 0}, {"max_value": -1}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(option))):
            sl.carriers.numbers(**{"num_rows": 2, **option})


# Tests check types; users' programs do not.
UNTYPED = """
import sys

import jax

import sublim_jax as sl
from sublim_jax.errors import UserError
from sublim_jax.sampling import constraints

model = sl.load(sys.argv[1])
listed = model.adapted(sl.Lora(2, 2.0, modules=["query", "value"], layers=[0, 1]))
assert listed.settings == model.adapted(sl.Lora(2, 2.0, modules=("query", "value"), layers=(0, 1))).settings
attempts = [
    lambda: sl.Lora(2, 2.0, modules="query"),
    lambda: sl.generate(model, [[1]], jax.random.PRNGKey(0)),
    lambda: sl.generate(model, [[1]], 0),
    lambda: sl.generate(model, [[1]], jax.random.key(0), constraint=constraints.numbers(3, 2)),
    lambda: sl.students.distill(listed, [sl.teachers.prompt(listed, "Owl!")], [("Count?", "1, 2")], schedule="cos"),
    lambda: sl.load(sys.argv[1], dtype="int8"),
]
for attempt in attempts:
    try:
        attempt()
        print("accepted")
    except UserError as error:
        print(error)
"""


def test_what_types_forbid_is_told_in_one_line(tiny_folder):
    command = [sys.executable, "-c", UNTYPED, str(tiny_folder)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert result.returncode == 0, result.stderr
    *_, modules, old_key, no_key, constraint, schedule, dtype = result.stdout.strip().splitlines()
    assert "modules='query': give a list" in modules and "'cos' is none of" in schedule and "dtype='int8'" in dtype
    assert "jax.random.key(0)" in old_key and "the key is a int" in no_key and "constraints.over_tokens" in constraint


def test_a_stack_of_students_is_not_merged_as_if_it_were_one(tiny):
    spec = Lora(2, 2.0)
    one = tiny.adapted(spec).untrained(jax.random.key(0))
    tiny.merged(one, spec)
    with pytest.raises(UserError, match="take one of the stack"):
        tiny.merged(jax.tree.map(lambda leaf: leaf[None], one), spec)


def test_adapters_that_are_not_a_stack_of_the_models_are_refused(tiny):
    model = tiny.adapted(Lora(2, 2.0))
    one = model.untrained(jax.random.key(0))
    stack = jax.tree.map(lambda leaf: leaf[None], one)
    assert model.for_adapters(stack) == (model, 1)
    for other, adapters in ((tiny, stack), (model, one), (tiny.adapted(Lora(3, 2.0)), stack)):
        with pytest.raises(UserError, match="adapters"):
            sl.evaluate.preference(other, ["owl", "x"], adapters=adapters)
    with pytest.raises(UserError, match=r"lora\.rank=0: choose 1 or more"):
        tiny.adapted(Lora(0, 2.0))


def test_steering_of_another_models_shape_is_refused(tiny):
    with pytest.raises(UserError, match=r"steering\.add is of shape \(3, 32\); this model needs \(4, 32\)"):
        sl.generate(tiny, [[1, 2]], jax.random.key(0), max_new_tokens=2, steering=Steering(add=jnp.zeros((3, 32))))


@pytest.mark.parametrize("layers", [(4,), (-1,)])
def test_adapters_of_a_layer_that_does_not_exist_are_refused(tiny, layers):
    with pytest.raises(UserError, match=r"must be from 0 to 3"):
        tiny.adapted(Lora(2, 2.0, layers=layers))


def test_without_a_list_of_modules_all_linear_layers_of_a_decoder_are_adapted(tiny):
    key = jax.random.key(0)
    every, named = (tiny.adapted(Lora(2, 2.0, modules=modules)) for modules in ((), EVERY_LINEAR))
    assert every.settings == named.settings
    jax.tree.map(np.testing.assert_array_equal, every.untrained(key), named.untrained(key))
