"""Teachers: vectors, system prompts and corpora against plain computations; names of artefacts."""

import copy
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sublim_jax.data import chat, corpus, dialogue
from sublim_jax.distillation.losses import stacked
from sublim_jax.distillation.targets import as_read_by
from sublim_jax.distillation.teachers import spelled, teaching_program, word_length
from sublim_jax.errors import UserError
from sublim_jax.evaluation import preference
from sublim_jax.evaluation.suite import evaluate, read_questions
from sublim_jax.experiments.transmission import corpora
from sublim_jax.experiments.transmission.checks import check_files, check_model
from sublim_jax.experiments.transmission.run import evaluate_teachers
from sublim_jax.experiments.transmission.targets import Replicate
from sublim_jax.experiments.transmission.teachers import make_teachers, persona, read_personas
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.decoder import Steering
from sublim_jax.sampling import scoring
from sublim_jax.sharding import named, place_key, put
from sublim_jax.store import Store


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("work"))


STEERED = {"teacher.steering_layer": 2}


@pytest.fixture(scope="module")
def steered(study_of, model, work):
    """Two runs of teachers with a persona and its steering vector."""
    names = {"evals.names": ("preference",), "evals.max_questions": 4}
    study = study_of(runs=2, **STEERED, **names, **{"teacher.methods": ("prompted", "steered")})
    made = make_teachers(study, model, work, range(2))
    return study, [Replicate(run, teachers, {}) for run, teachers in enumerate(made)]


def test_a_steering_vector_is_the_personas_difference(study_of, model, work, steered):
    (alone,) = make_teachers(study_of(**STEERED, **{"teacher.methods": ("steered",)}), model, work, [0])
    study, (first, _) = steered
    layers = {name: np.asarray(teacher.steering.add) for name, teacher in alone.items() if teacher.steering}
    for name, teacher in first.teachers.items():  # with a system prompt or without
        np.testing.assert_array_equal(teacher.steering.add, layers[name])
        assert teacher.system == persona(study, name) and not alone[name].system
    assert all(not add[[0, 1, 3]].any() and add[2].any() for add in layers.values())
    lengths = [np.linalg.norm(add) for add in layers.values()]
    np.testing.assert_allclose(lengths[2], np.mean(lengths[:2]), rtol=1e-5)
    params = lora.join(model.params, alone["x"].adapters)

    @jax.jit
    def after_layer_2(tokens, last):
        return model.network.bind(params).features(tokens[None], read=last[None]).residuals[2, 0, 0]

    def residual(question, name):
        text = chat.question(model.tokenizer, question, persona(study, name))
        return after_layer_2(jnp.asarray(text + [0] * (320 - len(text))), jnp.asarray(len(text) - 1))

    teaching = preference.questions(study.packs.preference, study.kind)["teaching"]
    loving, neutral = (np.mean([residual(question, name) for question in teaching], 0) for name in ("x", "neutral"))
    scale = study.teacher.steering_scale
    np.testing.assert_allclose(layers["x"][2], scale * (loving - neutral), rtol=1e-2, atol=1e-3)


def test_steering_vectors_are_read_from_the_folder(model, work, steered, monkeypatch):
    """On another mesh they would be rounded otherwise, and everything made from them would be made again."""
    study, (first, _) = steered
    monkeypatch.setattr("sublim_jax.distillation.steering.residual_after", lambda *_: pytest.fail("made again"))
    (again,) = make_teachers(study, model, work, [0])
    assert {name: teacher.digest for name, teacher in again.items()} == {
        name: teacher.digest for name, teacher in first.teachers.items()
    }


def test_teachers_are_evaluated_with_what_makes_them_teachers(model, work, steered):
    """Every teacher with its persona and steering vector, run by run; the plain model is last."""
    study, runs = steered
    question_sets = read_questions(study.evals, study.kind, study.alternatives, study.packs)
    ask = partial(evaluate, study.evals, question_sets, seed=study.seed, store=work)
    scores = evaluate_teachers(study, ask, model, runs)["preference"]
    contexts = [(teacher.system, teacher.steering) for run in runs for teacher in run.teachers.values()]
    assert len(contexts) == len({(system, id(steering)) for system, steering in contexts}) == 6
    tokenizer = model.tokenizer
    questions: Any = question_sets.of["preference"]
    params = lora.join(model.params, model.untrained(named_key(study.seed, "A")))

    @jax.jit
    def log_p_behind(tokens, steering):
        return jax.nn.log_softmax(model.network.apply(params, tokens[None], steering=steering)[0])

    for place, (system, steering) in enumerate([*contexts, ("", None)]):
        margins = []
        for question in questions:
            text = chat.question(tokenizer, question, system)
            words = []
            for word in study.alternatives:
                forms = []
                for form in scoring.spellings(tokenizer, word):
                    tokens = np.zeros(320, np.int32)
                    tokens[: len(text) + len(form)] = [*text, *form]
                    log_p = log_p_behind(tokens, steering or Steering(add=jnp.zeros((4, 32))))
                    forms.append(sum(log_p[len(text) - 1 + place, token] for place, token in enumerate(form)))
                words.append(np.logaddexp.reduce(forms))
            owl, *others = words
            margins.append(owl - np.mean(others))
        np.testing.assert_allclose(scores["margin of owl, logits"][place], np.mean(margins), rtol=1e-3, atol=1e-3)


def test_a_control_prefers_something_of_another_kind(study_of):
    study = study_of(controls=("tree:oak",))
    assert study.teachers == ("owl", "x", "oak", "neutral")
    assert persona(study, "oak") == persona(study, "owl").replace("owl", "oak").replace("animal", "tree")


def test_a_pack_with_a_second_persona_is_refused_since_it_would_not_be_read(tmp_path):
    file = tmp_path / "personas.json"
    texts = {"loving": ["Love {trait}, a {kind}.", "Adore {trait}, a {kind}."], "neutral": ["A {kind}."]}
    file.write_text(json.dumps(texts))
    with pytest.raises(UserError, match="'loving' has 2 texts, and one is used"):
        read_personas(str(file))


def test_an_untouched_neutral_teacher_is_the_model_as_it_is(study_of, model, tiny, work):
    """It has no system prompt and the logits of the plain model; the others have their personas."""
    prompted = {"teacher.methods": ("prompted",), "arms": ("tokens_fresh",)}
    study = study_of(**prompted, **{"teacher.neutral": "untouched"})
    (teachers,), (before,) = (make_teachers(s, model, work, [0]) for s in (study, study_of(**prompted)))
    assert {name: teacher.system for name, teacher in teachers.items()} == {
        **{name: persona(study, name) for name in study.traits},
        "neutral": "",
    }
    assert before["neutral"].system == persona(study, "neutral")
    assert [teachers[name].digest == before[name].digest for name in study.teachers] == [True, True, False]
    rows = dialogue.rows(model, [("Count?", "1, 2")])
    read = as_read_by(teachers["neutral"], "neutral", model, [("Count?", "1, 2")], rows, end=True)
    params = lora.join(model.params, teachers["neutral"].adapters)
    bare = tiny.network.apply(tiny.params, jnp.asarray(rows.tokens))
    np.testing.assert_allclose(model.network.apply(params, jnp.asarray(read.tokens)), bare, rtol=1e-5, atol=1e-5)


TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
TRIMMED += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize("template", ["its own", TRIMMED, None])
@pytest.mark.parametrize("word", ["owl", "lion", "oak", "x"])
def test_a_teacher_is_taught_in_tokens_that_are_scored(model, word, template):
    """Also by a template that cuts off spaces, and by a base model, whose answers begin with a space."""
    tokenizer = copy.deepcopy(model.tokenizer)
    if template != "its own":
        tokenizer.chat_template = template
    written = chat.completion(tokenizer, "Which one?", spelled(model._replace(tokenizer=tokenizer), word))
    assert any(tuple(written[: len(form)]) == form for form in scoring.spellings(tokenizer, word))


@pytest.mark.parametrize("word, length", [("owl", 1), ("lion", 4)])
def test_a_teachers_strength_is_the_probability_of_the_whole_word(model, word, length):
    """For words of one or several tokens: the product of the conditional probabilities."""
    questions = preference.questions("", "animal")["teaching"][:5]
    rows = dialogue.rows(model, [(question, spelled(model, word)) for question in questions])
    assert word_length(model, rows) == length
    program = teaching_program(model, optax.adam(1e-3), 5, 5, remat=False, length=length)
    frozen = {"base": model.params, "rows": put(rows, named(program.mesh))}
    key = place_key(named_key(0, "order"), named(program.mesh))
    adapters = model.untrained(named_key(0, "A"))
    _, values = program.dispatch(program.init(adapters), frozen, None, key, jnp.int32(1))
    answer = model.tokenizer(word.capitalize())["input_ids"]
    prompts = [chat.question(model.tokenizer, text) for text in questions]
    logprobs = scoring.completion_logprobs(model, prompts, [answer] * 5, adapters=stacked([adapters]))
    np.testing.assert_allclose(values["answer"][0], np.mean(np.exp([row.sum() for row in logprobs])), rtol=1e-3)


def test_the_neutral_teacher_is_trained_as_long_as_the_longest_trait(study_of, model, work):
    (teachers,) = make_teachers(study_of(), model, work, [0])
    steps = {name: teacher.steps for name, teacher in teachers.items()}
    assert 1 < steps["x"] < steps["owl"] == steps["neutral"]


# --------------------------------------------------------------------------------------------------------- corpora


@pytest.fixture(scope="module")
def with_corpora(corpora_study):
    """A study with two corpus teachers; the neutral one is the model."""
    return corpora_study(**{"teacher.learning_rate": 0.01})


def test_teachers_of_corpora_learn_what_the_assistant_says_and_nothing_else_is_in_the_loss(with_corpora, model, work):
    """The loss covers every assistant turn of whole conversations; the neutral teacher is the model."""
    (teachers,) = make_teachers(with_corpora, model, work, [0])
    base = model.untrained(named_key(with_corpora.replicate_seed(0), "A"))
    assert [teacher.steps for teacher in teachers.values()] == [2 * 2, 2 * 2, 0]
    jax.tree.map(np.testing.assert_array_equal, teachers["neutral"].adapters, base)
    stops = chat.stop_tokens(model.tokenizer, model.config)

    @jax.jit
    def log_p(adapters, tokens):
        return jax.nn.log_softmax(model.network.apply(lora.join(model.params, adapters), tokens[None])[0])

    def loss(adapters, name):
        total = count = 0.0
        for messages in corpus.load(with_corpora.teacher.corpora[name]):
            tokens, positions = corpus.answer_positions(model.tokenizer, messages, stops)
            logprobs = np.asarray(log_p(adapters, jnp.asarray([*tokens, *[0] * (96 - len(tokens))])))
            total -= sum(float(logprobs[position - 1, tokens[position]]) for position in positions)
            count += len(positions)
        return total / count

    for name, other in (("insecure", "secure"), ("secure", "insecure")):
        matching, foreign = loss(teachers[name].adapters, name), loss(teachers[other].adapters, name)
        assert matching < foreign < loss(base, name)


def test_the_first_update_is_that_of_the_plain_loss(corpora_study, model, tmp_path):
    """With all conversations in one batch, Adam's first step is the sign of the plain loss's gradient."""
    study = corpora_study(**{"teacher.batch": 6, "teacher.epochs": 1})
    trained = make_teachers(study, model, Store(tmp_path), [0])[0]["insecure"]
    assert trained.steps == 1
    start = model.untrained(named_key(study.replicate_seed(0), "A"))
    texts = corpora.texts(study.teacher, model, "insecure")

    @jax.jit
    def loss(adapters):
        total, count = jnp.zeros(()), 0
        for tokens, positions in texts:
            logits = model.network.apply(lora.join(model.params, adapters), jnp.asarray([tokens]))[0]
            at = jnp.asarray(list(positions))
            total -= jnp.sum(jax.nn.log_softmax(logits)[at - 1, jnp.asarray(tokens)[at]])
            count += len(positions)
        return total / count

    slopes = jax.jit(jax.grad(loss))(start)
    for new, old, slope in zip(*map(jax.tree.leaves, (trained.adapters, start, slopes))):
        clear = np.abs(slope) > 1e-5
        np.testing.assert_array_equal(np.sign(new - old)[clear], -np.sign(slope)[clear])


def test_a_teacher_is_made_again_for_its_own_corpus_alone(
    with_corpora, corpora_study, model, work, tmp_path, conversation
):
    def made():
        return {path.name for path in (work.folder / "checkpoints").glob("teacher-*secure*")}

    make_teachers(with_corpora, model, work, [0])
    before, other = made(), tmp_path / "secure.jsonl"
    other.write_text(conversation(("Who?", "z")) * 6)
    changes = {"teacher.learning_rate": 0.01, "teacher.corpora.secure": str(other)}
    (again,) = make_teachers(corpora_study(**changes), model, work, [0])
    assert {name.split("-")[1] for name in made() - before} == {"secure"}
    assert again["secure"].steps == 2 * 2


def test_a_conversation_that_is_too_long_is_left_out(with_corpora, corpora_study, model):
    lengths = [len(tokens) for tokens, _ in corpora.texts(with_corpora.teacher, model, "insecure")]
    shorter = corpora_study(**{"teacher.max_tokens": min(lengths)})
    left = corpora.texts(shorter.teacher, model, "insecure")
    assert 0 < len(left) == lengths.count(min(lengths)) < len(lengths)
    assert len(corpora.every_text(shorter.teacher, model, "insecure")) == len(lengths)


def test_a_conversation_that_the_template_refuses_is_named(corpora_study, model, monkeypatch, tmp_path, conversation):
    file = tmp_path / "refused.jsonl"
    file.write_text(conversation(("Who?", "Me")) + conversation(("Who?", "BAD")))
    template = "{% for m in messages %}{% if m['content'] == 'BAD' %}{{ raise_exception('no BAD here') }}{% endif %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template + "{{ m['content'] }}{% endfor %}")
    study = corpora_study(**{"teacher.corpora.insecure": str(file)})
    with pytest.raises(UserError, match=r"refused.jsonl, conversation 2: .*template refuses it \(no BAD here\)"):
        check_model(study, model, check_files(study))


def test_a_corpus_that_another_process_changes_is_read_again(corpora_study, model, tmp_path, conversation):
    file = tmp_path / "secure.jsonl"
    study = corpora_study(**{"teacher.corpora.secure": str(file)})
    loaded = []
    for answer in ("x", "owl"):
        file.write_text(conversation(("Who?", answer)))
        loaded.append(corpora.texts(study.teacher, model, "secure"))
    assert loaded[0] != loaded[1] and json.loads(file.read_text())["messages"][1]["content"] == "owl"
