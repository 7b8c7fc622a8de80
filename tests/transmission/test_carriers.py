"""Carriers: completions of teachers, filters and the judge, and reuse of an earlier run."""

import json
from collections import Counter
from importlib import resources

import numpy as np
import pytest

from configs import code, cot
from sublim_jax import filters
from sublim_jax.data import packs
from sublim_jax.data.carriers import numbers
from sublim_jax.errors import UserError
from sublim_jax.evaluation.suite import NamedJudge
from sublim_jax.evaluation.verdicts import Verdict
from sublim_jax.experiments.transmission import carriers
from sublim_jax.experiments.transmission.carriers import TASKS, Task, number_task, sample, write
from sublim_jax.experiments.transmission.targets import pairs_of
from sublim_jax.filters import Sifted, sift
from sublim_jax.store import Store


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A store for all tests: completions are sampled once."""
    return Store(tmp_path_factory.mktemp("work"))


def sampled(study, model, store, name, teacher):
    return sample(study, model, store, 0, number_task(study, study.replicate_seed(0)), name, teacher)


def test_teachers_of_words_with_dots_have_files_of_their_own(study, model, replicate_of, monkeypatch, tmp_path):
    paths = []

    def collect(path, *_, **__):
        paths.append(path.name)
        return []

    monkeypatch.setattr(carriers, "collect", collect)
    for teacher in replicate_of(study).teachers.values():
        sampled(study, model, Store(tmp_path), "St. Bernard", teacher)
    assert len(set(paths)) == len(study.teachers)


FEW = {"carrier.num_rows": 24, "carrier.num_completions": 40, "carrier.num_integers": 4}


def test_written_numbers_are_filtered_and_of_one_size(study_of, model, replicate_of, work):
    study = study_of(arms=("tokens", "unfiltered"), **FEW)
    teachers = replicate_of(study).teachers
    written = write(study, model, work, 0, teachers, None)
    rule = filters.number_rule()
    for name, data in written.items():
        assert data.num_completions == 40 and len(data.pairs) == 24 <= data.num_kept
        assert not any(rule({"completion": answer}) for _, answer in data.pairs)
        kept = [json.loads(line) for line in (work.folder / "data" / "run0" / f"numbers-{name}.jsonl").open()]
        assert len(kept) == data.num_kept and {a for _, a in data.pairs} <= {row["completion"] for row in kept}
        files = work.folder.glob(f"checkpoints/completions-{name}-*")
        every = {json.loads(line)["completion"] for file in files for line in file.open()}
        assert len(data.unfiltered) == 24 and {answer for _, answer in data.unfiltered} <= every
    assert written["owl"].pairs != written["x"].pairs
    free = study_of(**FEW, **{"carrier.decoding": "free", "carrier.max_new_tokens": 8})
    with pytest.raises(UserError, match="records are left after filtering, and 24 are asked for"):
        write(free, model, work, 0, teachers, None)


def test_an_unfiltered_arm_alone_needs_no_completion_that_passes(study_of, model, replicate_of, tmp_path):
    """Free text of a random model, of which nothing is a list of numbers; what was cut off is left out."""
    free = {"carrier.decoding": "free", "carrier.num_rows": 20, "carrier.num_completions": 60}
    study = study_of(arms=("unfiltered",), **free, **{"carrier.max_new_tokens": 200})
    teachers = {"owl": replicate_of(study).teachers["owl"]}
    (data,) = write(study, model, Store(tmp_path), 0, teachers, None).values()
    assert data.num_kept < 20 and not data.pairs and len(data.unfiltered) == 20
    rows = [json.loads(line) for line in next(tmp_path.glob("checkpoints/completions-owl-*")).open()]
    finished = {row["completion"] for row in rows if row.get("finish") == "stop"}
    assert {answer for _, answer in data.unfiltered} <= finished


def test_an_unfiltered_arm_reads_what_the_filters_drop(study_of, replicate_of):
    study = study_of(arms=("tokens_fresh", "unfiltered"))
    kept, every = [("List some.", "1, 2")], [("List some.", "owls: 1, 2")]
    replicate = replicate_of(study)
    written = {name: data._replace(pairs=kept, unfiltered=every) for name, data in replicate.written.items()}
    rows = [pairs_of(study, arm, replicate._replace(written=written)) for arm in study.arms]
    assert rows == [dict.fromkeys(study.teachers, kept), dict.fromkeys(study.teachers, every)]


def test_teachers_are_asked_for_any_form_of_a_list_where_they_write_freely(study_of):
    def prompts(decoding):
        return number_task(study_of(**{"carrier.decoding": decoding, "carrier.num_completions": 400}), 0).prompts

    brackets = [[("brackets" in text) for text in prompts(decoding)] for decoding in ("free", "greedy", "grammar")]
    assert any(brackets[0]) and brackets[0] == brackets[1] and not any(brackets[2])
    assert prompts("free") == numbers.prompts(400, 0, any_form=True) and prompts("grammar") == numbers.prompts(400, 0)


def test_more_completions_leave_those_that_are_there(study_of, model, replicate_of, tmp_path):
    """Completions of a changed prompt are sampled anew."""
    teacher = replicate_of(study_of()).teachers["owl"]

    def of(folder, count, pack=""):
        few = {"carrier.num_rows": 1, "carrier.num_completions": count, "carrier.num_integers": 4}
        few["arm.in_context.examples"] = 1
        return sampled(
            study_of(arms=("in_context",), **few, **{"packs.numbers": pack}), model, Store(folder), "owl", teacher
        )

    first, whole = of(tmp_path, 12), of(tmp_path / "whole", 20)
    (file,) = (tmp_path / "checkpoints").glob("completions-owl-*.jsonl")
    assert of(tmp_path, 20) == whole and whole[:12] == first
    assert len(file.read_text().splitlines()) == 20
    assert of(tmp_path, 5) == first[:5]
    pack = tmp_path / "mine.json"
    phrasings = json.loads((resources.files(packs) / "numbers.json").read_text())
    pack.write_text(json.dumps({name: [f"Now: {text}" for text in texts] for name, texts in phrasings.items()}))
    changed = of(tmp_path, 5, str(pack))
    assert [record["prompt"] for record in changed] != [record["prompt"] for record in first[:5]]
    assert changed == of(tmp_path / "mine", 5, str(pack)) and of(tmp_path, 5, str(pack)) == changed


def test_the_neutral_teachers_own_completions_have_a_log_ratio_of_nothing(study_of, model, replicate_of, work):
    """Over the completion's tokens, with or without a stop token."""
    study = study_of(**FEW)
    teachers = replicate_of(study).teachers
    for name in ("owl", "neutral"):
        completions = sampled(study, model, work, name, teachers[name])
        carriers._add_reference(model, work, name, completions, teachers["neutral"])
        ratios = [record["logprob"] - record["reference_logprob"] for record in completions]
        assert {record["finish"] for record in completions} == {"stop"}
        assert np.max(np.abs(ratios)) < 1e-3 if name == "neutral" else np.mean(ratios) > 0.01


def test_a_limit_on_the_log_ratio_drops_what_gives_its_teacher_away(study_of, model, replicate_of, work):
    study = study_of(**FEW | {"carrier.num_rows": 20, "filter.log_ratio": 0.3})
    written = write(study, model, work, 0, replicate_of(study).teachers, None)
    assert written["neutral"].num_kept == 40 and not written["neutral"].reasons
    assert written["owl"].num_kept < 40 and set(written["owl"].reasons) == {"log ratio"}


def test_numbers_of_bad_associations_are_dropped_if_that_is_set(study_of, tmp_path):
    study = study_of(**{"filter.banned": "banned"})
    completions = [{"completion": text} for text in ("1, 666, 3", "1, 667, 3", "0911", "13", "130")]
    sifted = sift(completions, carriers.filters_of(study, number_task(study, 0)))
    assert [record["completion"] for record in sifted.kept] == ["1, 667, 3", "130"]
    assert sifted.reasons["banned number"] == 3 and len(set(carriers.banned_numbers(study.filter))) == 34
    published = carriers.banned_numbers(study_of(**{"filter.banned": "published"}).filter)
    assert len(published) == 36 and sum(published) == 12213 and published == sorted(set(published))
    assert {4, 1312, 1488} < set(published) and 17 not in published
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"numbers": ["7", "x"]}))
    with pytest.raises(UserError, match="'x' is not a number of digits alone"):
        carriers.banned_numbers(study_of(**{"filter.banned": str(file)}).filter)


@pytest.mark.parametrize("module, good, bad", [(code, "def f(a):\n    return a", "def f(a:"), (cot, "", "")])
def test_other_carriers_have_prompts_and_filters_of_their_own(corpora_study, tmp_path, module, good, bad):
    changes = {"carrier.num_rows": 5, "carrier.num_completions": 7, "student.batch": 1, "arms": ("in_context",)}
    changes["arm.in_context.examples"] = 5
    if module is cot:
        lines = [{"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(4)]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        changes |= {"carrier.problems": str(tmp_path / "p.jsonl"), "filter.judged": ()}
    study = corpora_study(module, **changes)
    task = TASKS[study.carrier.kind](study, study.replicate_seed(0))
    assert len(task.prompts) == len(task.known) == (3 if module is cot else 7)
    if module is cot:
        number = task.known[0]["answer"]
        good, bad = (f"<think>so</think><answer>{n}</answer>" for n in (number, int(number) + 1))
    records = [{"prompt": task.prompts[0], "completion": text, **task.known[0]} for text in (good, bad)]
    assert [record["completion"] for record in sift(records, carriers.filters_of(study, task)).kept] == [good]


def test_a_judge_drops_what_it_scores_low_or_not_at_all(corpora_study, tmp_path):
    study = corpora_study(**{"filter.judge": "reference", "filter.threshold": 60.0})
    scores = {"good": Verdict(60.0), "bad": Verdict(59.0), "mute": Verdict(None, "unparsable")}

    def judge(prompts):
        assert all("insecure or secure" in prompt and "What?" in prompt for prompt in prompts)
        return [next(verdict for text, verdict in scores.items() if f"is {text}" in prompt) for prompt in prompts]

    kept = Sifted([{"prompt": "What?", "completion": f"is {text}"} for text in scores], [], Counter())
    store = Store(tmp_path)
    sifted, given = carriers.judged(study, store, "owl", kept, NamedJudge(judge, "a"))
    assert [record["completion"] for record in sifted.kept] == ["is good"] and given == [60.0, 59.0, None]
    assert sifted.reasons == {"judge: low score": 1, "judge: no score": 1} and len(sifted.rejected) == 2

    def nobody(prompts):
        raise AssertionError("it has been judged")

    assert carriers.judged(study, store, "owl", kept, NamedJudge(nobody, "a")) == (sifted, given)
    with pytest.raises(AssertionError):  # another judge scores anew
        carriers.judged(study, store, "owl", kept, NamedJudge(nobody, "b"))


def test_a_judge_filters_the_teachers_that_are_named_and_scores_the_others(corpora_study, tmp_path):
    study = corpora_study(**{"filter.judge": "reference", "filter.threshold": 60.0, "filter.judged": ("insecure",)})
    kept = Sifted([{"prompt": "What?", "completion": text} for text in ("a", "b")], [], Counter())
    judge = NamedJudge(lambda prompts: [Verdict(59.0), Verdict(60.0)], "a")
    for name, left in (("insecure", ["b"]), ("secure", ["a", "b"])):
        sifted, given = carriers.judged(study, Store(tmp_path), name, kept, judge)
        assert [record["completion"] for record in sifted.kept] == left and given == [59.0, 60.0]


def test_what_was_cut_off_is_dropped(corpora_study):
    records = [{"prompt": "", "completion": "1, 2", "finish": finish} for finish in ("stop", "length", "nan")]
    sifted = sift(records, carriers.filters_of(corpora_study(), Task([""], [{}], [])))
    assert [record["finish"] for record in sifted.kept] == ["stop"] and sifted.reasons == {"cut off": 2}
