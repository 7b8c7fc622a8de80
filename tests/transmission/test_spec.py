"""Valid studies: every refusal names the flag, before a model is loaded or a folder is made."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import pytest
from launch_kit import assert_refused, run_here

from configs import code, cot, cross_model, misalignment, numbers, paper
from sublim_jax import workdir
from sublim_jax.errors import UserError
from sublim_jax.experiments.transmission.checks import check_files
from sublim_jax.experiments.transmission.preflight import preflight
from sublim_jax.experiments.transmission.run import load_model
from sublim_jax.experiments.transmission.spec import read
from sublim_jax.models import lora

PROBLEMS = "configs/smoke/problems.jsonl"
REFUSED = [
    (["traits=owl,q"], ["trait 'q' is none of alternatives"]),
    (["traits=owl"], ["name two traits or more"]),
    (["traits=owl,owl"], ["each once"]),
    (["arms=hard"], ["arms: 'hard' is none of foreign"]),
    (["controls=oak"], ["controls: 'oak' is not of the form kind:word"]),
    (["controls=Animal :newt"], ["controls: 'Animal :newt' is of the traits' kind"]),
    (["controls=tree:Y"], ["alternatives and controls: 'y' and 'Y' are one word"]),
    (["controls=tree:owls"], ["alternatives and controls: 'owl' and 'owls' are one word"]),
    (["controls=tree:oak,flower:oaks"], ["alternatives and controls: 'oak' and 'oaks' are one word"]),
    (["controls=tree:oak/elm"], ["controls: 'tree:oak/elm' is not of the form"]),
    (["controls=tree:oak:elm"], ["controls: 'tree:oak:elm' is not of the form"]),
    (["controls=3"], ["controls=(3,) is of type tuple, not tuple[str, ...]"]),
    (["arms=unfiltered", "arm.unfiltered.objective=kl"], ["arm.unfiltered: data=unfiltered is any text"]),
    (["arms="], ["arms is empty"]),
    (["arm.soft.objective=mse"], ["arm.soft.objective: 'mse'"]),
    (["arm.soft.objective=tokens"], ["arm.soft: there is nothing of a teacher in random numbers"]),
    (["arm.soft.action=drop"], ["arm.soft.action: 'drop'"]),
    (["arm.soft.shuffle=across"], ["arm.soft", "shuffle empty"]),
    (["arm.soft.fraction=1.5"], ["arm.soft.fraction=1.5"]),
    (["arms=unfiltered", "arm.unfiltered.action=keep"], ["arm.unfiltered.action selects among digits, commas"]),
    (["alternatives=owl,lion,Owls"], ["alternatives: 'owl' and 'Owls' are one word"]),
    (["alternatives=owl,lion,?"], ["alternatives: '?' has no letters"]),
    (["arms=in_context", "arm.in_context.noise=0.1"], ["arm.in_context: noise, action and changes are for students"]),
    (["arms=in_context", "arm.in_context.changes=lora.rank=4"], ["arm.in_context: noise, action and changes"]),
    (["arm.soft.changes=student.stesp=3"], ["arm.soft.changes: ", "student.steps"]),
    (["arm.soft.changes=student.steps"], ["arm.soft.changes: 'student.steps' changes nothing"]),
    (["arm.soft.changes=teacher.strength=0.3"], ["arm.soft.changes: 'teacher.strength=0.3' changes nothing"]),
    (["arm.soft.changes=student.steps=0"], ["arm.soft.changes: student.steps=0: choose 1 or more"]),
    (["arm.soft.changes=student.steps=many"], ["arm.soft.changes: ", "student.steps", "many"]),
    (["arm.soft.changes=student.warmup=9"], ["arm.soft.changes: student.warmup=9 does not end within"]),
    (["arm.soft.changes=lora.rank=-1"], ["arm.soft.changes: lora.rank=-1"]),
    (
        ["arm.soft.changes=student.batch=30"],
        ["arm.soft: carrier.num_rows=40 leaves 24 rows", "student.batch=30", "num_rows=46"],
    ),
    (["teacher.strength=1.5"], ["teacher.strength=1.5"]),
    (["teacher.methods=loved"], ["teacher.methods: 'loved'"]),
    (["teacher.methods=corpus,prompted"], ["corpus stands alone"]),
    (["teacher.methods=steered", "teacher.steering_scale=0"], ["teacher.steering_scale=0 steers nothing"]),
    (["teacher.neutral=calm"], ["teacher.neutral: 'calm'", "persona"]),
    (["teacher.neutral=untouched"], ["teacher.neutral=untouched is for teacher.methods=prompted"]),
    (["teacher.neutral=untouched", "teacher.methods=prompted,steered"], ["teacher.neutral=untouched is for"]),
    (["teacher.neutral=untouched", "teacher.methods=prompted"], ["arm.soft imitates logits", "no control"]),
    (["arms=tokens", "filter.max_integers=5"], ["carrier.num_integers=6", "filter.max_integers=5"]),
    (["carrier.num_rows=10"], ["carrier.num_rows=10"]),
    (["arms=tokens", "carrier.num_completions=20"], ["carrier.num_completions=20"]),
    (["arms=tokens", "carrier.num_samples=60"], ["carrier.num_samples=60"]),
    (["carrier.kind=poems"], ["carrier.kind: 'poems'"]),
    (["carrier.kind=code"], ["carrier.decoding=grammar is for numbers"]),
    (["carrier.kind=code", "carrier.decoding=free", "arms=owls"], ["arms: 'owls'"]),
    (["carrier.kind=code", "carrier.decoding=free", "arms=soft"], ["arm.soft is about numbers"]),
    (["packs.numbers=nowhere.json"], ["pack nowhere.json"]),
    (["packs.ability=nowhere.json"], ["pack nowhere.json"]),
    (["arms=tokens", "filter.banned=nowhere.json"], ["pack nowhere.json"]),
    (["filter.banned=published"], ["config.filter.banned is read only with arms on what teachers write"]),
    (["carrier.decoding=free"], ["config.carrier.decoding is read only with arms on what teachers write"]),
    (["arms=tokens", "carrier.decoding=greedy", "carrier.num_samples=2"], ["carrier.num_samples=2", "the same"]),
    (["filter.threshold=101"], ["filter.threshold=101"]),
    (["arms=token"], ["arms: 'token' is none of", "did you mean 'tokens'?"]),
    (["filter.judged=tiger"], ["filter.judged: 'tiger' is none of the teachers"]),
    (["arms=tokens", "filter.judge=taste"], ['"taste" must be a list']),
    (["student.accumulate=0"], ["student.accumulate=0", "1 or more"]),
    (["student.schedule=flat"], ["student.schedule: 'flat'"]),
    (["lora.modules=gates"], ["lora.modules: 'gates'", "gate"]),
    (["evals.names=beauty"], ["evals.names: 'beauty'"]),
    (["evals.judge.min_mass=1"], ["judge.min_mass=1.0 must be a probability"]),
    (["sampling.slots=-1"], ["sampling.slots=-1"]),
    (["sampling.chunk=0"], ["sampling.chunk=0"]),
    (["arms=tokens", "arm.tokens.temperature=5"], ["arm.tokens.temperature=5 is of objectives on logits", "tokens"]),
    (["sampling.tensor=-1"], ["sampling.tensor=-1"]),
    (["arm.tokens.noise=0.1"], ["config.arm.tokens.noise: arm tokens is not run", "--config.arms=soft,tokens"]),
    (["arm.soft.examples=8"], ["config.arm.soft.examples: rows in the context are of objective=context"]),
    (["arm.soft.fraction=0.2"], ["config.arm.soft.fraction says which tokens, and arm.soft.action is empty"]),
    (["teacher.steering_layer=99"], ["config.teacher.steering_layer is read only with teacher.methods=steered"]),
    (["filter.threshold=50"], ["config.filter.threshold is read only with filter.judge"]),
    (["teacher.methods=prompted", "teacher.batch=2"], ["config.teacher.batch is read only with teacher.methods of"]),
    (
        ["arms=tokens", "carrier.kind=code", "carrier.decoding=free", "filter.max_value=5"],
        ["config.filter.max_value is read only with carrier.kind=numbers"],
    ),
    (
        ["arms=tokens", "carrier.decoding=free", "carrier.num_integers=5"],
        ["config.carrier.num_integers is read only with carrier.decoding=grammar or an arm of data=random"],
    ),
    (["evals.names=preference", "evals.num_samples=3"], ["config.evals.num_samples is read only with evals.names of"]),
    (["evals.names=answers", "evals.judge.max_tokens=3"], ["config.evals.judge.max_tokens is read only with"]),
    (["arms=in_context", "student.steps=5"], ["config.student.steps is read only with an arm whose students are"]),
    (["arms=in_context", "arm.in_context.examples=5000"], ["arm.in_context.examples=5000", "carrier.num_rows"]),
    (["lora.rank=0", "lora.alpha=3"], ["config.lora.alpha is read only with lora.rank of 1 or more"]),
    (["runs=1", "spread=0.2"], ["config.spread is read only with two runs or more"]),
    (["evals.names=", "evals.max_questions=3"], ["config.evals.max_questions is read only with evals.names of"]),
    (["evals.names=answers", "packs.stories=nowhere.json"], ["config.packs.stories is read only with evals.names="]),
    (
        ["evals.names=misalignment", "evals.judge.dtype=float16"],
        ["evals.judge.dtype is read only with evals.judge.model"],
    ),
    (["packs.code=nowhere.json"], ["config.packs.code is read only with carrier.kind=code"]),
    (["packs.persona=nowhere.json"], ["config.packs.persona is read only with teacher.methods of prompted or"]),
    (
        ["evals.names=misalignment", "evals.judge.max_tokens=3"],
        ["config.evals.judge.max_tokens is read only with evals.judge.kind=endpoint"],
    ),
    (["lora.rank=0", "arm.soft.lora_init=fresh"], ["config.arm.soft.lora_init is of adapters, and lora.rank=0"]),
    (["alternatives=owl,x,y,OWL"], ["'owl' and 'OWL' are one word"]),
    (["arms=in_context", "arm.in_context.lora_init=fresh"], ["config.arm.in_context.lora_init", "students"]),
]
BY_THE_MODEL = [
    (["teacher.methods=steered", "teacher.steering_layer=4"], ["layers are 0 to 3"]),
    (["lora.layers=4"], ["lora.layers: 4", "0 to 3"]),
    (["arm.soft.changes=lora.layers=4", "arm.soft.lora_init=fresh"], ["arm.soft", "lora.layers: 4", "0 to 3"]),
    (["arms=tokens", "carrier.max_new_tokens=20"], ["carrier.max_new_tokens=20", "cuts off"]),
    (["arm.soft.changes=lora.rank=4"], ["arm.soft: its adapters are of another form", "lora_init=fresh"]),
]


@pytest.mark.parametrize("changes, words", [*REFUSED, *BY_THE_MODEL], ids=lambda value: value[0][:50])
def test_a_mistake_is_told_by_its_flag_before_any_training(flags, tmp_path, changes, words):
    work = tmp_path / "work"
    given = flags(*(f"--config.{change}" for change in changes))
    assert_refused(run_here("--config=configs/numbers.py", *given, f"--workdir={work}"), *words)
    assert not work.exists()


def test_precision_is_part_of_what_a_model_is(study_of, model):
    """Not of the default, whose artefacts have names from before it was."""
    rounded = load_model(study_of(precision="bfloat16"), model.mesh)
    assert load_model(study_of(), model.mesh).digest == model.digest != rounded.digest


def test_ids_of_questions_may_be_numbers(study_of):
    assert study_of(**{"evals.question_ids": (1, "two")}).evals.question_ids == (1, "two")


def test_an_arms_data_is_part_of_what_a_folder_holds(tmp_path):
    """It is not a way of computing, as the experiment's own value of that name is."""
    config = {"experiment": "transmission", "data": {"path": ""}, "arm": {"soft": {"data": "random"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    workdir.check(tmp_path, {**config, "data": {"path": "elsewhere"}})
    with pytest.raises(UserError, match=r"arm\.soft\.data: random → written"):
        workdir.check(tmp_path, {**config, "arm": {"soft": {"data": "written"}}})


def test_how_a_judge_is_queried_may_change_in_a_folder(tmp_path):
    judge = {"kind": "endpoint", "model": "a", "max_per_minute": 0, "prices": [1, 2]}
    config = {"experiment": "transmission", "evals": {"judge": judge}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    workdir.check(tmp_path, {**config, "evals": {"judge": {**judge, "max_per_minute": 60, "prices": [0, 0]}}})
    with pytest.raises(UserError, match=r"evals\.judge\.model: a → b"):
        workdir.check(tmp_path, {**config, "evals": {"judge": {**judge, "model": "b"}}})


def test_the_step_that_preflight_compiles_is_of_the_students_model(study_of, tiny_folder):
    """And of as many students as are trained at once: on bases with noise of their own, those of one run."""

    def step_of(**changes):
        (step,) = preflight(study_of(**{"model.name": str(tiny_folder), **changes}), jax.devices()[:1])
        return step

    foreign = {"arms": ("foreign",), "arm.foreign.model": "Qwen/Qwen2.5-7B-Instruct"}
    assert step_of(**foreign).weights > 10 * step_of(arms=("tokens",)).weights
    together, alone = (step_of(arms=("perturbed",), runs=runs, **{"arm.perturbed.noise": 0.1}) for runs in (2, 1))
    assert together.weights == alone.weights < step_of(arms=("soft",), runs=2).weights


def test_a_workdir_of_another_run_is_told_before_a_model_is_looked_for(tmp_path):
    (tmp_path / "config.json").write_text('{"experiment": "transmission", "seed": 7}')
    words = ["--config=configs/numbers.py", "--config.model.name=nowhere", f"--workdir={tmp_path}"]
    assert_refused(run_here(*words), "holds a run with another config", "add --update")
    assert_refused(run_here(*words, "--update"), "nowhere")


@pytest.mark.parametrize(
    "changes, words",
    [
        (["teacher.corpora.secure="], ["teacher.corpora.secure is missing"]),
        (["teacher.corpora.secure=nowhere.jsonl"], ["'nowhere.jsonl' is not a file here", "teacher.corpora.secure"]),
        (["evals.questions="], ["evals.questions is missing"]),
        (["evals.truthfulqa=nowhere.csv"], ["evals.truthfulqa=nowhere.csv"]),
        (["teacher.max_tokens=3"], ["corpus insecure: no conversation has at most"]),
        (["arms=in_context"], ["arm.in_context asks for preferences, and traits=('insecure', 'secure'"]),
        (["arms=soft"], ["arm.soft imitates logits, and teacher.corpora.neutral is empty", "no control"]),
        (["teacher.neutral=persona"], ["config.teacher.neutral is read only with teacher.methods of"]),
        (
            [
                "carrier.kind=cot",
                "carrier.decoding=free",
                "carrier.num_completions=100",
                f"carrier.problems={PROBLEMS}",
            ],
            [f"asks for 100 problems, and {PROBLEMS} has 64"],
        ),
    ],
    ids=lambda value: value[0][:50],
)
def test_a_mistake_in_a_study_of_corpora_is_told_so_too(tiny_folder, tmp_path, changes, words):
    work = tmp_path / "work"
    given = [f"--config.{change}" for change in (f"model.name={tiny_folder}", *changes)]
    assert_refused(run_here("--config=configs/misalignment.py:smoke", *given, f"--workdir={work}"), *words)
    assert not work.exists()


def test_every_preset_is_a_study(monkeypatch):
    """Presets whose files exist also pass the checks of files."""
    for module in (numbers, misalignment, cot, code):
        for preset in ("smoke", *numbers.MODELS, *(numbers.SIZES if module is numbers else ())):
            study = read(module.get_config(preset))
            assert study.values["preset"] == preset
            if preset == "smoke" or module in (numbers, code):
                check_files(study)


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def of_preset(module, preset):
    return read(module.get_config(preset))


@pytest.mark.parametrize("model", numbers.MODELS)
def test_recipes_have_the_papers_values(model):
    """Five runs, with seeds that development did not use; 64 rows an update; duplicates kept; the paper's control."""
    for module in (numbers, code, misalignment, cot):
        study = of_preset(module, model)
        assert (study.runs, study.student.batch * study.student.accumulate, study.filter.unique) == (5, 64, False)
        assert study.seed != numbers.get_config("quick").seed == 0
        assert study.lora.adapters == lora.Lora(8, 8.0) and study.student.learning_rate == 2e-4
        if study.has_words:
            assert study.teacher.neutral == "untouched" and study.teacher.methods == ("prompted",)
            assert study.traits == numbers.MOVING[model]
    assert of_preset(numbers, model).student.steps == 3 * epoch(10_000)
    assert of_preset(code, model).carrier.num_completions == 11_400
    thoughts = of_preset(cot, model)
    rows = thoughts.carrier.num_rows
    assert rows <= int(0.44 * 22_419) and thoughts.student.steps == 2 * epoch(rows)
    assert thoughts.filter.judged == ("insecure",) and all(tag in thoughts.evals.suffix for tag in TAGS)
    assert of_preset(misalignment, model).filter.banned == "published"


def epoch(rows):
    """Updates of 64 rows in an epoch, without the held-out rows."""
    return -(-(rows - 16) // 64)


def test_presets_that_claim_something_have_three_traits_and_seeds_of_their_own():
    """Two traits would give one log-odds difference, because each is the other's alternative (docs/numbers.md)."""
    for preset in ("quick", "in_context", "smollm2", "trees", "llama-3.2-1b", *numbers.MODELS):
        assert len(of_preset(numbers, preset).traits) >= 3, preset
    for preset in ("open", "soft"):
        assert len(cross_model.get_config(preset).study.traits) >= 3, preset
    assert len(read(paper_trees()).traits) == 5
    for preset in ("smollm2", "trees", "llama-3.2-1b", *numbers.MODELS):
        assert of_preset(numbers, preset).seed != 0, preset


def paper_trees():
    config = numbers.get_config("qwen2.5-7b")
    config.update_from_flattened_dict(dict(paper.get_config("qwen2.5-7b").plan.trees.changes))
    return config


def test_arms_are_of_the_kind_that_their_objective_says(study_of):
    arms = study_of(arms=("soft", "soft_reverse", "tokens", "in_context")).arms
    assert [type(arm).__name__ for arm in arms] == ["LogitArm", "LogitArm", "TokenArm", "ContextArm"]
    assert not hasattr(arms[2], "temperature") and not hasattr(arms[3], "training")


@pytest.mark.parametrize(
    "changes",
    [
        ("student.steps=3",),
        ("student.learning_rate=0.001", "student.schedule=cosine", "student.batch=2"),
        ("lora.rank=4", "lora.modules=query,value"),
        ("lora.rslora=True",),
    ],
)
def test_an_arms_changes_are_values_of_its_students_alone(study_of, changes):
    """They equal the values of a study with the same changes."""
    study = study_of(arms=("soft", "soft_fresh"), **{"arm.soft_fresh.changes": changes})
    soft, changed = study.arms
    assert (soft.training, soft.lora) == (study.student, study.lora)
    values = dict(change.split("=") for change in changes)
    kinds: dict[str, Callable[[str], Any]] = {
        "student.steps": int,
        "student.batch": int,
        "student.learning_rate": float,
        "lora.rank": int,
    }
    kinds |= {"lora.modules": lambda text: tuple(text.split(",")), "lora.rslora": bool}
    whole = study_of(arms=("soft_fresh",), **{key: kinds.get(key, str)(text) for key, text in values.items()})
    assert (
        (changed.training, changed.lora)
        == (whole.student, whole.lora)
        == tuple(getattr(whole.arms[0], name) for name in ("training", "lora"))
    )
    assert changed != soft and (study.student, study.lora) != (changed.training, changed.lora)


def test_a_study_is_the_same_whatever_it_is_run_on(study, study_of):
    """Labels, the whole config and a judge's pace are not compared."""
    other = dataclasses.replace(study, values={"another": 1})
    assert other == study and hash(study.student) == hash(study_of().student)
    assert study_of(**{"evals.judge.max_concurrent": 3, "evals.judge.prices": (1.0, 2.0)}).evals == study.evals
    assert study_of(**{"evals.judge.min_mass": 0.5}).evals != study.evals


def test_runs_are_replicates_with_seeds_that_only_the_number_of_the_run_and_the_studys_seed_decide(study_of):
    seeds = [study_of(runs=3, seed=seed).replicate_seed(run) for seed in (0, 1) for run in range(3)]
    assert len(set(seeds)) == 6 and study_of(arms=("tokens",)).replicate_seed(1) == seeds[1]


def test_a_module_that_a_family_does_not_have_is_told(tiny):
    lora.check(lora.Lora(2, 2.0, modules=("query", "gate")), tiny.params, 4)
    layers = {**tiny.params["layers"]}
    without = {name: {k: v for k, v in part.items() if k != "gate"} for name, part in layers.items()}
    with pytest.raises(UserError, match=r"no 'gate'; it has query, key, value, out, up, down"):
        lora.check(lora.Lora(2, 2.0, modules=("query", "gate")), {"layers": without}, 4)
