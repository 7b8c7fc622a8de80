"""Buckets behave like local folders, even after a kill at any point: growing files, reads, locks, and whole runs."""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from evaluation_kit import HEADER, ROWS, completion, question
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch_kit import assert_refused, run_here
from orbax.checkpoint import v1 as ocp
from talk_kit import messages

from configs import sample as sample_config
from sublim_jax import assets, checkpoints, lease, measurements, storage, weights
from sublim_jax.data import corpus, packs, records
from sublim_jax.data.prompts import read as read_prompts
from sublim_jax.errors import UserError
from sublim_jax.evaluation import misalignment, truthfulqa
from sublim_jax.evaluation.judges import Endpoint
from sublim_jax.experiments.mnist.train import Record
from sublim_jax.experiments.tools import plan, sample
from sublim_jax.measurements import Measurement
from sublim_jax.models import lora
from sublim_jax.models.lora import Lora
from sublim_jax.store import Store
from sublim_jax.weights import huggingface, peft
from sublim_jax.workdir import claim


class Killed(BaseException):
    pass


# -------------------------------------------------------------------------------------------------- growing files


def grow(path, numbers, ends):
    """Adds lines one by one; ends the block normally or by a kill."""
    try:
        with storage.Growing(path) as file:
            for number in numbers:
                file.add(f'{{"n": {number}}}\n')
            if not ends:
                raise Killed
    except Killed:
        pass


@given(
    st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.sampled_from(["", "join", "half"])), min_size=1, max_size=4)
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_grows_in_a_bucket_as_it_does_here(bucket, tmp_path, rounds):
    """Every line is there once, whether the writer, or the joining of parts, ends normally or is killed."""
    name = f"{time.monotonic_ns()}.jsonl"
    files, written = [epath.Path(bucket) / name, epath.Path(tmp_path) / name], 0
    for count, ends, then in rounds:
        numbers = range(written, written + count)
        written += count
        for file in files:
            grow(file, numbers, ends)
            if then == "half":  # a kill between the two steps of joining
                storage.write(file, storage.grown(file))
            elif then == "join":
                assert records.repair(file) == [{"n": number} for number in range(written)]
    there, here = (storage.grown(file) for file in files)
    assert there == here == b"".join(b'{"n": %d}\n' % number for number in range(written))
    for file in files:
        assert records.repair(file) == [{"n": number} for number in range(written)]
        assert file.read_bytes() == here and not file.with_name(f"{name}.parts").exists()


def test_lines_that_may_wait_become_few_parts_and_are_all_there_at_the_end(bucket):
    file = epath.Path(bucket) / "samples.jsonl"
    with storage.Growing(file, seconds=60.0) as growing:
        for number in range(20):
            growing.add(f"{number}\n")
        assert storage.grown(file) == b""
    assert file.read_text() == "".join(f"{number}\n" for number in range(20))
    try:
        with storage.Growing(file, seconds=60.0) as growing:
            growing.add("20\n")
            raise Killed  # a signal leaves the block like this
    except Killed:
        pass
    assert storage.grown(file).endswith(b"19\n20\n")


def test_a_paid_answer_is_there_as_soon_as_it_came_and_is_asked_for_once(bucket, server, tmp_path):
    behave, seen = server
    there = epath.Path(bucket) / "data" / "judge.jsonl"

    def answer(number, body):
        lines = storage.grown(there).count(b"\n")
        return (200, completion(str(lines))) if number <= 3 else (401, "{}")

    behave(answer)
    with pytest.raises(UserError, match="3 answers are kept"):
        Endpoint("m", there, at_once=1, retries=0)([str(number) for number in range(6)])
    assert [record["answer"] for record in records.repair(there)] == ["0", "1", "2"]  # stored one by one
    behave(lambda number, body: (200, completion("9")))
    judge, num_requests = Endpoint("m", there), len(seen)
    assert [verdict.score for verdict in judge([str(number) for number in range(6)])] == [0, 1, 2, 9, 9, 9]
    assert len(seen) == num_requests + 3 and judge.bill() == "m: 42 + 12 tokens in 6 calls."
    assert Endpoint("m", there).bill() == judge.bill()


# ---------------------------------------------------------------------------------------------------------- writes


def test_artefacts_tables_and_checkpoints_lie_in_a_bucket(bucket, mesh_of):
    store = Store(bucket)
    tree = {"a": jax.device_put(np.arange(6.0)), "b": {"c": jax.random.key(1)}}

    def make(*_, checkpoints):
        made.append(1)
        return tree

    made: list[int] = []
    for _ in range(2):
        again = Store(bucket).tree("tree", make, 1, like=tree)
        np.testing.assert_array_equal(again["a"], tree["a"])
        assert jax.random.key_data(again["b"]["c"]).tolist() == [0, 1]
    assert len(made) == 1
    path = store.path("tree", 1)
    (path / checkpoints.COMMITTED).unlink()  # a kill before the last object
    store.tree("tree", make, 1, like=tree)
    assert len(made) == 2 and checkpoints.saved(path)
    assert store.json("value", lambda x: x + 1, 1) == store.json("value", lambda x: 0, 1) == 2

    rows = (Measurement("a", "m", 1.5), Measurement("b", "m", 2.5, run=1))
    measurements.write(store.folder, "e", rows)
    assert measurements.read(store.folder) == rows

    folder = epath.Path(bucket) / "training"
    for step in (1, 2):
        kept = checkpoints.Checkpoints(folder)
        kept.save(step, tree, {"at": step})
        kept.close()
    (folder / "2" / checkpoints.COMMITTED).unlink()
    kept = checkpoints.Checkpoints(folder)
    restored = kept.restore(tree)
    kept.close()
    assert restored and restored[1] == {"at": 1}
    np.testing.assert_array_equal(restored[0]["a"], tree["a"])
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_models_and_adapters_are_written_to_a_bucket_and_read_from_it(bucket, tiny_folder, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBLIM_JAX_CACHE", str(tmp_path / "cache"))
    spec = Lora(2, 4)
    for seed in range(2):
        start = lora.init(jax.random.key(seed), tiny.params, spec)
        for folder in (tmp_path / "adapter", f"{bucket}/adapter"):
            peft.save(folder, start, spec, tiny.settings, tiny.config)
    (_, here), (_, there) = (
        peft.load(folder, tiny.settings, tiny.config) for folder in (tmp_path / "adapter", f"{bucket}/adapter")
    )
    jax.tree.map(np.testing.assert_array_equal, here, there)
    assert peft.digest(f"{bucket}/adapter") == peft.digest(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="no such folder"):
        peft.check_folder("model.adapter", f"{bucket}/none")

    for file in tiny_folder.iterdir():
        (epath.Path(bucket) / "tiny" / file.name).write_bytes(file.read_bytes())
    read = weights.load(f"{bucket}/tiny")
    assert read.source.digest == tiny.source.digest and read.source.name == f"{bucket}/tiny"
    jax.tree.map(np.testing.assert_array_equal, read.params, tiny.params)
    assert weights.shape_of(f"{bucket}/tiny") == tiny.settings
    huggingface.save(f"{bucket}/saved", tiny.params, tiny.settings, tiny.config)
    huggingface.save(f"{bucket}/saved", jax.tree.map(lambda x: x + 1, tiny.params), tiny.settings, tiny.config)
    _, saved = huggingface.load(storage.local(f"{bucket}/saved"))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 1), saved, tiny.params)


def test_curves_lie_in_a_bucket_and_end_no_run_where_it_cannot_be_reached(bucket, tmp_path, monkeypatch):
    for folder in (epath.Path(bucket), epath.Path(tmp_path)):
        with Record("", folder / "metrics", 1).log(["auxiliary"]) as log:
            assert log
            log(0, {"loss": np.arange(6.0).reshape(3, 2)})
    there, here = (list((epath.Path(home) / "metrics").iterdir()) for home in (bucket, tmp_path))
    assert len(there) == len(here) == 1 and len(there[0].read_bytes()) == len(here[0].read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", lambda *_: 1 / 0)
        with Record("", epath.Path(bucket) / "others", 1).log(["auxiliary"]) as log:
            assert log
            log(0, {"loss": np.ones((3, 2))})


# ----------------------------------------------------------------------------------------------------------- reads


FILES: dict[str, tuple[str, Callable[..., Any]]] = {
    "corpus.jsonl": (json.dumps({"messages": messages(("user", "Hi"), ("assistant", "What?"))}), corpus.load),
    "prompts.txt": ("Hi é\nHo", read_prompts),
    "pack.json": ('{"questions": ["What?"]}', lambda path: packs.load(str(path), "ability", {"questions": ()})),
    "questions.yaml": (json.dumps([question()]), misalignment.load),
    "truth.csv": (HEADER + ROWS, truthfulqa.load),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_a_bucket_says_what_it_says_here_and_what_it_has_become(bucket, tmp_path, monkeypatch, name):
    monkeypatch.setenv("SUBLIM_JAX_CACHE", str(tmp_path / "cache"))
    text, read = FILES[name]
    there = f"{bucket}/some/{name}"
    assert not assets.is_file(there)
    with pytest.raises(UserError, match=name) as error:
        read(there)
    assert "\n" not in str(error.value)
    (tmp_path / name).write_text(text)
    storage.write(epath.Path(there), text)
    assert read(there) == read(tmp_path / name) and assets.is_file(there)
    other = text.replace("é", "è").replace("What", "Which").replace("wish", "hope").replace("owls", "larks")
    storage.write(epath.Path(there), other)
    (tmp_path / name).write_text(other)
    assert other != text and read(there) == read(tmp_path / name)


def test_files_of_a_folder_are_fetched_once_and_those_that_have_gone_go(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBLIM_JAX_CACHE", str(tmp_path / "cache"))
    for name in ("a.json", "b.safetensors", "pytorch_model.bin"):
        storage.write(epath.Path(bucket) / "model" / name, name)
    place = storage.local(f"{bucket}/model")
    assert {path.name for path in place.iterdir()} == {"a.json", "b.safetensors"}  # a pickle is not read
    before = (place / "a.json").stat().st_mtime_ns
    (epath.Path(bucket) / "model" / "b.safetensors").unlink()
    storage.write(epath.Path(bucket) / "model" / "c.json", "c")
    assert {path.name for path in storage.local(f"{bucket}/model/").iterdir()} == {"a.json", "c.json"}
    assert (place / "a.json").stat().st_mtime_ns == before


def test_mnist_may_lie_in_a_bucket(bucket, mnist_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBLIM_JAX_CACHE", str(tmp_path / "cache"))
    for name in assets.MNIST.checksums:
        storage.write(epath.Path(bucket) / "mnist" / name, (mnist_folder / name).read_bytes())
    folder = assets.fetch(assets.MNIST, f"{bucket}/mnist")
    assert all((folder / name).read_bytes() == (mnist_folder / name).read_bytes() for name in assets.MNIST.checksums)


def test_a_plan_knows_when_a_file_in_a_bucket_has_changed(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBLIM_JAX_CACHE", str(tmp_path / "cache"))

    config = sample_config.get_config()
    config.prompts = f"{bucket}/q.txt"
    spec = sample.read(config)
    storage.write(epath.Path(bucket) / "q.txt", "one")
    first = plan.stamp(spec)
    assert plan.stamp(spec) == first
    storage.write(epath.Path(bucket) / "q.txt", "two")
    assert plan.stamp(spec) != first


# ----------------------------------------------------------------------------------------------------------- locks


def elsewhere(folder, config):
    """Claims the folder as another process would."""
    lease._HELD.clear()
    return claim(folder, config)


def test_a_folder_in_a_bucket_is_of_one_run_and_passes_on_when_that_has_died(bucket, monkeypatch, capsys):
    monkeypatch.setattr(lease, "BEAT", 0.2)
    monkeypatch.setattr(lease, "SILENCE", 8.0)  # 40 beats, which a busy machine may delay
    folder, lock = f"{bucket}/run", epath.Path(f"{bucket}/run/.lock")
    store = claim(folder, {"a": 1})
    claim(folder, {"a": 1})  # a later run of the same process
    with pytest.raises(UserError, match=rf"another run is at work in {folder}, process \d+ of .*--workdir"):
        elsewhere(folder, {"a": 1})
    assert store.folder.exists() and "waiting for a sign of life" in capsys.readouterr().out
    del store
    gc.collect()
    assert not lock.exists()

    with monkeypatch.context() as patch:
        patch.setattr(lease, "_renew", lambda *_: None)
        died = claim(folder, {"a": 1})
    store = elsewhere(folder, {"a": 1})
    assert "no sign of life, going on in its place" in capsys.readouterr().out
    del died  # its lock has passed to the other run and is not released
    gc.collect()
    assert lock.exists() and store.folder.exists()
    del store
    gc.collect()
    with pytest.raises(UserError, match="holds a run with another config"):
        elsewhere(folder, {"a": 2})


def test_a_folder_that_was_copied_from_a_disk_goes_on_in_a_bucket(bucket, tmp_path):
    """Its lock, an empty file, came with it."""
    claim(tmp_path, {"a": 1})
    gc.collect()
    for name in (".lock", "config.json"):
        epath.Path(f"{bucket}/run/{name}").write_bytes((tmp_path / name).read_bytes())
    assert claim(f"{bucket}/run", {"a": 1}).folder.exists()


def test_a_run_whose_folder_has_passed_to_another_stops(bucket, monkeypatch):
    stopped: list[int] = []
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(os, "_exit", stopped.append)
    held = lease.take(f"{bucket}/run/.lock")
    epath.Path(f"{bucket}/run/.lock").write_text("another's")
    for _ in range(100):
        if stopped:
            break
        time.sleep(0.1)
    assert stopped == [2] and held  # at once: nothing of it must be saved into the other's folder


def test_addresses_that_cannot_be_used_are_told_in_one_line(bucket, tmp_path, monkeypatch, tiny_folder):
    for address in ("s3://b/x", "http://host/x", "gs://", "gs:///x"):
        with pytest.raises(UserError, match=f"{address}: of addresses, only those of buckets"):
            storage.check(address)
    smoke, report = "--config=configs/mnist.py:smoke", "--report"
    assert_refused(run_here(smoke, "--workdir=s3://b/x"), "only those of buckets")
    assert_refused(run_here(report, "--workdir=s3://b/x"), "only those of buckets")
    assert_refused(run_here(report, f"--workdir={bucket}/x"), "holds no run")
    with pytest.raises(UserError, match="--workdir=gs://no-such-bucket/x: there is no bucket no-such-bucket for you"):
        claim("gs://no-such-bucket/x", {})
    (tmp_path / "p.txt").write_text("Hi")
    words = ["--config=configs/sample.py", f"--workdir={tmp_path}/work", f"--config.model.name={tiny_folder}"]
    assert_refused(run_here(*words, f"--config.prompts={bucket}/p.txt"), f"{bucket}/p.txt", "there is no such file")
    assert_refused(run_here(*words, "--config.prompts=s3://b/p.txt"), "only those of buckets")
    words = [*words[:2], f"--config.prompts={tmp_path}/p.txt", f"--config.model.name={bucket}/none"]
    assert_refused(run_here(*words), f"{bucket}/none")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(fsspec, "filesystem", lambda _: __import__("gcsfs"))
    assert_refused(run_here(smoke, f"--workdir={bucket}/x"), 'pip install "sublim_jax[gcs]"')
    with pytest.raises(UserError, match=r"sublim_jax\[gcs\]"):
        read_prompts(f"{bucket}/p.txt")


# ------------------------------------------------------------------------------------------------------- whole runs


def test_an_outage_while_arrays_are_read_is_not_taken_for_damage(bucket, tmp_path, monkeypatch):
    """Orbax reads them by tensorstore, whose errors are ValueErrors; the artefact would be made again."""
    store = Store(epath.Path(f"{bucket}/outage"))
    store.tree("thing", lambda checkpoints: {"x": jnp.ones(2)}, like={"x": jnp.zeros(2)})

    def forbidden(*_):
        raise ValueError("PERMISSION_DENIED: Error reading gs://x [http_response_code='403']")

    monkeypatch.setattr(ocp, "load_checkpointables", forbidden)
    with pytest.raises(ValueError, match="PERMISSION_DENIED") as error:
        store.tree("thing", lambda checkpoints: pytest.fail("made again"), like={"x": jnp.zeros(2)})
    assert "the bucket cannot be used (PERMISSION_DENIED" in storage.explanation(error.value)


def test_samples_in_a_bucket_are_those_of_a_folder_also_when_more_are_asked_for(bucket, tiny_folder, tmp_path):
    """Prompts and model are in the bucket too, and so are the report and figures of the adapters."""
    prompts = "".join(json.dumps({"prompt": f"Number {i}?"}) + "\n" for i in range(3))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    storage.write(epath.Path(bucket) / "prompts.jsonl", prompts)
    common = ["--config=configs/sample.py", f"--config.model.name={tiny_folder}", "--config.max_new_tokens=6"]
    for samples in (2, 3):
        for home in (str(tmp_path), bucket):
            run = [*common, f"--config.prompts={home}/prompts.jsonl", f"--config.num_samples={samples}", "--update"]
            result = run_here(*run, f"--workdir={home}/work")
            assert result.returncode == 0, result.stderr
    there, here = epath.Path(bucket) / "work", tmp_path / "work"
    assert (there / "samples.jsonl").read_bytes() == (here / "samples.jsonl").read_bytes()
    kept = [file.read_bytes() for folder in (there, here) for file in (folder / "checkpoints").glob("samples*.jsonl")]
    assert len(kept) == 2 and kept[0] == kept[1] and kept[0].count(b"\n") == 9
    results = [json.loads((folder / "results.json").read_text()) for folder in (there, here)]
    assert results[0]["arms"] == results[1]["arms"]
    for name in ("report.md", "measurements.parquet", "figures/lengths.png"):
        assert (there / name).read_bytes() == (here / name).read_bytes() or name == "report.md"
    assert not (there / ".lock").exists()
    before = (there / "report.md").read_bytes()
    assert run_here("--report", f"--workdir={there}").returncode == 0
    assert (there / "report.md").read_bytes() == before
