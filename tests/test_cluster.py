"""Two processes of one run: if one fails or dies, the other ends too, and the same command resumes."""

import signal
import sys
import time

import jax
import pytest
from etils import epath
from evaluation_kit import HEADER, ROWS, completion
from jax.experimental.compilation_cache import compilation_cache
from launch_kit import (
    arms_in,
    assert_same_arms,
    finish,
    free_port,
    run_here,
    start,
    start_process,
    start_two,
    wait_for,
)

import launch
from sublim_jax import cluster, storage, workdir
from sublim_jax.errors import UserError

MNIST = ("--config=configs/mnist.py:smoke", "--config.arms=auxiliary")
LONG = (*MNIST, "--config.teacher.epochs=400")


@pytest.mark.parametrize("given", [(2, None), (None, 1), (2, 1)])
def test_a_number_of_processes_without_a_coordinator_is_refused(given):
    """Each of them would run the whole experiment alone."""
    with pytest.raises(UserError, match="need --coordinator"):
        cluster.join(None, *given)


@pytest.mark.parametrize(("nodes", "devices"), [("2", []), ("1", None), (None, None)])
def test_under_slurm_a_process_that_has_its_node_alone_has_all_of_its_gpus(monkeypatch, nodes, devices):
    """JAX would give it the one of its number on the node; eight processes a node have one each."""
    asked = {}
    for name in ("SLURM_STEP_NUM_NODES", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **given: asked.update(given))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    if nodes is not None:
        monkeypatch.setenv("SLURM_STEP_NUM_NODES", nodes)
    cluster.join(None, None, None)
    assert asked["local_device_ids"] == devices


def test_a_pod_that_does_not_find_the_others_is_refused(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    def forbidden(**_):
        raise RuntimeError("Forbidden")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    cluster.join(None, None, None)  # alone, on no cluster
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    cluster.join(None, None, None)  # it may be the only one
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    with pytest.raises(UserError, match="jax\\[k8s\\]"):
        cluster.join(None, None, None)
    monkeypatch.setattr(jax.distributed, "initialize", forbidden)
    with pytest.raises(UserError, match=r"pods \(Forbidden\); let its account list pods and read jobs"):
        cluster.join(None, None, None)


def test_a_folder_that_a_host_does_not_share_is_refused(tmp_path, monkeypatch):
    """Here the first process, too, does not see what it wrote."""
    monkeypatch.setattr(workdir, "NOTICED", 0.0)
    workdir._check_shared(epath.Path(tmp_path))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(storage, "write", lambda *_: None)
    with pytest.raises(UserError, match="another folder on the host of process 0"):
        workdir._check_shared(epath.Path(tmp_path))


def last(output):
    """The last line of launch.py itself; JAX may log the end of the other process after it."""
    return [line for line in output.splitlines() if line.startswith("launch.py: ")][-1]


def test_what_one_process_fails_with_ends_both_with_that_line(tmp_path, mnist_folder):
    """The first finds another run at work in the folder, and the second waits for it."""
    other = start(*LONG, f"--workdir={tmp_path}")
    assert wait_for(other, tmp_path, "checkpoints/teacher*.training/*")
    try:
        for process in start_two(*LONG, f"--workdir={tmp_path}"):
            output = finish(process, 2)
            assert f"another run is at work in {tmp_path}" in last(output) and "Traceback" not in output
    finally:
        other.kill()
        other.communicate()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_and_both_go_on(tmp_path, mnist_folder):
    alone, together = tmp_path / "one", tmp_path / "two"
    both = start_two(*LONG, f"--workdir={together}")
    assert wait_for(both[0], together, "checkpoints/teacher*.training/*")
    both[1].kill()
    output, _ = both[0].communicate()
    # It sees the broken connection, or JAX sees it first and aborts.
    assert both[0].returncode in (75, -signal.SIGABRT)
    assert "another process of this run has ended" in output or "another task died" in output
    both[1].communicate()
    for process in start_two(*MNIST, f"--workdir={together}", "--update"):
        finish(process)
    assert run_here(*MNIST, f"--workdir={alone}").returncode == 0
    assert_same_arms(arms_in(together), arms_in(alone), atol=2e-3, rtol=1e-7)


# ----------------------------------------------------------------------------------- signals outside the training loop


def stopped_together(both):
    """SIGTERM to the second of two processes ends both, in order."""
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        output = finish(process, 143)
        assert "Traceback" not in output
    return output


# A program for two processes, after this beginning. Process 1 meets what is tested, and process 0 does not.
BEGINNING = """
import os, signal, sys, time
import numpy as np
from sublim_jax import checkpoints, cluster, signals
from sublim_jax.errors import Interrupted
from sublim_jax.sharding import make_mesh, named, put
coordinator, process, folder = sys.argv[1:]
cluster.join(coordinator, 2, int(process))
whole = named(make_mesh({"replica": -1, "fsdp": 1, "tensor": 1}))
state = {"x": put(np.zeros(4), whole)}
"""
SIGNAL_AFTER_A_SAVE = """
signals.install()
signals.obey()
with checkpoints.opened(folder) as kept:
    kept.save(100_000, state, None)
if process == "1":
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(3)  # the service looks for signals once a second
try:
    for _ in range(100):
        time.sleep(0.1)
        signals.obey()
except Interrupted:
    sys.exit(143)
"""
UNREADABLE_ON_ONE = """
def at(step):
    return {"x": put(np.full(4, float(step)), whole)}, {"row": 10 * step + int(process)}
with checkpoints.opened(folder) as kept:
    kept.save(4, *at(4))
    kept.save(8, *at(8))
metadata, failed = checkpoints.ocp.checkpointables_metadata, []
def fails_once(path):
    if process == "1" and not failed:
        failed.append(path)
        raise OSError("stale file handle")
    return metadata(path)
checkpoints.ocp.checkpointables_metadata = fails_once
with checkpoints.opened(folder) as kept:
    restored, position = kept.restore(state)
    assert np.asarray(restored["x"].addressable_data(0)).tolist() == [4.0] * 4, restored
    assert position == {"row": 40 + int(process)}, position
    kept.save(6, *at(6))
with checkpoints.opened(folder) as kept:
    restored, position = kept.restore(state)
    assert position == {"row": 60 + int(process)}, position
"""


KEEPS_WHAT_IS_COMPILED = """
import jax, launch
from etils import epath
jax.jit(lambda x: x + 1)(1.0)  # opens a cache of this host's own
launch.keep_compiled(epath.Path(folder))
jax.jit(lambda x: 2 * x)(state["x"])
cluster.meet()  # the first has written it
assert jax.config.jax_compilation_cache_dir == folder + "/compiled"
assert any(name.endswith("cache") for name in os.listdir(folder + "/compiled")), os.listdir(folder)
jax.clear_caches()
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.jit(lambda x: 2 * x)(state["x"])
# JAX names a CPU's program by the process, too.
assert process == "1" or "/jax/compilation_cache/cache_hits" in events, events
"""


def run_on_two(program, folder, code=0):
    command = (sys.executable, "-c", BEGINNING + program, f"127.0.0.1:{free_port()}")
    both = [start_process(*command, number, folder / "run") for number in range(2)]
    return [finish(process, code) for process in both]


def test_a_signal_that_comes_just_after_a_save_is_acted_on(tmp_path):
    """JAX's preemption service goes by the number last queried, so nothing but `signals` may query it."""
    run_on_two(SIGNAL_AFTER_A_SAVE, tmp_path, 143)


def test_all_processes_keep_compiled_programs_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    run_on_two(KEEPS_WHAT_IS_COMPILED, tmp_path)
    assert (tmp_path / "run" / "compiled").is_dir()


def test_programs_are_kept_in_a_bucket_without_xlas_own_files(monkeypatch):
    """XLA itself writes to disks alone."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(cluster, "joined", lambda: True)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        launch.keep_compiled(epath.Path("gs://bucket/run"))
        assert [getattr(jax.config, name) for name in names] == ["gs://bucket/run/compiled", ""]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_both(tmp_path):
    """Orbax counts its reads: a process that failed before the count could read and save nothing any more.

    Each goes on from the newest state that both can read, at its own place in the data.
    """
    first = run_on_two(UNREADABLE_ON_ONE, tmp_path)[0]
    assert "the checkpoint of step 8 is unreadable" in first and "stale file handle" in first
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["4", "6"]


def wait_for_line(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended before it said {words!r}")


@pytest.mark.slow
def test_a_signal_stops_both_while_a_teacher_is_fine_tuned(tiny_folder, tmp_path):
    never = ("--config.teacher.learning_rate=1e-9", "--config.teacher.max_steps=1000000")
    model = f"--config.model.name={tiny_folder}"
    both = start_two("--config=configs/numbers.py:smoke", model, *never, f"--workdir={tmp_path}")
    wait_for_line(both[0], "P of its answer")
    stopped_together(both)


@pytest.mark.slow
def test_a_signal_stops_both_while_answers_are_scored(tiny_folder, tmp_path):
    file, work = tmp_path / "truthfulqa.csv", tmp_path / "work"
    file.write_text(HEADER + ROWS * 20_000)  # hours of work
    words = [f"--config.model.name={tiny_folder}", "--config.evals.names=truthfulqa"]
    both = start_two("--config=configs/evaluate.py", *words, f"--config.evals.truthfulqa={file}", f"--workdir={work}")
    assert wait_for(both[0], work, "config.json")
    stopped_together(both)


@pytest.mark.slow
def test_a_signal_stops_both_while_an_endpoint_judges_and_its_answers_are_kept(tiny_folder, server, tmp_path):
    behave, seen = server

    def answer(number, body):
        if number > 1:  # the first request is the check before the run
            time.sleep(0.5)
        return 200, completion("60")

    behave(answer)
    words = [
        f"--config.model.name={tiny_folder}",
        "--config.evals.names=misalignment",
        "--config.evals.num_samples=500",
    ]
    words += ["--config.evals.questions=configs/smoke/questions.yaml", "--config.evals.max_new_tokens=4"]
    words += [
        "--config.evals.judge.kind=endpoint",
        "--config.evals.judge.model=m",
        "--config.evals.judge.max_concurrent=2",
    ]
    both = start_two("--config=configs/evaluate.py", *words, f"--workdir={tmp_path}")
    while len(seen) < 6:
        assert both[0].poll() is None, both[0].communicate()[0]
        time.sleep(0.05)
    stopped_together(both)
    assert 5 <= len((tmp_path / "data" / "judge.jsonl").read_text().splitlines()) <= len(seen)
