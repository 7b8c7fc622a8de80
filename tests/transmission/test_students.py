"""Students: objectives against plain computations, many at once against each alone, and reuse of results."""

import gc
import json
import shutil
import weakref
from types import SimpleNamespace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sublim_jax import objectives, store
from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.distillation.losses import stacked
from sublim_jax.distillation.students import NUM_FIRST, coverages, imitation
from sublim_jax.distillation.targets import support_of
from sublim_jax.distillation.teachers import Teacher
from sublim_jax.errors import UserError
from sublim_jax.experiments.transmission import carriers
from sublim_jax.experiments.transmission.checks import check_arm
from sublim_jax.experiments.transmission.run import load_model, measure_arm
from sublim_jax.experiments.transmission.students import objective_of, starts, train_arm
from sublim_jax.experiments.transmission.targets import Replicate, arm_data
from sublim_jax.experiments.transmission.teachers import make_teachers
from sublim_jax.keys import named_key
from sublim_jax.store import Store

NO_COVERAGE = {"teacher.methods": ("prompted",)}  # these teachers have no update to compare with


def train(study, model, folder, replicates, teachers=None):
    """Trains the students of a study's only arm."""
    (arm,) = study.arms
    return train_arm(study, arm, replicates, teachers or model, model, Store(folder))


@pytest.fixture(scope="module")
def data(study, model, replicate_of, tmp_path_factory):
    """Training data of all students of the study's arm."""
    work = Store(tmp_path_factory.mktemp("data"))
    return arm_data(study, study.arms[0], [replicate_of(study)], model, model, work)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("arm", "divergence"), [("soft", objectives.kl), ("soft_reverse", objectives.reverse_kl)])
def test_the_objective_is_the_arms_over_the_support_at_the_answers_positions(
    study_of, model, replicate_of, data, plain_logits, arm, divergence, temperature
):
    study = study_of(arms=(arm,), **{f"arm.{arm}.temperature": temperature})
    batch = jax.tree.map(lambda leaf: leaf[1, :20], data)
    start = jax.tree.map(lambda leaf: leaf[1], starts(model, "shared", [study.replicate_seed(0)] * 3))
    support = support_of(model)
    objective = jax.jit(objective_of(study, study.arms[0], model, support))
    total, count = objective(start, model.params, batch)
    second = replicate_of(study).teachers[study.teachers[1]].adapters
    mask = objectives.support_mask(support, model.settings.vocab)
    both = [jnp.asarray(plain_logits(model, adapters, batch.rows)) for adapters in (start, second)]
    weights = jnp.asarray(batch.rows.weights)
    expected = divergence(*both, support=mask, weights=weights, temperature=temperature)
    np.testing.assert_allclose(total, expected[0], rtol=1e-3)
    assert count == expected[1] == batch.rows.weights.sum()
    assert abs(objective(second, model.params, batch)[0]) < 1e-5 * total
    for other in (objectives.kl, objectives.reverse_kl):
        is_its_own = other is divergence and temperature == 1
        assert np.isclose(total, other(*both, support=mask, weights=weights)[0], rtol=1e-2) == is_its_own


def test_a_fresh_start_has_nothing_of_the_teachers(model):
    """It is the control of shared weights: another A for each run, and B of zeros."""
    shared, fresh = (starts(model, lora_init, [3, 3, 8]) for lora_init in ("shared", "fresh"))
    for place, seed in enumerate((3, 3, 8)):
        teachers = model.untrained(named_key(seed, "A"))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf, at=place: leaf[at], shared), teachers)
    for own, other in zip(adapters_in(shared), adapters_in(fresh)):
        assert not np.any(other["b"])
        np.testing.assert_array_equal(other["a"][0], other["a"][1])
        drawn = [own["a"][0], own["a"][2], other["a"][0], other["a"][2]]
        assert np.max(np.abs(np.corrcoef(np.reshape(drawn, (4, -1))) - np.eye(4))) < 0.2


def test_held_out_rows_are_not_trained_on(study_of, model, replicate_of, tmp_path):
    """One epoch of a student on tokens, with another answer in a held-out row and in a row that it trains on."""
    study = study_of(arms=("tokens",), **NO_COVERAGE)
    rows = [(f"Count {number}?", f"{number}, 7") for number in range(study.carrier.num_rows)]

    def trained(folder, changed):
        pairs = [(prompt, "9, 9" if number == changed else answer) for number, (prompt, answer) in enumerate(rows)]
        result = train(study, model, tmp_path / folder, [replicate_of(study, pairs=pairs)])
        return jax.tree.leaves(result.adapters), result.curve[0]["held_out"]

    (adapters, losses), held_out, first = (trained(name, row) for name, row in (("a", None), ("b", 15), ("c", 16)))
    jax.tree.map(np.testing.assert_array_equal, held_out[0], adapters)
    assert held_out[1] != losses and first[1] == losses
    assert any(np.any(mine != other) for mine, other in zip(first[0], adapters))


def test_students_together_are_each_of_them_alone(study_of, model, replicate_of, tmp_path):
    """Two runs of three teachers in one program, and the first run alone."""
    curves = {}
    for runs in (1, 2):
        study = study_of(runs=runs, arms=("soft_fresh",), **NO_COVERAGE)
        replicates = [replicate_of(study, run) for run in range(runs)]
        curves[runs] = train(study, model, tmp_path / f"{runs}", replicates).curve
    assert [point["step"] for point in curves[1]] == [0, 3, 6]
    for alone, together in zip(curves[1], curves[2]):
        np.testing.assert_allclose(together["margin"][:3], alone["margin"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(together["held_out"][:3], alone["held_out"], rtol=1e-3)
    assert not np.allclose(curves[2][-1]["margin"][3:], curves[1][-1]["margin"], atol=1e-4)  # other A, other numbers
    first, last = (np.asarray(curves[2][i]["held_out"]) for i in (0, -1))
    assert np.all(last < first)


@pytest.mark.slow
def test_students_on_several_devices_are_those_on_one(study_of, replicate_of, tmp_path, mesh_of):
    """Replicas over two devices and rows over two, in teacher logits, training and evaluation."""
    study, results = study_of(runs=2, **{"student.steps": 3}), []
    for devices, shape in ((1, {}), (4, {"replica": 2, "fsdp": 2})):
        placed = load_model(study, mesh_of(devices, **shape))
        replicates = [replicate_of(study, run, model=placed) for run in range(2)]
        results.append(train(study, placed, tmp_path / f"{devices}", replicates))
    for alone, together in zip(results[0].curve, results[1].curve):
        np.testing.assert_allclose(together["margin"], alone["margin"], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(together["held_out"], alone["held_out"], rtol=1e-3)
    np.testing.assert_allclose(results[1].coverage, results[0].coverage, rtol=1e-3, atol=1e-4)


def test_an_arm_that_is_done_holds_no_model(study_of, model, replicate_of, tmp_path):
    """After training, measurement, evaluation and sampling from its teacher, the base model is freed."""

    def run():
        base = model._replace(params=jax.tree.map(jnp.copy, model.params))
        names = {"evals.names": ("answers",), "evals.num_samples": 1, "evals.max_questions": 2}
        study = study_of(arms=("tokens",), **{"student.steps": 2}, **names)
        replicate, work = replicate_of(study, model=base), Store(tmp_path)
        measure_arm(study, study.arms[0], lambda subject: {}, [replicate], base, work)
        task = carriers.number_task(study, study.replicate_seed(0))
        carriers.sample(study, base, work, 0, task, "owl", replicate.teachers["owl"])
        return weakref.ref(base.params["embedding"])

    reference = run()
    gc.collect()
    assert reference() is None


@pytest.fixture
def base_folder(tiny_folder, tmp_path):
    """The model without a chat template, like a base model."""
    folder = shutil.copytree(tiny_folder, tmp_path / "base")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
    return folder


def test_a_student_of_another_family_reads_the_same_text_in_its_own_tokens(
    study_of, model, replicate_of, tmp_path, mesh_of, base_folder
):
    """A base model without a template; logits of another tokenizer are refused."""
    changes = {"arms": ("foreign",), "arm.foreign.model": str(base_folder), "student.steps": 2}
    study = study_of(**changes)
    other = load_model(study, mesh_of(1), str(base_folder))
    assert not other.tokenizer.chat_template
    pairs = carriers.random_pairs(study, study.replicate_seed(0))
    replicate = replicate_of(study, pairs=pairs)
    result = train(study, other, tmp_path, [replicate], teachers=model)
    assert result.coverage is None and np.all(np.isfinite(result.curve[-1]["margin"]))
    rows = arm_data(study, study.arms[0], [replicate], model, other, Store(tmp_path)).rows
    assert other.tokenizer.decode(rows.tokens[0, 0].tolist()).startswith(
        f"Question: {pairs[0][0]}\nAnswer: {pairs[0][1]}"
    )
    check_arm(study, study.arms[0], model, other)
    by_logits = study_of(**changes, **{"arm.foreign.objective": "kl"})
    foreign = other._replace(tokenizer=cast(Tokenizer, SimpleNamespace(get_vocab=lambda: {"x": 0})))
    with pytest.raises(UserError, match="has another tokenizer than"):
        check_arm(by_logits, by_logits.arms[0], model, foreign)


def test_other_questions_afterwards_are_asked_of_what_is_still_there(study_of, model, replicate_of, tmp_path):
    """At the start and the end, never at the steps in between; each measurement is made once."""
    study, again = study_of(**NO_COVERAGE), study_of(num_questions=2, **NO_COVERAGE)
    first = train(study, model, tmp_path, [replicate_of(study)])
    curve = train(again, model, tmp_path, [replicate_of(again)]).curve
    assert [point["step"] for point in curve] == [0, 6]
    whole = train(again, model, tmp_path / "new", [replicate_of(again)]).curve
    for point, expected in zip(curve, (whole[0], whole[-1])):
        np.testing.assert_allclose(point["margin"], expected["margin"], rtol=1e-4, atol=1e-4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}
    assert train(study, model, tmp_path, [replicate_of(study)]).curve == first.curve
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()} == before


def test_coverage_is_the_cosine_of_changes_of_the_kernels(study, model, replicate_of, data):
    replicate, seed = replicate_of(study), study.replicate_seed(0)
    objective = imitation(model, "kl", support=support_of(model))
    start = starts(model, "shared", [seed] * 3)
    teachers = stacked([stacked([teacher.adapters for teacher in replicate.teachers.values()])] * 3)
    coverage = coverages(model, objective)(start, teachers, model.params, jax.tree.map(jnp.asarray, data))
    first = model.untrained(named_key(seed, "A"))
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0, :NUM_FIRST]), data)
    slope = jax.jit(jax.grad(lambda adapters: objective(adapters, model.params, batch)[0]))(first)
    update = [-a["a"] @ g["b"] for a, g in zip(adapters_in(first), adapters_in(slope))]
    for index, teacher in enumerate(replicate.teachers.values()):
        way = [t["a"] @ t["b"] for t in adapters_in(teacher.adapters)]
        inner = sum(np.sum(u * w) for u, w in zip(update, way))
        norms = np.sqrt(sum(np.sum(u * u) for u in update) * sum(np.sum(w * w) for w in way))
        np.testing.assert_allclose(coverage[0][index], inner / norms, rtol=1e-3)


def adapters_in(tree):
    return [tree] if "a" in tree else [adapter for child in tree.values() for adapter in adapters_in(child)]


def test_without_adapters_all_weights_of_the_layers_are_trained(study_of, tmp_path, mesh_of):
    """A few steps on all weights but the embedding, in coverage and in training."""
    study = study_of(**{"lora.rank": 0, "student.steps": 3, "teacher.max_steps": 4})
    model, work = load_model(study, mesh_of(1)), Store(tmp_path)
    start = model.untrained(jax.random.key(0))
    assert set(start) == {"layers"} and model.settings.lora is None

    def teacher(index):
        change = lambda x: x + 0.02 * jax.random.normal(jax.random.key(index), x.shape)  # noqa: E731
        return Teacher(jax.tree.map(change, start), "", None, 1, store.digest(model, index))

    replicate = Replicate(0, {name: teacher(index) for index, name in enumerate(study.teachers)}, {})
    result = train(study, model, tmp_path, [replicate])
    first, last = (np.asarray(result.curve[i]["held_out"]) for i in (0, -1))
    assert np.all(last < first)
    diagonal, off_diagonal = np.diagonal(result.coverage[0]), np.asarray(result.coverage[0])[~np.eye(3, dtype=bool)]
    assert diagonal.min() > max(off_diagonal.max(), 0)
    trained = make_teachers(study, model, work, [0])[0]["owl"]
    kernel = lambda params: params["layers"]["mlp"]["up"]["kernel"]  # noqa: E731
    assert trained.steps and not np.allclose(kernel(trained.adapters), kernel(model.params))


def test_an_arms_changes_train_that_arm_so_and_no_other(study_of, model, replicate_of, tmp_path):
    """Its steps and its rank; a study with these values gives the same."""
    changes = {"arm.soft_fresh.changes": ("student.steps=2", "lora.rank=4", "student.learning_rate=0.001")}
    study = study_of(arms=("soft", "soft_fresh"), **changes, **NO_COVERAGE)
    soft, changed = study.arms
    assert (soft.training.steps, soft.lora.rank) == (study.student.steps, study.lora.rank) == (6, 8)
    student = model.adapted(changed.lora.adapters)
    result = train_arm(study, changed, [replicate_of(study)], model, student, Store(tmp_path))
    assert [point["step"] for point in result.curve] == [0, 2]
    assert result.adapters is not None
    assert result.adapters["layers"]["mlp"]["up"]["a"].shape[-1] == 4
    whole = study_of(
        arms=("soft_fresh",), **{"student.steps": 2, "student.learning_rate": 0.001, "lora.rank": 4}, **NO_COVERAGE
    )
    assert (whole.arms[0].training, whole.arms[0].lora) == (changed.training, changed.lora)
    again = train_arm(whole, whole.arms[0], [replicate_of(study)], model, student, Store(tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, again.adapters, result.adapters)
    with pytest.raises(UserError, match=r"arm\.soft: its adapters are of another form.*lora_init=fresh"):
        other = study_of(**{"arm.soft.changes": ("lora.rank=4",)})
        check_arm(other, other.arms[0], model, model)
