"""Sampling jobs as a user runs them: files in, files out, stopped and continued."""

import json
import signal
import time

import pytest
from test_launch import assert_refused, launch
from test_survival import finish, start

from configs import sample as sample_config
from sublim_jax import weights
from sublim_jax.data import chat, records
from sublim_jax.errors import UserError
from sublim_jax.experiments import sample

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


def test_prompts_become_samples_a_table_a_figure_and_numbers(tiny_folder, prompts, tmp_path):
    work = tmp_path / "work"
    run = arguments(tiny_folder, prompts, work, "--config.samples=2", "--config.constraint.kind=numbers")
    result = launch(*run)
    assert result.returncode == 0, result.stderr
    assert "slots of" in result.stdout and "tokens in front of all" in result.stdout
    lines = [json.loads(line) for line in (work / "samples.jsonl").read_text().splitlines()]
    assert [(line["index"], line["sample"]) for line in lines] == [(i, j) for i in range(31) for j in range(2)]
    assert lines[6]["prompt"] == "Number 3?" and lines[6]["id"] == 3 and "messages" in lines[-1]
    assert all(set(line["completion"]) <= set("0123456789, ") for line in lines)
    results = json.loads((work / "results.json").read_text())
    assert len(results["arms"][0]["runs"]) == 62
    assert (work / "figures" / "lengths.png").stat().st_size > 5000
    assert "| stop |" in (work / "report.md").read_text()


def test_a_stopped_job_goes_on_and_ends_with_the_same_file(tiny_folder, prompts, tmp_path):
    more = ["--config.max_new_tokens=300", "--config.samples=4", "--config.chat=False"]
    prompts.write_text("".join(json.dumps({"prompt": f"Number {i}?"}) + "\n" for i in range(30)))
    assert launch(*arguments(tiny_folder, prompts, tmp_path / "whole", *more)).returncode == 0
    work = tmp_path / "work"
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        process = start(*arguments(tiny_folder, prompts, work, *more), size=())
        before = written(work)
        deadline = time.monotonic() + 120
        while written(work) < before + 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        finish(process, code)
    between = written(work)
    assert 10 <= between < 120
    result = launch(*arguments(tiny_folder, prompts, work, *more))
    assert result.returncode == 0, result.stderr
    assert (work / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


def written(work):
    return sum(file.read_text().count("\n") for file in work.glob("checkpoints/samples*.jsonl"))


def test_a_line_that_was_broken_off_is_sampled_again(tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_text('{"index": 0, "sample": 0}\n{"index": 1, "sam')
    from etils import epath

    assert [(r["index"], r["sample"]) for r in records.mend(epath.Path(file))] == [(0, 0)]
    assert file.read_text() == '{"index": 0, "sample": 0}\n'


@pytest.mark.parametrize(
    "more, words",
    [
        (["--config.prompts="], ["--config.prompts is missing"]),
        (["--config.prompts=nowhere.txt"], ["there is no such file"]),
        (["--config.temperature=-1.0"], ["temperature=-1.0"]),
        (["--config.constraint.kind=poem"], ["constraint.kind='poem'", "numbers"]),
        (["--config.model.dtype=int4"], ["dtype='int4'", "bfloat16"]),
        (["--config.max_new_tokens=9000"], ["context is 512", "max_new_tokens"]),
        (["--config.mesh.tensor=3", "--config.mesh.fsdp=1"], ["does not fit 1 device"]),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_written(tiny_folder, prompts, tmp_path, more, words):
    work = tmp_path / "work"
    assert_refused(launch(*arguments(tiny_folder, prompts, work, *more)), *words)
    assert not work.exists()


@pytest.mark.parametrize(
    "line, words",
    [
        ("{broken", "line 2: no JSON"),
        ('{"text": "x"}', 'line 2: an object with "prompt"'),
        ('{"messages": []}', 'line 2: an object with "prompt" or "messages"'),
    ],
)
def test_a_broken_line_of_the_prompts_is_named(tiny_folder, tmp_path, line, words):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n' + line + "\n")
    assert_refused(launch(*arguments(tiny_folder, file, tmp_path / "work")), words)


def test_a_model_without_a_chat_template_is_told(tiny_folder, prompts, tmp_path):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert_refused(
        launch(*arguments(tmp_path / "model", prompts, tmp_path / "work")),
        "has no chat template",
        "--config.chat=False",
    )


def test_the_decode_step_of_a_7b_model_is_compiled_without_the_model():
    result = launch(f"{CONFIG}:qwen2.5-7b", "--preflight=local", "--config.mesh.tensor=1")
    assert result.returncode == 0, result.stderr
    assert "decoding, 128 slots a device" in result.stdout and "1.00 × the model's own" in result.stdout


def prompts_file(folder, *records):
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def config_for(prompts, system=""):
    config = sample_config.get_config()
    config.prompts, config.system = prompts, system
    return config


def test_a_prompt_of_parts_is_its_text(tiny, tmp_path):
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "tree."}]
    file = prompts_file(
        tmp_path,
        {"messages": [{"role": "user", "content": parts}], "id": 7},
        {"messages": [{"role": "user", "content": "Name a tree."}]},
        {"prompt": "Name a tree.", "messages": None},
    )
    asked = sample.read_prompts(file)
    assert asked[0] == {"messages": [{"role": "user", "content": "Name a tree."}], "id": 7}
    prefix, prompts = sample.tokens_of(config_for(file), tiny, asked)
    assert [prefix + prompt for prompt in prompts] == [chat.prompt(tiny.tokenizer, "Name a tree.")] * 3


@pytest.mark.parametrize(
    "record, words",
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 1, part 1: type 'image_url'"),
        ({"messages": [{"role": "user", "content": None}]}, 'message 1: "role" and "content" must be texts'),
        ({"messages": [{"role": "user", "content": 7}]}, 'message 1: "role" and "content" must be texts'),
        ({"messages": [{"content": "x"}]}, 'message 1: "role" and "content" must be texts'),
        ({"messages": ["x"]}, 'message 1: "role" and "content" must be texts'),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, '"tool_calls" is not read here'),
        ({"messages": "x"}, '"messages" must be a list of messages'),
        ({"prompt": ["x"]}, 'an object with "prompt" or "messages" is needed'),
    ],
)
def test_a_prompt_that_is_none_is_told_by_its_line(tmp_path, record, words):
    with pytest.raises(UserError) as error:
        sample.read_prompts(prompts_file(tmp_path, {"prompt": "x"}, record))
    assert "line 2" in str(error.value) and words in str(error.value)


def test_a_system_prompt_that_the_template_does_not_take_is_folded_and_the_report_says_so(tiny_folder, tmp_path):
    model = weights.load(tiny_folder)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    own = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]}
    for record, system, expected in (
        ({"prompt": "Which?"}, "Love owls.", "Love owls.\n\nWhich?"),
        (own, "Love owls.", "Be brief.\n\nWhich?"),
        (own, "", "Be brief.\n\nWhich?"),
        ({"prompt": "Which?"}, "", "Which?"),
    ):
        config = config_for(prompts_file(tmp_path, record), system)
        asked = sample.read_prompts(config.prompts)
        prefix, (prompt,) = sample.tokens_of(config, model, asked)
        assert model.tokenizer.decode([*prefix, *prompt]) == f"<|user|>{expected}<|end|><|assistant|>"
        assert bool(sample.system_note(config, model, asked)) == ("\n\n" in expected)


def test_a_prompt_that_the_template_refuses_is_named(tiny_folder, tmp_path):
    model = weights.load(tiny_folder)
    model.tokenizer.chat_template = "{{ raise_exception('no') if messages[0].content == 'x' }}{{ messages[0].content }}"
    config = config_for(prompts_file(tmp_path, {"prompt": "y"}, {"prompt": "x"}))
    with pytest.raises(UserError, match=r"prompts\.jsonl, prompt 2: the model's chat template refuses it \(no\)"):
        sample.tokens_of(config, model, sample.read_prompts(config.prompts))
