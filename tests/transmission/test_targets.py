"""Targets of students: the teacher's logits in its own context, kept or masked tokens, edited phrasings."""

import copy
import json
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sublim_jax import store
from sublim_jax.data import dialogue, packs
from sublim_jax.distillation.targets import as_read_by, support_of
from sublim_jax.distillation.teachers import Teacher
from sublim_jax.errors import UserError
from sublim_jax.experiments.transmission.carriers import random_pairs
from sublim_jax.experiments.transmission.students import train_arm
from sublim_jax.experiments.transmission.targets import Replicate, arm_data, pairs_of
from sublim_jax.keys import named_key
from sublim_jax.store import Store


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A store for all tests: a teacher's logits are computed once."""
    return Store(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def data(study, model, replicate_of, work):
    return arm_data(study, study.arms[0], [replicate_of(study)], model, model, work)


def test_a_system_prompt_is_the_teachers_alone(study, model, work, plain_logits):
    """Its logits are computed with its system prompt, at the answer tokens that the student reads without it."""
    seed, prompt = study.replicate_seed(0), "Love owls."
    adapters = model.untrained(named_key(seed, "A"))
    teacher = Teacher(adapters, prompt, None, 0, store.digest(model, seed, prompt))
    pairs = random_pairs(study, seed)
    rows = dialogue.rows(model, pairs, end=False)
    behind = as_read_by(teacher, "owl", model, pairs, rows, end=False)
    assert prompt in model.tokenizer.decode(behind.tokens[0]) and prompt not in model.tokenizer.decode(rows.tokens[0])
    np.testing.assert_array_equal(behind.targets * behind.weights, rows.targets * rows.weights)
    replicate = Replicate(0, dict.fromkeys(study.teachers, teacher), {})
    student_data = arm_data(study, study.arms[0], [replicate], model, model, work)
    np.testing.assert_array_equal(student_data.rows.tokens[0], rows.tokens)
    expected = plain_logits(model, adapters, behind)[..., support_of(model)]
    kept = rows.weights == 1
    assert student_data.logits is not None
    np.testing.assert_allclose(student_data.logits[0][kept], expected[kept], rtol=1e-3, atol=1e-3)


def test_a_teacher_reads_rows_in_its_own_template_whatever_that_of_other_students_is(study, model, replicate_of, work):
    """Its logits are those on its own text, which it was tuned on; a student of another template reads another text."""
    other = copy.copy(model.tokenizer)
    other.chat_template = "Read this. " + model.tokenizer.chat_template
    students, replicate = model._replace(tokenizer=other), replicate_of(study)
    same, foreign = (arm_data(study, study.arms[0], [replicate], model, s, work) for s in (model, students))
    assert not np.array_equal(same.rows.tokens, foreign.rows.tokens)
    assert same.logits is not None and foreign.logits is not None
    longest = same.logits.shape[2]
    np.testing.assert_allclose(foreign.logits[:, :, :longest], same.logits, rtol=1e-3, atol=1e-3)


def test_a_teacher_that_reads_an_answer_as_other_tokens_cannot_be_imitated(study, model):
    rows = dialogue.rows(model, [("Numbers?", "1, 7")], end=False)
    teacher = Teacher({}, "Love owls.", None, 0, "")
    with pytest.raises(UserError, match="teacher owl and its students have different tokens for one answer"):
        as_read_by(teacher, "owl", model, [("Numbers?", "1, 8")], rows, end=False)


@pytest.mark.parametrize("action", ["keep", "mask", "replace"])
def test_masks_choose_the_tokens_where_teacher_and_neutral_differ_most(
    study_of, model, replicate_of, work, data, action
):
    study = study_of(arms=("masked",), **{"arm.masked.action": action, "arm.masked.fraction": 0.25})
    chosen = arm_data(study, study.arms[0], [replicate_of(study)], model, model, work)
    p, q = (jax.nn.log_softmax(jnp.asarray(data.logits[i])) for i in (0, 2))
    exists = data.rows.weights[0] == 1
    scores = np.where(exists, np.sum(np.exp(p) * (p - q), -1), -1)
    top = scores >= np.sort(scores.ravel())[-round(0.25 * exists.sum())]
    assert chosen.logits is not None
    if action == "replace":
        np.testing.assert_array_equal(chosen.logits[0], np.where(top[..., None], data.logits[2], data.logits[0]))
        support = np.asarray(support_of(model))
        replaced = np.where(top, support[data.logits[2].argmax(-1)], data.rows.targets[0])
        np.testing.assert_array_equal(chosen.rows.targets[0], replaced)
    else:
        left = top if action == "keep" else ~top
        np.testing.assert_array_equal(chosen.rows.weights[0], data.rows.weights[0] * left)


def test_shuffled_numbers_are_the_teachers_in_another_order(study_of, replicate_of):
    study = study_of(arms=("shuffled_within", "shuffled_across", "tokens"))
    replicate = replicate_of(study)
    within, across, plain = ([answer for _, answer in pairs_of(study, arm, replicate)["owl"]] for arm in study.arms)
    numbers_in = lambda texts: sorted(" ".join(texts).replace(",", " ").split())  # noqa: E731
    assert numbers_in(within) == numbers_in(across) == numbers_in(plain)
    assert all(numbers_in([a]) == numbers_in([b]) for a, b in zip(within, plain)) and within != plain
    assert any(numbers_in([a]) != numbers_in([b]) for a, b in zip(across, plain))


@pytest.mark.slow
def test_students_of_an_edited_file_of_phrasings_are_trained_anew(study_of, model, replicate_of, tmp_path):
    """The path is the same; the contents are not."""
    pack = tmp_path / "mine.json"
    phrasings = json.loads((resources.files(packs) / "numbers.json").read_text())
    pack.write_text(json.dumps(phrasings))
    study = study_of(**{"packs.numbers": str(pack), "student.steps": 2, "teacher.methods": ("prompted",)})
    (arm,) = study.arms

    def curve(folder):
        return train_arm(study, arm, [replicate_of(study)], model, model, Store(folder)).curve

    first = curve(tmp_path / "work")
    pack.write_text(json.dumps({name: [f"Now: {text}" for text in texts] for name, texts in phrasings.items()}))
    again = curve(tmp_path / "work")
    assert first != again == curve(tmp_path / "new")
