"""The command line: every mistake gives one line and exit code 2, and nothing is computed or lost."""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
from filelock import FileLock
from launch_kit import LAUNCH, ROOT, assert_refused, run_here


def launch(*args, **env):
    return subprocess.run(
        [*LAUNCH, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **env},
        capture_output=True,
        text=True,
    )


MISTAKES = {
    "no config": ([], ["--config"]),
    "config file missing": (["--config=configs/minst.py"], ["configs/minst.py"]),
    "preset unknown": (["--config=configs/mnist.py:papre"], ["papre", "paper"]),
    "key unknown": (["--config=configs/mnist.py", "--config.student.learning_rte=1"], ["learning_rte"]),
    "flag unknown": (["--config=configs/mnist.py", "--workdri=x"], ["workdri"]),
    "type wrong": (["--config=configs/mnist.py", "--config.runs=many"], ["runs", "many"]),
    "value unknown": (["--config=configs/mnist.py", "--config.inputs.kind=pink"], ["inputs.kind", "pink", "uniform"]),
    "value negative": (["--config=configs/mnist.py", "--config.student.epochs=-1"], ["student.epochs", "positive"]),
    "arm unknown": (["--config=configs/mnist.py", "--config.arms=auxilliary,all"], ["arms", "auxilliary"]),
    "layer unknown": (["--config=configs/mnist.py", "--config.student.trained_layers=0+7"], ["trained_layers", "0+7"]),
    "mesh too large": (["--config=configs/mnist.py", "--config.mesh.fsdp=3"], ["mesh", "fsdp=3", "device"]),
    "sweep of nothing": (["--config=configs/mnist.py:sweep", "--config.sweep.axis=student.lr"], ["student.lr"]),
    "sweep value wrong": (["--config=configs/mnist.py:sweep", "--config.sweep.points=1,two"], ["two", "auxiliary"]),
    "sweep value senseless": (["--config=configs/mnist.py:sweep", "--config.sweep.points=1,0"], ["auxiliary=0"]),
    "data missing": (
        ["--config=configs/theorem.py", "--config.mesh.fsdp=1", "--config.data.path=/nowhere"],
        ["/nowhere", "data.path"],
    ),
    "process number missing": (["--config=configs/mnist.py", "--coordinator=127.0.0.1:1"], ["--process_id"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, tmp_path):
    args, words = MISTAKES[mistake]
    assert_refused(run_here(*args, f"--workdir={tmp_path / 'work'}"), *words)
    assert not list(tmp_path.rglob("*"))


def test_a_mistake_is_that_to_whoever_started_the_process():
    assert_refused(launch("--config=configs/mnist.py:papre"), "papre", "paper")


def test_a_workdir_that_cannot_be_made_is_told(mnist_folder):
    assert_refused(run_here("--config=configs/mnist.py", "--workdir=/proc/nothing"), "--workdir=/proc/nothing")


def test_an_axis_that_does_not_divide(tmp_path):
    result = run_here("--config=configs/mnist.py:smoke", f"--workdir={tmp_path}", devices=4)
    assert_refused(result, "runs_at_once=2 does not divide over replica=4", "--config.mesh.replica")


def test_a_corrupt_data_file_is_named(tmp_path, mnist_folder):
    data = tmp_path / "data"
    shutil.copytree(mnist_folder, data)
    with (data / "train-images-idx3-ubyte").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    args = ("--config=configs/mnist.py:smoke", f"--config.data.path={data}", f"--workdir={tmp_path / 'work'}")
    assert_refused(run_here(*args), "train-images-idx3-ubyte", "corrupt")
    (data / "t10k-labels-idx1-ubyte").unlink()
    shutil.copy(mnist_folder / "train-images-idx3-ubyte", data)
    assert_refused(run_here(*args), "t10k-labels-idx1-ubyte", "missing")


def test_a_second_run_in_a_busy_workdir_is_refused(tmp_path, mnist_folder):
    with FileLock(str(tmp_path / ".lock")):
        result = run_here("--config=configs/mnist.py:smoke", f"--workdir={tmp_path}")
    assert_refused(result, "another run is at work", "choose another --workdir")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_no_network_and_no_cache_says_where_to_put_the_files(tmp_path):
    result = launch(
        "--config=configs/mnist.py:smoke",
        f"--workdir={tmp_path / 'work'}",
        SUBLIM_JAX_CACHE=str(tmp_path / "cache"),
        PATH="/nowhere",
        https_proxy="http://127.0.0.1:9",
        no_proxy="",
    )
    assert_refused(result, "tensorflow-datasets", "npm is not installed", "--config.data.path")


def test_results_and_a_second_config_in_the_same_workdir(tmp_path, mnist_folder):
    """The whole command once, as a process without torch; then again (nothing computed), with another config (refused),
    with --update (reused)."""
    work = tmp_path / "work"
    args = ["--config=configs/mnist.py:smoke", "--config.arms=auxiliary,clone", f"--workdir={work}"]
    first = launch(*args)
    assert first.returncode == 0, first.stderr
    results = json.loads((work / "results.json").read_text())
    assert set(results) == {"experiment", "preset", "config", "versions", "devices", "arms", "models"}
    assert [arm["name"] for arm in results["arms"]] == [
        "reference",
        "teacher",
        "student, shared initialisation (auxiliary logits)",
        "cloned 1 epoch on inputs of the student's kind, then distilled (auxiliary logits)",
        "cloned 2 epochs on inputs of the student's kind, then distilled (auxiliary logits)",
    ]
    for arm in results["arms"]:
        assert len(arm["runs"]) == 2
        assert arm["mean"] == pytest.approx(sum(arm["runs"]) / 2)
    assert json.loads((work / "config.json").read_text()) == results["config"]
    for figure in ("arms", "cloning"):
        assert (work / "figures" / f"{figure}.png").stat().st_size > 10_000
    assert "| teacher |" in (work / "report.md").read_text()
    assert list((work / "metrics").rglob("events*"))
    assert not list((work / "checkpoints").glob("*.training*"))

    second = run_here(*args)
    assert second.returncode == 0 and "steps/s" not in second.stdout and "teacher, runs" not in second.stdout

    # Another config that was interrupted before it measured anything: the report stays that of what is measured.
    (work / "config.json").write_text(json.dumps({**results["config"], "seed": 9, "runs": 4}))
    assert run_here("--report", f"--workdir={work}").returncode == 0
    again = json.loads((work / "results.json").read_text())
    assert all(again[name] == results[name] for name in ("config", "arms"))
    (work / "config.json").write_text(json.dumps(results["config"]))

    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    other = [*args, "--config.student.learning_rate=0.001"]
    assert_refused(run_here(*other), "student.learning_rate: 0.0003 → 0.001", "--update", "--workdir")
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}

    updated = run_here(*other, "--update")
    assert updated.returncode == 0, updated.stderr
    assert "teacher, runs" not in updated.stdout and "students on uniform inputs" in updated.stdout

    (work / "figures" / "mine.png").write_bytes(b"a picture of the user's")
    assert run_here(args[0], "--config.arms=auxiliary", args[-1], "--update").returncode == 0
    assert {path.name for path in (work / "figures").iterdir()} == {"arms.png", "mine.png"}  # none of clones


def test_a_sweep_ends_in_one_figure(tmp_path, mnist_folder):
    result = run_here(
        "--config=configs/mnist.py:smoke",
        "--config.arms=auxiliary,",
        "--config.sweep.axis=student.objective",
        "--config.sweep.points=kl,squared_error",
        f"--workdir={tmp_path}",
    )
    assert result.returncode == 0, result.stderr
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert [(arm["value"], arm["name"]) for arm in arms if "student" in arm["name"]] == [
        ("kl", "student, shared initialisation (auxiliary logits)"),
        ("squared_error", "student, shared initialisation (auxiliary logits)"),
    ]
    assert (tmp_path / "figures" / "sweep.png").exists()
    ends = [line for line in result.stdout.splitlines() if re.match(r"teacher, runs .* in \S+ s$", line)]
    assert len(ends) == 1  # shared by both; a slow machine prints progress in between


def test_help_is_no_error_and_a_reader_that_has_enough_ends_no_run_with_a_traceback():
    assert launch("--help").returncode == 0
    describe = [*LAUNCH, "--config=configs/numbers.py", "--describe"]
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(describe, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert result.returncode == 128 + signal.SIGPIPE and "Traceback" not in result.stderr


def test_every_flag_has_help():
    text = launch("--helpfull").stdout
    for flag in ("--config:", "--workdir:", "--[no]update:", "--coordinator:", "--num_processes:", "--process_id:"):
        assert flag in text


def test_preflight_compiles_the_steps_and_runs_nothing(tmp_path):
    result = run_here("--config=configs/mnist.py:paper", "--preflight=local", f"--workdir={tmp_path / 'work'}")
    assert result.returncode == 0, result.stderr
    assert "teachers, 10 runs at once" in result.stdout and "students, 4 a run" in result.stdout
    assert "optimiser" in result.stdout and "× the model's own" in result.stdout
    assert not (tmp_path / "work").exists()


def test_preflight_of_an_experiment_without_steps_is_refused():
    assert_refused(run_here("--config=configs/theorem.py", "--preflight=local"), "has no step on a mesh")
