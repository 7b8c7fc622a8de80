"""A trait through numbers, on a tiny model: the parts against plain computations, the whole as a user runs it."""

import gc
import json
import shutil
import signal
import weakref
from importlib import resources
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_launch import assert_refused, launch
from test_survival import finish, free_port, start, wait_for

from configs import numbers as config_file
from sublim_jax import filters, objectives, weights
from sublim_jax.data import chat, dialogue, packs
from sublim_jax.errors import UserError
from sublim_jax.evaluation import preference
from sublim_jax.experiments import carrier, measures, students, transmission
from sublim_jax.experiments import teachers as teaching
from sublim_jax.experiments.lab import fresh, make_lab
from sublim_jax.experiments.teachers import Teacher
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.decoder import Steering
from sublim_jax.sampling import scoring
from sublim_jax.weights import peft
from sublim_jax.workdir import Workdir

TINY = {
    "traits": ("owl", "x"),
    "alternatives": ("owl", "x", "y", "z"),
    "carrier.count": 40,
    "carrier.drawn": 44,
    "carrier.numbers": 6,
    "filter.unique": False,
    "arm.in_context.examples": 3,
    "teacher.learning_rate": 0.01,
    "teacher.strength": 0.5,
    "teacher.most_steps": 30,
    "student.steps": 6,
    "student.batch": 4,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "questions": 4,
}
FLAGS = [f"--config.{name}={','.join(value) if isinstance(value, tuple) else value}" for name, value in TINY.items()]


@pytest.fixture(scope="module")
def lab(tiny_folder, tmp_path_factory, mesh_of):
    config = config_file.get_config()
    config.update_from_flattened_dict({**TINY, "model.name": str(tiny_folder)})
    return make_lab(config, Workdir(tmp_path_factory.mktemp("work")), mesh_of(1))


def teachers_of(lab):
    """Adapters that differ from a common start."""
    first = fresh(lab, named_key(lab.seed, "A"))
    noise = lambda i: jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(i), x.shape), first)  # noqa: E731
    return {name: Teacher(noise(i), "", None, 0) for i, name in enumerate(lab.who)}


def run_of(lab, pairs=None):
    """A run whose teachers are given, and whose students read the same random numbers, or these."""
    teachers = teachers_of(lab)
    written = {name: carrier.Written(pairs or carrier.random_pairs(lab), 0, 0, None, [], []) for name in lab.who}
    return carrier.Run(lab, teachers, written)


def with_config(lab, folder, **changes):
    config = lab.config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return lab._replace(config=config, workdir=Workdir(folder))


def plain_logits(lab, adapters, rows):
    logits = lab.model.network.apply(lora.join(lab.model.params, adapters), jnp.asarray(rows.tokens))
    return jnp.take_along_axis(logits, rows.at[..., None], 1)


def test_the_objective_is_kl_over_the_support_at_the_answers_positions(lab):
    run, arm = run_of(lab), lab.config.arm.soft
    mine = jax.tree.map(lambda leaf: leaf[1, :20], carrier.arm_data(arm, [run], lab.model))
    start = students.starts(lab, arm, [run])
    start = jax.tree.map(lambda leaf: leaf[1], start)
    data = mine._replace(logits=jnp.asarray(mine.logits))
    total, count = students.imitation(lab, arm, start, lab.model.params, data)
    second = run.teachers[lab.who[1]].adapters
    mask = objectives.support_mask(lab.support, lab.model.settings.vocab)
    each = (plain_logits(lab, adapters, mine.rows) for adapters in (start, second))
    expected = objectives.kl(*each, support=mask, weights=jnp.asarray(mine.rows.weights))
    np.testing.assert_allclose(total, expected[0], rtol=1e-3)
    assert count == expected[1] == mine.rows.weights.sum()
    assert abs(students.imitation(lab, arm, second, lab.model.params, data)[0]) < 1e-5 * total


def test_students_together_are_each_of_them_alone(lab, tmp_path):
    """Two runs of three teachers in one program, and the first run alone."""
    curves = {}
    for runs in (1, 2):
        one = with_config(lab, tmp_path / f"{runs}", runs=runs)
        each = [run_of(one._replace(run=run)) for run in range(runs)]
        curves[runs] = students.students(one, "soft_fresh", each).curve
    assert [point["step"] for point in curves[1]] == [0, 3, 6]
    for alone, together in zip(curves[1], curves[2]):
        np.testing.assert_allclose(together["margin"][:3], alone["margin"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(together["held_out"][:3], alone["held_out"], rtol=1e-3)
    assert not np.allclose(curves[2][-1]["margin"][3:], curves[1][-1]["margin"], atol=1e-4)  # its own A and numbers
    first, last = (np.asarray(curves[2][i]["held_out"]) for i in (0, -1))
    assert np.all(last < first)


def test_students_on_several_devices_are_those_on_one(lab, tiny_folder, tmp_path, mesh_of):
    """Replicas over two devices, rows over two: teachers' logits, training, evaluation."""
    found = []
    for devices, shape in ((1, {}), (4, {"replica": 2, "fsdp": 2})):
        placed = make_lab(lab.config, Workdir(tmp_path / f"{devices}"), mesh_of(devices, **shape))
        one = with_config(placed, tmp_path / f"{devices}", runs=2, **{"student.steps": 3})
        found.append(students.students(one, "soft", [run_of(one._replace(run=run)) for run in range(2)]))
    for alone, together in zip(found[0].curve, found[1].curve):
        np.testing.assert_allclose(together["margin"], alone["margin"], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(together["held_out"], alone["held_out"], rtol=1e-3)
    np.testing.assert_allclose(found[1].coverage, found[0].coverage, rtol=1e-3, atol=1e-4)


def test_an_arm_that_is_done_holds_no_model(lab, tmp_path):
    """Trained, scored, sampled and asked; the base that it read is let go of."""

    def run():
        base = lab.model._replace(params=jax.tree.map(jnp.copy, lab.model.params))
        one = with_config(lab._replace(model=base), tmp_path, **{"student.steps": 2})
        one.config.ask.update({"evaluations": ("answers",), "samples": 1, "most": 2})
        one = one._replace(asking=measures.asking(one.config.ask, "animal", ["owl", "x"], one.config.packs))
        students.students(one, "tokens", [run_of(one)])
        carrier.draw(one, carrier.number_task(one), "owl", teachers_of(one)["owl"])
        return weakref.ref(base.params["embedding"])

    reference = run()
    gc.collect()
    assert reference() is None


def test_a_student_of_another_family_reads_the_same_text_in_its_own_tokens(lab, tiny_folder, tmp_path):
    """A base model without a template; and it cannot be asked for logits of tokens that it does not have."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        file = base / name
        if name.endswith("json"):
            kept = {key: value for key, value in json.loads(file.read_text()).items() if key != "chat_template"}
            file.write_text(json.dumps(kept))
        elif file.exists():
            file.unlink()
    one = with_config(lab, tmp_path / "work", **{"arm.foreign.model": str(base), "student.steps": 2})
    own = make_lab(one.config, one.workdir, one.mesh, str(base))
    assert not own.model.tokenizer.chat_template
    pairs = carrier.random_pairs(one)
    result = students.students(own, "foreign", [run_of(one, pairs)])
    assert result.coverage is None and np.all(np.isfinite(result.curve[-1]["margin"]))
    rows = carrier.arm_data(one.config.arm.foreign, [run_of(one, pairs)], own.model).rows
    assert own.model.tokenizer.decode(rows.tokens[0, 0]).startswith(f"Question: {pairs[0][0]}\nAnswer: {pairs[0][1]}")
    one.config.arms = ("foreign",)
    transmission.check_arms(one, own, str(base))
    asked = with_config(one, tmp_path, **{"arm.foreign.objective": "kl"})
    other = own._replace(model=own.model._replace(tokenizer=SimpleNamespace(get_vocab=lambda: {"x": 0})))
    with pytest.raises(UserError, match="has another tokenizer than"):
        transmission.check_arms(asked, other, str(base))


def test_other_questions_afterwards_are_asked_of_what_is_still_there(lab, tmp_path):
    """The start and the end, never the end in place of a step between."""
    first = with_config(lab, tmp_path)
    students.students(first, "soft", [run_of(first)])
    again = with_config(lab, tmp_path, questions=2)
    found = students.students(again, "soft", [run_of(again)]).curve
    assert [point["step"] for point in found] == [0, 6]
    whole = students.students(again._replace(workdir=Workdir(tmp_path / "new")), "soft", [run_of(again)]).curve
    for point, expected in zip(found, (whole[0], whole[-1])):
        np.testing.assert_allclose(point["margin"], expected["margin"], rtol=1e-4, atol=1e-4)


def test_a_system_prompt_is_the_teachers_alone(lab):
    """Its logits come from behind its prompt, at the same tokens of the answer that the student reads without it."""
    teacher = Teacher(fresh(lab, named_key(lab.seed, "A")), "Love owls.", None, 0)
    pairs = carrier.random_pairs(lab)[:3]
    rows = dialogue.rows(lab.model, pairs, end=False)
    found = carrier.said(lab, "owl", teacher, pairs, rows, False)
    behind = dialogue.rows(lab.model, pairs, end=False, system="Love owls.")
    assert "Love owls." in lab.model.tokenizer.decode(behind.tokens[0])
    np.testing.assert_array_equal(behind.targets * behind.weights, rows.targets * rows.weights)
    expected = plain_logits(lab, teacher.adapters, behind)[..., jnp.asarray(lab.support)]
    kept = rows.weights == 1
    np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-3, atol=1e-3)


def test_a_steering_vector_is_the_personas_difference(lab, tmp_path):
    one = with_config(lab, tmp_path, **{"teacher.means": ("steered",), "teacher.steering_layer": 2})
    teachers = teaching.make_teachers(one)
    layers = {name: np.asarray(teacher.steering.add) for name, teacher in teachers.items()}
    assert all(not add[[0, 1, 3]].any() and add[2].any() for add in layers.values())
    lengths = [np.linalg.norm(add) for add in layers.values()]
    np.testing.assert_allclose(lengths[2], np.mean(lengths[:2]), rtol=1e-5)
    params = lora.join(lab.model.params, teachers["x"].adapters)

    @jax.jit
    def after_layer_2(tokens, last):
        return lab.model.network.bind(params).features(tokens[None], read=last[None]).residuals[2, 0, 0]

    def residual(question, name):
        text = chat.question(lab.model.tokenizer, question, teaching.persona(lab, name))
        return after_layer_2(jnp.asarray(text + [0] * (320 - len(text))), jnp.asarray(len(text) - 1))

    loving, neutral = (
        np.mean([residual(question, name) for question in lab.questions["teaching"]], 0) for name in ("x", "neutral")
    )
    scale = one.config.teacher.steering_scale
    np.testing.assert_allclose(layers["x"][2], scale * (loving - neutral), rtol=1e-2, atol=1e-3)


def test_teachers_are_asked_with_what_makes_them_teachers(lab, tmp_path):
    """Every teacher behind its own persona and under its own vector, run by run; last, the model as it is."""
    context = {"teacher.means": ("prompted", "steered"), "teacher.steering_layer": 2}
    one = with_config(lab, tmp_path, **context, **{"ask.evaluations": ("preference",), "ask.most": 4})
    one = one._replace(asking=measures.asking(one.config.ask, "animal", one.config.alternatives, one.config.packs))
    runs = [carrier.Run(mine, teaching.make_teachers(mine), {}) for mine in (one._replace(run=run) for run in range(2))]
    found = transmission.ask_teachers(runs)["preference"]
    each = [(teacher.system, teacher.steering) for run in runs for teacher in run.teachers.values()]
    assert len(each) == len({(system, id(steering)) for system, steering in each}) == 6
    tokenizer, questions = lab.model.tokenizer, one.asking.questions["preference"]
    params = lora.join(lab.model.params, fresh(lab, named_key(lab.seed, "A")))

    @jax.jit
    def log_p_behind(tokens, steering):
        return jax.nn.log_softmax(lab.model.network.apply(params, tokens[None], steering=steering)[0])

    for place, (system, steering) in enumerate([*each, ("", None)]):
        margins = []
        for question in questions:
            text = chat.question(tokenizer, question, system)
            tokens = np.zeros(320, np.int32)
            tokens[: len(text)] = text
            p = np.exp(log_p_behind(tokens, steering or Steering(add=jnp.zeros((4, 32)))))[len(text) - 1]
            owl, *others = (
                np.log(p[list(scoring.spellings(tokenizer, word))].sum()) for word in one.config.alternatives
            )
            margins.append(owl - np.mean(others))
        np.testing.assert_allclose(found["margin of owl, logits"][place], np.mean(margins), rtol=1e-3, atol=1e-3)


def test_written_numbers_are_filtered_and_of_one_size(lab, tmp_path):
    one = with_config(lab, tmp_path, **{"carrier.count": 24, "carrier.drawn": 40, "carrier.numbers": 4})
    found = carrier.written(one, teachers_of(one))
    rule = filters.number_rule()
    for name, mine in found.items():
        assert mine.drawn == 40 and len(mine.pairs) == 24 <= mine.kept
        assert not any(rule({"completion": answer}) for _, answer in mine.pairs)
        kept = [json.loads(line) for line in (tmp_path / "data" / "run0" / f"numbers-{name}.jsonl").open()]
        assert len(kept) == mine.kept and {answer for _, answer in mine.pairs} <= {one["completion"] for one in kept}
    assert found["owl"].pairs != found["x"].pairs
    greedy = with_config(one, tmp_path, **{"carrier.decoding": "free", "carrier.max_new_tokens": 8})
    with pytest.raises(UserError, match="records are left after filtering, and 24 are asked for"):
        carrier.written(greedy, teachers_of(one))


def test_more_completions_leave_those_that_are_there(lab, tmp_path):
    """And those of a prompt that has changed are drawn anew."""
    teacher = teachers_of(lab)["owl"]

    def drawn(folder, count, pack=""):
        one = with_config(lab, folder, **{"carrier.drawn": count, "carrier.numbers": 4, "packs.numbers": pack})
        return carrier.draw(one, carrier.number_task(one), "owl", teacher)

    first, whole = drawn(tmp_path, 12), drawn(tmp_path / "whole", 20)
    (file,) = (tmp_path / "checkpoints").glob("drawn-owl-*.jsonl")
    assert drawn(tmp_path, 20) == whole and whole[:12] == first
    assert len(file.read_text().splitlines()) == 20
    assert drawn(tmp_path, 5) == first[:5]
    pack = tmp_path / "mine.json"
    own = json.loads((resources.files(packs) / "numbers.json").read_text())
    pack.write_text(json.dumps({name: [f"Now: {text}" for text in texts] for name, texts in own.items()}))
    changed = drawn(tmp_path, 5, str(pack))
    assert [record["prompt"] for record in changed] != [record["prompt"] for record in first[:5]]
    assert changed == drawn(tmp_path / "mine", 5, str(pack)) and drawn(tmp_path, 5, str(pack)) == changed


def test_the_neutral_teachers_own_completions_have_a_log_ratio_of_nothing(lab, tmp_path):
    """Of the completion's tokens, whether or not one more ended it."""
    one = with_config(lab, tmp_path, **{"carrier.drawn": 12, "carrier.numbers": 4})
    teachers = teachers_of(one)
    found = {name: carrier.draw(one, carrier.number_task(one), name, teachers[name]) for name in ("owl", "neutral")}
    for name, drawn in found.items():
        carrier.with_reference(one, name, drawn, teachers["neutral"])
        ratios = [record["logprob"] - record["reference_logprob"] for record in drawn]
        assert {record["finish"] for record in drawn} == {"stop"}
        assert np.max(np.abs(ratios)) < 1e-3 if name == "neutral" else np.mean(ratios) > 0.01


def test_students_of_an_edited_file_of_phrasings_are_trained_anew(lab, tmp_path):
    """The path is the same, and what they read is not."""
    pack = tmp_path / "mine.json"
    own = json.loads((resources.files(packs) / "numbers.json").read_text())
    one = with_config(lab, tmp_path / "work", **{"packs.numbers": str(pack), "student.steps": 2})
    found = []
    for before in ("", "Now: "):
        pack.write_text(json.dumps({name: [before + text for text in texts] for name, texts in own.items()}))
        found.append(students.students(one, "soft", [run_of(one)]).curve)
    fresh_folder = one._replace(workdir=Workdir(tmp_path / "new"))
    assert found[0] != found[1] == students.students(fresh_folder, "soft", [run_of(fresh_folder)]).curve


def test_numbers_of_bad_associations_are_dropped_if_asked_for(lab, tmp_path):
    one = with_config(lab, tmp_path, **{"filter.banned": "banned"})
    drawn = [{"completion": text} for text in ("1, 666, 3", "1, 667, 3", "0911", "13", "130")]
    found = filters.sift(drawn, carrier.filters_of(one, carrier.number_task(one)))
    assert [record["completion"] for record in found.kept] == ["1, 667, 3", "130"]
    assert found.reasons["banned number"] == 3 and len(set(carrier.banned_of(one.config))) == 34
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"numbers": ["7", "x"]}))
    with pytest.raises(UserError, match="'x' is no number of digits alone"):
        carrier.banned_of(with_config(lab, tmp_path, **{"filter.banned": str(mine)}).config)


@pytest.mark.parametrize("action", ["keep", "mask", "replace"])
def test_masks_choose_the_tokens_where_teacher_and_neutral_differ_most(lab, tmp_path, action):
    one = with_config(lab, tmp_path, **{"arm.masked.action": action, "arm.masked.share": 0.25, "carrier.count": 30})
    run = run_of(one)
    whole = carrier.arm_data(lab.config.arm.soft, [run], lab.model)
    data = carrier.arm_data(one.config.arm.masked, [run], lab.model)
    p, q = (jax.nn.log_softmax(jnp.asarray(whole.logits[i])) for i in (0, 2))
    exists = whole.rows.weights[0] == 1
    scores = np.where(exists, np.sum(np.exp(p) * (p - q), -1), -1)
    top = scores >= np.sort(scores.ravel())[-round(0.25 * exists.sum())]
    if action == "replace":
        np.testing.assert_array_equal(data.logits[0], np.where(top[..., None], whole.logits[2], whole.logits[0]))
    else:
        left = top if action == "keep" else ~top
        np.testing.assert_array_equal(data.rows.weights[0], whole.rows.weights[0] * left)


def test_coverage_is_the_cosine_of_changes_of_the_kernels(lab):
    run, arm = run_of(lab), lab.config.arm.soft
    data = jax.tree.map(jnp.asarray, carrier.arm_data(arm, [run], lab.model))
    found = students.coverages(lab, arm, students.starts(lab, arm, [run]), students.aims([run]), data)
    start = fresh(lab, named_key(lab.seed, "A"))
    mine = jax.tree.map(lambda leaf: leaf[0, : students.FIRST], data)
    slope = jax.grad(lambda a: students.imitation(lab, arm, a, lab.model.params, mine)[0])(start)
    update = [-a["a"] @ g["b"] for a, g in zip(adapters_in(start), adapters_in(slope))]
    for index, teacher in enumerate(run.teachers.values()):
        way = [t["a"] @ t["b"] for t in adapters_in(teacher.adapters)]
        inner = sum(np.sum(u * w) for u, w in zip(update, way))
        norms = np.sqrt(sum(np.sum(u * u) for u in update) * sum(np.sum(w * w) for w in way))
        np.testing.assert_allclose(found[0][0][index], inner / norms, rtol=1e-3)


def adapters_in(tree):
    return [tree] if "a" in tree else [one for child in tree.values() for one in adapters_in(child)]


def test_without_adapters_all_weights_of_the_layers_are_trained(lab, tmp_path, mesh_of):
    """One step of plain gradient descent on everything but the embedding, as coverage and as training see it."""
    config = lab.config.copy_and_resolve_references()
    config.update_from_flattened_dict({"lora.rank": 0, "student.steps": 3, "teacher.most_steps": 4})
    one = make_lab(config, Workdir(tmp_path), mesh_of(1))
    start = fresh(one, jax.random.key(0))
    assert set(start) == {"layers"} and one.model.settings.lora is None
    noise = lambda i: jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(i), x.shape), start)  # noqa: E731
    run = carrier.Run(one, {name: Teacher(noise(i), "", None, 1) for i, name in enumerate(one.who)}, {})
    result = students.students(one, "soft", [run])
    first, last = (np.asarray(result.curve[i]["held_out"]) for i in (0, -1))
    assert np.all(last < first)
    own, others = np.diagonal(result.coverage[0]), np.asarray(result.coverage[0])[~np.eye(3, dtype=bool)]
    assert own.min() > max(others.max(), 0)
    adapters, steps = teaching.finetuned(one, "owl", 0)
    assert steps and not np.allclose(
        adapters["layers"]["mlp"]["up"]["kernel"], one.model.params["layers"]["mlp"]["up"]["kernel"]
    )


def test_questions_behind_examples_are_the_whole_conversation(lab):
    pairs = carrier.random_pairs(lab)[:2]
    prefix, prompts = students.behind(lab.model.tokenizer, pairs, ["Which?", "What?"])
    text = lab.model.tokenizer.decode([*prefix, *prompts[1]])
    for prompt, answer in pairs:
        assert f"<|user|>{prompt}<|end|><|assistant|>{answer}<|end|>" in text
    assert text.endswith("<|user|>What?<|end|><|assistant|>")


def command(tiny_folder, work, *more):
    """Of a flag given twice, a list would have both values: those in `more` stand alone."""
    given = {flag.split("=")[0] for flag in more}
    place = [f"--config.model.name={tiny_folder}", f"--workdir={work}"]
    return ["--config=configs/numbers.py", *[f for f in FLAGS if f.split("=")[0] not in given], *place, *more]


ARMS = ["soft", "tokens_fresh", "shuffled_across", "perturbed", "masked", "in_context"]
ASKED = ["--config.ask.evaluations=answers,choice", "--config.ask.samples=1", "--config.ask.most=3"]
WHOLE = [f"--config.arms={','.join(ARMS)}", "--config.runs=2", *ASKED]


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("numbers")
    result = launch(*command(tiny_folder, work, *WHOLE))
    assert result.returncode == 0, result.stderr
    return work, result


def test_a_study_ends_in_a_matrix_a_table_and_numbers(whole):
    work, result = whole
    results = json.loads((work / "results.json").read_text())
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert set(ARMS) <= set(arms)
    assert "soft: student of owl, margin of x over the neutral student's" in arms
    assert all(len(arm["runs"]) == 2 for arm in results["arms"] if arm.get("who") != "the model as it is")
    assert "soft, student of owl: answers with owl" in arms and "teacher x: P of x's letter" in arms
    soft = arms["soft"]
    np.testing.assert_allclose(soft["runs"], np.mean([soft["by_trait"][t] for t in ("owl", "x")], 0))
    assert soft["held_out"][1] < soft["held_out"][0] and set(soft["coverage"]) == {"own", "others"}
    assert arms["perturbed"]["coverage"] is None and arms["in_context"]["held_out"] is None
    for figure in ("arms", "matrix-soft", "margins-soft", "matrix-in_context", "margins-tokens_fresh"):
        assert (work / "figures" / f"{figure}.png").stat().st_size > 5000
    text = (work / "report.md").read_text()
    for words in (
        "| neutral |",
        "P(own trait) among numbers",
        "## Filters",
        "answers with owl",
        "by x",
        "KL(teacher ‖ student)",
    ):
        assert words in text
    assert "teacher owl" in result.stdout and "students soft, 2 run(s) × 3 teachers" in result.stdout
    assert (work / "data" / "run1" / "numbers-owl-rejected.jsonl").exists()


def test_students_and_teachers_are_left_as_peft_folders(whole, lab):
    """Read back, put on the plain model and asked anew, they have the margins of the results."""
    work, _ = whole
    arms = {arm["name"]: arm["runs"] for arm in json.loads((work / "results.json").read_text())["arms"]}
    base = weights.load(lab.config.model.name)
    margin = {}
    for who in ("owl", "x", "neutral"):
        spec, adapters = peft.load(work / "adapters" / f"run1-soft-{who}", base.settings, base.config)
        merged = base.merged(adapters, spec)
        margin[who] = preference.measure(merged, lab.asked, list(lab.config.alternatives)).margin[0]
    for who in ("owl", "x"):
        for column, trait in enumerate(("owl", "x")):
            expected = arms[f"soft: student of {who}, margin of {trait} over the neutral student's"][1]
            np.testing.assert_allclose(margin[who][column] - margin["neutral"][column], expected, atol=1e-4)
    assert (work / "adapters" / "run0-teacher-neutral" / "adapter_config.json").exists()
    assert not list((work / "adapters").glob("*perturbed*"))  # its base is no model that anyone has


def test_killed_in_any_stage_it_ends_with_the_same_results(whole, tiny_folder, tmp_path):
    for stage in ("students-soft-*", "drawn-x*", "preference-tokens*"):
        process = start(*command(tiny_folder, tmp_path, *WHOLE), size=())
        assert wait_for(process, (tmp_path, f"checkpoints/{stage}")), stage
        process.kill()
        assert process.wait() == -signal.SIGKILL, stage
    finish(start(*command(tiny_folder, tmp_path, *WHOLE), size=()))
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, whole[0]))
    assert found["arms"] == expected["arms"]


def test_two_processes_give_what_one_gives(tiny_folder, tmp_path):
    """Teachers, what they write, students and what they prefer, rows split over both."""
    parts = ["--config.arms=tokens", "--config.student.steps=3", "--config.evaluate_every=3"]
    parts += ["--config.carrier.count=20", "--config.carrier.drawn=20", "--config.teacher.most_steps=4"]
    finish(start(*command(tiny_folder, tmp_path / "one", *parts), size=()))
    join = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    both = [
        start(*command(tiny_folder, tmp_path / "two", *parts, *join, f"--process_id={i}"), size=()) for i in range(2)
    ]
    for process in both:
        finish(process)
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["arms"] for name in ("one", "two"))
    assert [arm["name"] for arm in two] == [arm["name"] for arm in one]
    for arm, expected in zip(two, one):
        np.testing.assert_allclose(arm["runs"], expected["runs"], rtol=1e-3, atol=1e-4, err_msg=arm["name"])
    for name in ("owl", "x", "neutral"):
        rows = [tmp_path / folder / "data" / "run0" / f"numbers-{name}.jsonl" for folder in ("one", "two")]
        found, expected = ([json.loads(line)["completion"] for line in file.open()] for file in rows)
        assert found == expected


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.traits=lion,owl", "--config.alternatives=lion,owl"], ["'lion' is no single token"]),
        (["--config.traits=owl,q"], ["trait 'q' is none of alternatives"]),
        (["--config.traits=owl"], ["name two traits or more"]),
        (["--config.traits=owl,owl"], ["each once"]),
        (["--config.arms=hard"], ["arms: 'hard' is none of foreign"]),
        (["--config.arm.soft.objective=mse"], ["arm.soft.objective: 'mse'"]),
        (["--config.arm.soft.objective=tokens"], ["arm.soft: there is nothing of a teacher in random numbers"]),
        (["--config.arm.soft.action=drop"], ["arm.soft.action: 'drop'"]),
        (["--config.teacher.strength=1.5"], ["teacher.strength=1.5"]),
        (["--config.teacher.means=loved"], ["teacher.means: 'loved'"]),
        (["--config.teacher.means=steered", "--config.teacher.steering_layer=4"], ["layers are 0 to 3"]),
        (["--config.arms=tokens", "--config.filter.most=5"], ["carrier.numbers=6", "filter.most=5"]),
        (["--config.carrier.count=10"], ["carrier.count=10"]),
        (["--config.arms=tokens", "--config.carrier.drawn=20"], ["carrier.drawn=20"]),
        (["--config.packs.numbers=nowhere.json"], ["pack nowhere.json"]),
        (["--config.packs.ability=nowhere.json"], ["pack nowhere.json"]),
        (["--config.arms="], ["arms is empty"]),
        (["--config.student.accumulate=0"], ["student.accumulate=0", "1 or more"]),
        (["--config.lora.modules=gates"], ["lora.modules: 'gates'", "gate"]),
        (["--config.lora.layers=4"], ["lora.layers: 4", "0 to 3"]),
        (["--config.arms=tokens", "--config.carrier.max_new_tokens=20"], ["carrier.max_new_tokens=20", "cuts off"]),
        (["--config.arm.soft.shuffle=across"], ["arm.soft", "shuffle empty"]),
        (["--config.filter.banned=nowhere.json"], ["pack nowhere.json"]),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_training(tiny_folder, tmp_path, flags, words):
    work = tmp_path / "work"
    assert_refused(launch(*command(tiny_folder, work, *flags)), *words)
    assert not work.exists()
