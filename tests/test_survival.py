"""Whole runs, killed and stopped, and spread over processes: the same results."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# Larger than `smoke`, so that a kill finds it at work.
SIZE = ["--config=configs/mnist.py:smoke", "--config.inputs.count=20000", "--config.student.epochs=3"]


def start(*args, devices=1, size=SIZE):
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "launch.py", *size, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, code=0):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output
    return output


def wait_for(process, path):
    """Until a file of that pattern exists, which is what a run has reached; whether it has."""
    while process.poll() is None:
        if any(Path(path[0]).glob(path[1])):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mnist_folder):
    work = tmp_path_factory.mktemp("whole")
    finish(start(f"--workdir={work}"))
    return (work / "results.json").read_bytes()


def test_killed_at_any_moment_and_resumed_gives_the_same_results_to_the_bit(whole, tmp_path):
    dice = random.Random(0)
    stages = ("teacher*.training/5", "clone-1*.training/*", "students*", "accuracy*")
    for stage in stages:
        process = start(f"--workdir={tmp_path}")
        assert wait_for(process, (tmp_path, f"checkpoints/{stage}")), stage
        if stage != stages[-1]:  # the report takes less
            time.sleep(dice.uniform(0, 1))
        process.kill()
        assert process.wait() == -signal.SIGKILL, stage
    finish(start(f"--workdir={tmp_path}"))
    assert (tmp_path / "results.json").read_bytes() == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_exits_143_and_the_same_command_goes_on(whole, tmp_path, number):
    process = start(f"--workdir={tmp_path}")
    wait_for(process, (tmp_path, "checkpoints/students*.training"))
    process.send_signal(number)
    output = finish(process, 143)
    assert f"stopped by {number.name}" in output and "the same command goes on" in output
    assert "Traceback" not in output
    again = finish(start(f"--workdir={tmp_path}"))
    assert "teacher, runs" not in again
    assert (tmp_path / "results.json").read_bytes() == whole


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cluster(work, *args):
    join = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    runs = ["--config.runs=8", "--config.runs_at_once=8", "--config.arms=auxiliary,cross_all,clone"]
    return [start(f"--workdir={work}", *runs, *join, f"--process_id={i}", *args, devices=4) for i in range(2)]


def values(work):
    return {arm["name"]: arm["runs"] for arm in json.loads((work / "results.json").read_text())["arms"]}


THREE_AXES = ["--config.mesh.replica=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


@pytest.mark.parametrize("mesh", [[], pytest.param(THREE_AXES, marks=pytest.mark.slow)])
def test_two_processes_of_four_devices_give_what_one_device_gives(tmp_path, mnist_folder, mesh):
    one = tmp_path / "one"
    finish(
        start(
            f"--workdir={one}",
            "--config.runs=8",
            "--config.runs_at_once=8",
            "--config.arms=auxiliary,cross_all,clone",
        )
    )
    both = cluster(tmp_path / "two", *mesh)
    for process in both:
        finish(process)
    expected, found = values(one), values(tmp_path / "two")
    for arm in expected:  # rounding, which Adam amplifies, flips images at the border: at most 20 of 10,000
        np.testing.assert_allclose(found[arm], expected[arm], atol=2e-3, err_msg=arm)


def test_a_signal_to_one_process_stops_both_and_both_go_on(tmp_path, mnist_folder):
    # Long enough that the answer comes before the end.
    both = cluster(tmp_path, "--config.teacher.epochs=4")
    wait_for(both[0], (tmp_path, "checkpoints/teacher*.training/5"))
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        finish(process, 143)
    for process in cluster(tmp_path, "--config.teacher.epochs=4"):
        finish(process)
    assert len(values(tmp_path)["teacher"]) == 8
