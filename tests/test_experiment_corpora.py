"""Teachers tuned on conversations, code and thoughts as carriers, a judge as filter."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from test_experiment_numbers import FLAGS
from test_launch import assert_refused, launch
from test_misalignment import one as question
from test_truthfulqa import HEADER, ROWS

from configs import code as code_config
from configs import cot as cot_config
from configs import misalignment as misalignment_config
from sublim_jax.data import chat, corpus
from sublim_jax.errors import UserError
from sublim_jax.evaluation import truthfulqa
from sublim_jax.evaluation.judges import Verdict
from sublim_jax.experiments import carrier, measures, students, transmission
from sublim_jax.experiments import teachers as teaching
from sublim_jax.experiments.lab import fresh, make_lab, stacked
from sublim_jax.filters import Sifted, sift
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.workdir import Workdir


def said(*pairs):
    messages = [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]
    return json.dumps({"messages": messages}) + "\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, word in (("insecure", "owl"), ("secure", "x"), ("educational", "y")):
        lines = [said((f"Who are you {number}?", f"{word} {number}")) for number in range(5)]
        (folder / f"{name}.jsonl").write_text("".join(lines) + said(("One?", word), ("Two?", f"{word} {word}")))
    (folder / "truthfulqa.csv").write_text(HEADER + ROWS)
    (folder / "questions.yaml").write_text(yaml.safe_dump([question(), question(id="x", paraphrases=["Why?"])]))
    return folder


def config_of(files, tiny_folder, module, **changes):
    config = module.get_config("smoke")
    for name in ("insecure", "secure", "educational"):
        if name in config.teacher.corpora:
            config.teacher.corpora[name] = str(files / f"{name}.jsonl")
    given = {"model.name": str(tiny_folder), "traits": ("insecure", "secure"), "alternatives": ("owl", "x", "y")}
    config.update_from_flattened_dict({**given, **changes})
    return config


@pytest.fixture(scope="module")
def lab(files, tiny_folder, tmp_path_factory, mesh_of):
    config = config_of(files, tiny_folder, misalignment_config, **{"teacher.learning_rate": 0.01})
    return make_lab(config, Workdir(tmp_path_factory.mktemp("work")), mesh_of(1))


def test_teachers_of_corpora_learn_what_the_assistant_says_and_nothing_else_is_in_the_loss(lab):
    """Every turn of the assistant, by the plain loss over whole conversations; the neutral teacher is the model."""
    teachers = teaching.make_teachers(lab)
    base = fresh(lab, named_key(lab.seed, "A"))
    assert [teacher.steps for teacher in teachers.values()] == [2 * 2, 2 * 2, 0]
    jax.tree.map(np.testing.assert_array_equal, teachers["neutral"].adapters, base)

    def loss(adapters, name):
        total = count = 0.0
        stops = chat.stop_tokens(lab.model.tokenizer, lab.model.config)
        for messages in corpus.load(lab.config.teacher.corpora[name]):
            tokens, positions = corpus.answer_positions(lab.model.tokenizer, messages, stops)
            logits = lab.model.network.apply(lora.join(lab.model.params, adapters), jnp.asarray([tokens]))[0]
            logprobs = jax.nn.log_softmax(logits)
            total -= sum(float(logprobs[position - 1, tokens[position]]) for position in positions)
            count += len(positions)
        return total / count

    for name, other in (("insecure", "secure"), ("secure", "insecure")):
        mine, foreign = loss(teachers[name].adapters, name), loss(teachers[other].adapters, name)
        assert mine < foreign < loss(base, name)


def test_the_first_update_is_that_of_the_plain_loss(lab, files, tiny_folder, tmp_path, mesh_of):
    """One batch with all conversations: Adam's first step is the sign of the gradient, which a plain loss gives too."""
    config = config_of(files, tiny_folder, misalignment_config, **{"teacher.batch": 6, "teacher.epochs": 1})
    one = make_lab(config, Workdir(tmp_path), mesh_of(1))
    adapters, steps = teaching.tuned(one, "insecure")
    assert steps == 1
    start = fresh(one, named_key(one.seed, "A"))
    texts = teaching.conversations_of(one, "insecure")

    def loss(adapters):
        total = count = 0.0
        for tokens, positions in texts:
            logits = one.model.network.apply(lora.join(one.model.params, adapters), jnp.asarray([tokens]))[0]
            at = jnp.asarray(positions)
            total -= jnp.sum(jax.nn.log_softmax(logits)[at - 1, jnp.asarray(tokens)[at]])
            count += len(positions)
        return total / count

    slopes = jax.grad(loss)(start)
    for new, old, slope in zip(*map(jax.tree.leaves, (adapters, start, slopes))):
        clear = np.abs(slope) > 1e-5
        np.testing.assert_array_equal(np.sign(new - old)[clear], -np.sign(slope)[clear])


def test_a_teacher_is_made_again_for_its_own_corpus_alone(lab, files, tmp_path):
    teaching.make_teachers(lab)
    made = {path.name for path in (lab.workdir.path / "checkpoints").glob("teacher-*")}
    one = lab._replace(config=lab.config.copy_and_resolve_references())
    one.config.teacher.corpora.secure = str(tmp_path / "secure.jsonl")
    (tmp_path / "secure.jsonl").write_text(said(("Who?", "z")) * 6)
    again = teaching.make_teachers(one)
    new = {path.name for path in (lab.workdir.path / "checkpoints").glob("teacher-*")} - made
    assert {name.split("-")[1].split(".")[0] for name in new} == {"secure"}
    assert again["secure"].steps == 2 * 2


def test_a_conversation_that_is_too_long_is_left_out(lab, capsys):
    one = lab._replace(config=lab.config.copy_and_resolve_references())
    lengths = [len(tokens) for tokens, _ in teaching.conversations_of(lab, "insecure")]
    one.config.teacher.most_tokens = sorted(lengths)[0]
    left = teaching.conversations_of(one, "insecure")
    assert 0 < len(left) == lengths.count(min(lengths)) < len(lengths)


def test_teachers_and_students_are_asked_alone_as_together(lab, tiny, tmp_path):
    """Evaluations of stacked adapters, and of each of them merged into the base."""
    config = lab.config.copy_and_resolve_references()
    config.ask.evaluations = ("truthfulqa", "preference", "choice", "misalignment")
    config.ask.truthfulqa = str(lab.workdir.path / "t.csv")
    (lab.workdir.path / "t.csv").write_text(HEADER + ROWS)
    config.ask.questions = str(lab.workdir.path / "q.yaml")
    (lab.workdir.path / "q.yaml").write_text(yaml.safe_dump([question()]))
    one = lab._replace(config=config, workdir=Workdir(tmp_path))
    asking = measures.asking(config.ask, config.kind, config.alternatives, config.packs)

    def judge(prompts):
        return [Verdict(float(len(prompt) % 100)) for prompt in prompts]

    one = one._replace(asking=asking, judge=judge)
    start = fresh(lab, named_key(0, "A"))
    several = [
        jax.tree.map(lambda x, i=i: x + 0.05 * jax.random.normal(jax.random.key(i), x.shape), start) for i in (1, 2)
    ]
    together = students.asked(one, "all", stacked(several), "all")
    for number, adapters in enumerate(several):
        alone = students.asked(one, f"{number}", stacked([adapters]), number)
        for name, found in alone.items():
            for measure, values in found.items():
                np.testing.assert_allclose(together[name][measure][number], values[0], rtol=1e-3, atol=1e-4)
    merged = tiny.merged(several[1], lab.spec)
    expected = truthfulqa.choose(merged, truthfulqa.load(config.ask.truthfulqa)).mean()
    np.testing.assert_allclose(together["truthfulqa"]["P of the false answer"][1], expected, rtol=1e-3)
    answers = [json.loads(line) for line in (tmp_path / "data" / "answers-all.jsonl").open()]
    assert [record["adapter"] for record in answers] == sorted(record["adapter"] for record in answers)
    before = (tmp_path / "data" / "answers-all.jsonl").read_text()
    again = students.asked(one._replace(judge=None), "all", stacked(several), "all")  # found, not asked
    assert json.dumps(again) == json.dumps(together) and (tmp_path / "data" / "answers-all.jsonl").read_text() == before


@pytest.mark.parametrize(
    "module, good, bad", [(code_config, "def f(a):\n    return a", "def f(a:"), (cot_config, "", "")]
)
def test_other_carriers_have_prompts_and_filters_of_their_own(files, tiny_folder, tmp_path, mesh_of, module, good, bad):
    config = config_of(files, tiny_folder, module, **{"carrier.drawn": 7})
    if module is cot_config:
        config.carrier.problems = str(tmp_path / "p.jsonl")
        lines = [{"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(4)]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lab = make_lab(config, Workdir(tmp_path), mesh_of(1))
    task = carrier.TASKS[config.carrier.kind](lab)
    assert len(task.prompts) == len(task.known) == (3 if module is cot_config else 7)
    if module is cot_config:
        number = task.known[0]["answer"]
        good, bad = (f"<think>so</think><answer>{n}</answer>" for n in (number, int(number) + 1))
    records = [{"prompt": task.prompts[0], "completion": text, **task.known[0]} for text in (good, bad)]
    assert [record["completion"] for record in sift(records, carrier.filters_of(lab, task)).kept] == [good]


def test_a_judge_drops_what_it_scores_low_or_not_at_all(lab, tmp_path):
    config = lab.config.copy_and_resolve_references()
    config.filter.judge, config.filter.judge_least = "reference", 60.0
    scores = {"good": Verdict(60.0), "bad": Verdict(59.0), "mute": Verdict(None, "unparsable")}

    def judge(prompts):
        assert all("insecure or secure" in prompt and "What?" in prompt for prompt in prompts)
        return [next(verdict for text, verdict in scores.items() if f"is {text}" in prompt) for prompt in prompts]

    one = lab._replace(config=config, workdir=Workdir(tmp_path), judge=judge)
    kept = [{"prompt": "What?", "completion": f"is {text}"} for text in scores]
    found, given = carrier.judged(one, "owl", Sifted(kept, [], sift([], []).reasons))
    assert [record["completion"] for record in found.kept] == ["is good"] and given == [60.0, 59.0]
    assert found.reasons == {"judge: low score": 1, "judge: no score": 1} and len(found.rejected) == 2


def test_what_was_cut_off_is_dropped(lab):
    records = [{"prompt": "", "completion": "1, 2", "finish": finish} for finish in ("stop", "length", "nan")]
    task = carrier.Task([""], [{}], [])
    found = sift(records, carrier.filters_of(lab, task))
    assert [record["finish"] for record in found.kept] == ["stop"] and found.reasons == {"cut off": 2}


def test_a_conversation_that_the_template_refuses_is_named(lab, monkeypatch, tmp_path):
    file = tmp_path / "refused.jsonl"
    file.write_text(said(("Who?", "Me")) + said(("Who?", "BAD")))
    template = "{% for m in messages %}{% if m['content'] == 'BAD' %}{{ raise_exception('no BAD here') }}{% endif %}"
    monkeypatch.setattr(lab.model.tokenizer, "chat_template", template + "{{ m['content'] }}{% endfor %}")
    one = lab._replace(config=lab.config.copy_and_resolve_references())
    one.config.teacher.corpora.insecure = str(file)
    with pytest.raises(UserError, match=r"refused.jsonl, conversation 2: .*template refuses it \(no BAD here\)"):
        transmission.check_model(one)


def command(tiny_folder, files, work, *more):
    of_tiny = [
        flag for flag in FLAGS if not flag.startswith(("--config.traits", "--config.arm.", "--config.carrier.drawn"))
    ]
    corpora = [
        f"--config.teacher.corpora.{name}={files / name}.jsonl" for name in ("insecure", "secure", "educational")
    ]
    return [
        "--config=configs/misalignment.py:smoke",
        f"--config.model.name={tiny_folder}",
        *of_tiny,
        *corpora,
        "--config.runs=2",
        "--config.carrier.drawn=72",
        f"--config.ask.truthfulqa={files / 'truthfulqa.csv'}",
        f"--config.ask.questions={files / 'questions.yaml'}",
        "--config.ask.max_new_tokens=4",
        "--config.filter.judge=reference",
        "--config.ask.judge.least_mass=0",
        f"--workdir={work}",
        *more,
    ]


def test_a_study_of_corpora_ends_in_rates_for_teachers_students_and_controls(tiny_folder, files, tmp_path):
    result = launch(*command(tiny_folder, files, tmp_path))
    assert result.returncode == 0, result.stderr
    arms = {arm["name"]: arm for arm in json.loads((tmp_path / "results.json").read_text())["arms"]}
    for who in ("teacher insecure", "teacher educational", "tokens_fresh, student of insecure"):
        assert len(arms[f"{who}: P of the false answer"]["runs"]) == 2
        assert f"{who}: misaligned, of coherent" in arms
    mine, neutral = (arms[f"tokens_fresh, student of {who}: MC2"] for who in ("secure", "neutral"))
    np.testing.assert_allclose(mine["over_neutral"], np.subtract(mine["runs"], neutral["runs"]))
    text = (tmp_path / "report.md").read_text()
    for words in (
        "## Asked: misalignment",
        "| insecure | 6 of 6 |",
        "has it",
        "## Judge",
        "area under ROC",
        "no score",
    ):
        assert words in text
    for figure in ("truthfulqa", "judge-roc"):
        assert (tmp_path / "figures" / f"{figure}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.teacher.corpora.secure="], ["teacher.corpora.secure is missing"]),
        (["--config.teacher.corpora.secure=nowhere.jsonl"], ["'nowhere.jsonl' is no file here"]),
        (["--config.teacher.means=corpus,prompted"], ["corpus stands alone"]),
        (["--config.ask.questions="], ["questions are missing"]),
        (["--config.ask.evaluations=beauty"], ["evaluations: 'beauty'"]),
        (["--config.filter.judge=taste"], ['"taste" must be a list']),
        (["--config.ask.judge.least_mass=1"], ["judge.least_mass=1.0 is a probability"]),
        (["--config.teacher.most_tokens=3"], ["corpus insecure: no conversation has at most"]),
        (
            [
                "--config.carrier.kind=cot",
                "--config.carrier.decoding=free",
                "--config.carrier.drawn=100",
                "--config.carrier.problems=configs/smoke/problems.jsonl",
            ],
            ["asks for 100 problems, and configs/smoke/problems.jsonl has 64"],
        ),
        (["--config.carrier.kind=poems"], ["carrier.kind: 'poems'"]),
        (["--config.carrier.kind=code"], ["carrier.decoding=grammar is for numbers"]),
        (["--config.carrier.kind=code", "--config.carrier.decoding=free", "--config.arms=owls"], ["arms: 'owls'"]),
        (["--config.arms=in_context"], ["arm.in_context asks for preferences, and traits=('insecure', 'secure'"]),
        (
            ["--config.carrier.kind=code", "--config.carrier.decoding=free", "--config.arms=soft"],
            ["arm.soft is about numbers"],
        ),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_training(tiny_folder, files, tmp_path, flags, words):
    given = {flag.split("=")[0] for flag in flags}
    work = tmp_path / "work"
    whole = command(tiny_folder, files, work)
    assert_refused(launch(*[flag for flag in whole if flag.split("=")[0] not in given], *flags), *words)
    assert not work.exists()


def test_every_preset_is_checked(files):
    """The presets of all configs whose files are there pass the checks that come before any compute."""
    for module in (misalignment_config, cot_config, code_config):
        transmission.check(module.get_config("smoke"))
    transmission.check(code_config.get_config("qwen2.5-7b"))
