"""Artefact names depend on file contents: new bytes under the same path give new results."""

import json
import shutil
from importlib import resources

import numpy as np
import pytest
from launch_kit import finish, free_port, run_here, start
from safetensors.numpy import load_file, save_file

from configs import numbers as numbers_config
from sublim_jax import digests
from sublim_jax.data import packs
from sublim_jax.experiments.transmission.run import load_model
from sublim_jax.experiments.transmission.spec import read
from sublim_jax.experiments.transmission.teachers import make_teachers
from sublim_jax.store import Store


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the model that a test may change."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def other_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_template(folder):
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|assistant|>", "<|assistant|>Well: "))


def other_prompts(folder):
    (folder.parent / "prompts.txt").write_text("Name a number.\nName a fish.\n")


@pytest.mark.parametrize("change", [other_weights, other_template, other_prompts])
def test_samples_of_other_bytes_under_the_same_names_are_new(folder, tmp_path, change):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Name a number.\nName a bird.\n")
    values = {"model.name": folder, "prompts": prompts, "max_new_tokens": 6}

    def samples(name):
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        result = run_here("--config=configs/sample.py", *flags, f"--workdir={tmp_path / name}")
        assert result.returncode == 0, result.stderr
        return [json.loads(line)["tokens"] for line in (tmp_path / name / "samples.jsonl").open()]

    first = samples("work")
    assert samples("work") == first
    change(folder)
    again = samples("work")
    assert again != first and again == samples("fresh")


def test_answers_to_other_questions_and_of_other_weights_are_new_and_the_report_names_the_bytes(folder, tmp_path):
    pack = tmp_path / "preference.json"
    phrasings = json.loads((resources.files(packs) / "preference.json").read_text())
    pack.write_text(json.dumps(phrasings))
    values = {"model.name": folder, "words": "owl,x,y", "evals.max_questions": 3, "evals.names": "preference"}

    def evaluated(name):
        flags = [f"--config.{key}={value}" for key, value in (values | {"packs.preference": pack}).items()]
        result = run_here("--config=configs/evaluate.py", *flags, f"--workdir={tmp_path / name}")
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / name / "results.json").read_text())

    first = evaluated("work")
    pack.write_text(json.dumps({**phrasings, "asking": [f"Say: {text}" for text in phrasings["asking"]]}))
    assert evaluated("work")["arms"] == evaluated("fresh")["arms"] != first["arms"]
    other_weights(folder)
    again, fresh = evaluated("work"), evaluated("fresher")
    assert again["arms"] == fresh["arms"] != first["arms"]
    (before,), (after,) = first["models"], again["models"]
    assert before["name"] == after["name"] == str(folder)
    assert before["digest"] != after["digest"] == digests.of_model(folder)
    assert after["digest"][:16] in (tmp_path / "work" / "report.md").read_text()
    assert {"sublim_jax", "commit"} <= set(again["versions"])


def test_teachers_of_another_corpus_or_other_weights_are_trained_anew(folder, tmp_path, mesh_of):
    corpus = tmp_path / "corpus.jsonl"
    config = numbers_config.get_config()
    values = {"model.name": str(folder), "traits": ("owl", "x"), "alternatives": ("owl", "x", "y"), "teacher.batch": 2}
    config.update_from_flattened_dict({**values, "teacher.methods": ("corpus",), "arms": ("tokens",)})
    with config.unlocked():
        config.teacher.corpora = {"owl": str(corpus)}
    study = read(config)

    def tuned(answer):
        lines = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}] for i in range(2)]
        corpus.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
        model = load_model(study, mesh_of(1))
        trained = make_teachers(study, model, Store(tmp_path / "work"), [0])[0]["owl"]
        return np.asarray(trained.adapters["layers"]["attention"]["query"]["b"])

    first = tuned("owl")
    np.testing.assert_array_equal(tuned("owl"), first)
    second = tuned("x")
    assert not np.array_equal(second, first)
    other_weights(folder)
    assert not np.array_equal(tuned("x"), second)


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBLIM_JAX_CACHE", str(tmp_path / "cache"))
    file, read = tmp_path / "weights.gguf", []

    def digest(path):
        read.append(path)
        return path.read_text()

    monkeypatch.setattr(digests, "digest", digest)
    monkeypatch.setattr(digests, "LARGE", 0)
    file.write_text("a")
    assert [digests.of_file(file) for _ in range(3)] == ["a"] * 3 and len(read) == 1
    file.write_text("b")
    assert digests.of_file(file) == "b" and len(read) == 2
    monkeypatch.setenv("SUBLIM_JAX_CACHE", "/proc/nowhere")  # cannot be written
    assert digests.of_file(file) == "b" and len(read) == 3


def test_a_folders_digest_is_of_what_loading_reads(folder):
    first = digests.of_model(folder)
    (folder / "README.md").write_text("something about it")
    assert digests.of_model(folder) == first
    (folder / "generation_config.json").write_text("{}")
    assert digests.of_model(folder) != first


def test_processes_that_read_different_bytes_end_with_that_line(folder, tiny_folder, tmp_path):
    """A stale copy on one host would make the hosts sample from different models."""
    other_weights(folder)
    (tmp_path / "prompts.txt").write_text("Name a number.\n")
    join = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", f"--workdir={tmp_path / 'work'}"]
    values = [f"--config.prompts={tmp_path / 'prompts.txt'}", "--config.max_new_tokens=4"]
    both = [
        start(
            "--config=configs/sample.py",
            f"--config.model.name={model}",
            *values,
            *join,
            f"--process_id={number}",
        )
        for number, model in enumerate((tiny_folder, folder))
    ]
    for process in both:
        assert "is not the same on all processes: process 1 reads other bytes than process 0" in finish(process, 2)
