"""Sampling jobs from the command line: input and output files, stop and resume."""

import json
import shutil
import signal
import time
from functools import partial

import pytest
from launch_kit import finish, run_here, start, start_two

from configs import sample as sample_config
from sublim_jax import weights
from sublim_jax.data import chat
from sublim_jax.data.prompts import read as read_prompts
from sublim_jax.errors import UserError
from sublim_jax.experiments.tools import sample
from sublim_jax.sampling.samplers import Sampler

CONFIG = "--config=configs/sample.py"


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    records = [{"prompt": f"Number {i}?", "id": i} for i in range(30)]
    records.append({"messages": [{"role": "user", "content": "Count."}]})
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def arguments(tiny_folder, prompts, work, *more):
    return [
        CONFIG,
        f"--config.model.name={tiny_folder}",
        f"--config.prompts={prompts}",
        "--config.slots=4",
        f"--workdir={work}",
        *more,
    ]


def test_prompts_become_samples_a_table_a_figure_and_numbers(tiny_folder, prompts, tmp_path, command):
    work = tmp_path / "work"
    more = ["--config.num_samples=2", "--config.max_new_tokens=16", "--config.constraint.kind=numbers"]
    code, printed, errors = command(*arguments(tiny_folder, prompts, work, *more))
    assert code == 0, errors
    assert "slots of" in printed and "tokens in front of all" in printed
    lines = [json.loads(line) for line in (work / "samples.jsonl").read_text().splitlines()]
    assert [(line["index"], line["sample"]) for line in lines] == [(i, j) for i in range(31) for j in range(2)]
    assert lines[6]["prompt"] == "Number 3?" and lines[6]["id"] == 3 and "messages" in lines[-1]
    assert all(set(line["completion"]) <= set("0123456789, ") for line in lines)
    results = json.loads((work / "results.json").read_text())
    assert len(results["arms"][0]["runs"]) == 62
    assert (work / "figures" / "lengths.png").stat().st_size > 5000
    before = (work / "report.md").read_text()
    assert "| stop |" in before
    assert command("--report", f"--workdir={work}")[0] == 0
    assert (work / "report.md").read_text() == before
    assert json.loads((work / "results.json").read_text()) == results


def test_more_samples_of_the_same_prompts_go_on_from_those_that_are_there(tiny_folder, prompts, tmp_path, command):
    run = arguments(tiny_folder, prompts, tmp_path / "work", "--config.max_new_tokens=8")
    assert command(*run)[0] == 0
    first = [json.loads(line) for line in (tmp_path / "work" / "samples.jsonl").open()]
    code, printed, _ = command(*run, "--config.num_samples=2", "--update")
    assert code == 0 and "slots of" not in printed  # the message at its start
    again = [json.loads(line) for line in (tmp_path / "work" / "samples.jsonl").open()]
    assert [record for record in again if record["sample"] == 0] == first and len(again) == 2 * len(first)


def test_what_is_asked_for_is_how_tokens_are_drawn():
    config = sample_config.get_config()
    config.update({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "prompts": "x"})
    assert sample.read(config).sampler() == Sampler(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)


def test_a_stopped_job_goes_on_and_ends_with_the_same_file(tiny_folder, prompts, tmp_path):
    more = ["--config.max_new_tokens=300", "--config.num_samples=2", "--config.chat=False"]
    prompts.write_text("".join(json.dumps({"prompt": f"Number {i}?"}) + "\n" for i in range(30)))
    assert run_here(*arguments(tiny_folder, prompts, tmp_path / "whole", *more)).returncode == 0
    work = tmp_path / "work"
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        process = start(*arguments(tiny_folder, prompts, work, *more))
        before = written(work)
        while written(work) < before + 5 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        finish(process, code)
    between = written(work)
    assert 10 <= between < 60
    assert run_here(*arguments(tiny_folder, prompts, work, *more)).returncode == 0
    assert (work / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


def test_samples_by_two_processes_are_those_of_one(tiny_folder, prompts, tmp_path):
    """The table, figure and results of the samples exist too."""
    run = partial(arguments, tiny_folder, prompts)
    both = start_two(*run(tmp_path / "two", "--config.max_new_tokens=8"))
    assert run_here(*run(tmp_path / "one", "--config.max_new_tokens=8")).returncode == 0
    for process in both:
        finish(process)
    single, pair = tmp_path / "one", tmp_path / "two"
    assert (pair / "samples.jsonl").read_bytes() == (single / "samples.jsonl").read_bytes()
    assert (pair / "report.md").exists() and {f.name for f in pair.iterdir()} == {f.name for f in single.iterdir()}


def written(work):
    return sum(file.read_text().count("\n") for file in work.glob("checkpoints/samples*.jsonl"))


@pytest.mark.parametrize(
    "more, words",
    [
        (["--config.prompts="], ["--config.prompts is missing"]),
        (["--config.prompts=nowhere.txt"], ["there is no such file"]),
        (["--config.temperature=-1.0"], ["temperature=-1.0"]),
        (["--config.constraint.kind=poem"], ["constraint.kind='poem'", "numbers"]),
        (["--config.model.dtype=int4"], ["dtype='int4'", "bfloat16"]),
        (["--config.constraint.choices=yes,no"], ["constraint.choices is read only with constraint.kind=choice"]),
        (["--config.constraint.kind=numbers", "--config.constraint.choices=yes,no"], ["constraint.kind=choice"]),
        (["--config.constraint.max_integers=5"], ["constraint.kind=numbers"]),
        (["--config.temperature=0", "--config.num_samples=4"], ["num_samples=4", "would be the same"]),
        (["--config.temperature=0", "--config.top_k=5"], ["top_k is not read with temperature=0"]),
        (["--config.max_new_tokens=9000"], ["context is 512", "max_new_tokens"]),
        (["--config.mesh.tensor=3", "--config.mesh.fsdp=1"], ["does not fit"]),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_written(tiny_folder, prompts, tmp_path, refused, more, words):
    work = tmp_path / "work"
    line = refused(*arguments(tiny_folder, prompts, work, *more))
    assert all(word in line for word in words), line
    assert not work.exists()


@pytest.mark.parametrize(
    "line, words",
    [
        ("{broken", "line 2: not JSON"),
        ('{"text": "x"}', 'line 2: an object with "prompt"'),
        ('{"messages": []}', 'line 2: an object with "prompt" or "messages"'),
    ],
)
def test_a_broken_line_of_the_prompts_is_named(tiny_folder, tmp_path, refused, line, words):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n' + line + "\n")
    assert words in refused(*arguments(tiny_folder, file, tmp_path / "work"))


def test_a_model_without_a_chat_template_is_told(tiny_folder, prompts, tmp_path, refused):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    line = refused(*arguments(tmp_path / "model", prompts, tmp_path / "work"))
    assert "has no chat template" in line and "--config.chat=False" in line


def test_the_decode_step_of_a_7b_model_is_compiled_without_the_model(command):
    code, printed, errors = command(f"{CONFIG}:qwen2.5-7b", "--preflight=local", "--config.mesh.tensor=1")
    assert code == 0, errors
    assert "decoding, 128 slots a device" in printed and "1.00 × the model's own" in printed


def prompts_file(folder, *records):
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def spec_for(prompts, system=""):
    config = sample_config.get_config()
    config.prompts, config.system = prompts, system
    return sample.read(config)


def test_a_prompt_of_parts_is_its_text(tiny, tmp_path):
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "tree."}]
    file = prompts_file(
        tmp_path,
        {"messages": [{"role": "user", "content": parts}], "id": 7},
        {"messages": [{"role": "user", "content": "Name a tree."}]},
        {"prompt": "Name a tree.", "messages": None},
    )
    inputs = read_prompts(file)
    assert inputs[0] == {"messages": [{"role": "user", "content": "Name a tree."}], "id": 7}
    prefix, prompts = sample.tokens_of(spec_for(file), tiny, inputs)
    assert [prefix + prompt for prompt in prompts] == [chat.prompt(tiny.tokenizer, "Name a tree.")] * 3


@pytest.mark.parametrize(
    "record, words",
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 1, part 1: type 'image_url'"),
        ({"messages": [{"role": "user", "content": None}]}, 'message 1: "role" and "content" must be texts'),
        ({"messages": [{"role": "user", "content": 7}]}, 'message 1: "role" and "content" must be texts'),
        ({"messages": [{"content": "x"}]}, 'message 1: "role" and "content" must be texts'),
        ({"messages": ["x"]}, 'message 1: "role" and "content" must be texts'),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, '"tool_calls" is not supported'),
        ({"messages": "x"}, '"messages" must be a list of messages'),
        ({"prompt": ["x"]}, 'an object with "prompt" or "messages" is needed'),
    ],
)
def test_a_prompt_that_is_none_is_told_by_its_line(tmp_path, record, words):
    with pytest.raises(UserError) as error:
        read_prompts(prompts_file(tmp_path, {"prompt": "x"}, record))
    assert "line 2" in str(error.value) and words in str(error.value)


def test_a_system_prompt_that_the_template_does_not_take_is_folded_and_the_report_says_so(tiny_folder, tmp_path):
    model = weights.load(tiny_folder)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with_system = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]}
    for record, system, expected in (
        ({"prompt": "Which?"}, "Love owls.", "Love owls.\n\nWhich?"),
        (with_system, "Love owls.", "Be brief.\n\nWhich?"),
        (with_system, "", "Be brief.\n\nWhich?"),
        ({"prompt": "Which?"}, "", "Which?"),
    ):
        spec = spec_for(prompts_file(tmp_path, record), system)
        inputs = read_prompts(spec.prompts)
        prefix, (prompt,) = sample.tokens_of(spec, model, inputs)
        assert model.tokenizer.decode([*prefix, *prompt]) == f"<|user|>{expected}<|end|><|assistant|>"
        assert bool(sample.system_note(spec, model.tokenizer, inputs)) == ("\n\n" in expected)


def test_a_prompt_that_the_template_refuses_is_named(tiny_folder, tmp_path):
    model = weights.load(tiny_folder)
    model.tokenizer.chat_template = "{{ raise_exception('no') if messages[0].content == 'x' }}{{ messages[0].content }}"
    spec = spec_for(prompts_file(tmp_path, {"prompt": "y"}, {"prompt": "x"}))
    with pytest.raises(UserError, match=r"prompts\.jsonl, prompt 2: the model's chat template refuses it \(no\)"):
        sample.tokens_of(spec, model, read_prompts(spec.prompts))
