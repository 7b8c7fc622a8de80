"""Whole runs that are killed, stopped, or spread over processes have the same results."""

import random
import signal
import time

import numpy as np
import pytest
from launch_kit import arms_in, finish, run_here, run_stopped, start, start_two, wait_for

# Larger than `smoke`, so that the run is still at work when it is killed.
SIZE = ["--config=configs/mnist.py:smoke", "--config.inputs.count=20000", "--config.student.epochs=3"]
STAGES = ("teacher*.training/5", "clone-1*.training/*", "students*", "accuracy*")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mnist_folder):
    work = tmp_path_factory.mktemp("whole")
    result = run_here(*SIZE, f"--workdir={work}")
    assert result.returncode == 0, result.stderr
    return (work / "results.json").read_bytes()


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_gives_the_same_results_to_the_bit(mnist_folder, tmp_path):
    """In subprocesses: this process has eight devices, whose threads split sums differently."""
    dice, whole, work = random.Random(0), tmp_path / "whole", tmp_path / "killed"
    finish(start(*SIZE, f"--workdir={whole}"))
    for stage in STAGES:
        process = start(*SIZE, f"--workdir={work}")
        assert wait_for(process, work, f"checkpoints/{stage}"), stage
        if stage != STAGES[-1]:  # the report takes less
            time.sleep(dice.uniform(0, 1))
        process.kill()
        assert process.wait() == -signal.SIGKILL, stage
    finish(start(*SIZE, f"--workdir={work}"))
    assert (work / "results.json").read_bytes() == (whole / "results.json").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_exits_143_and_the_same_command_goes_on(whole, tmp_path, number):
    words = [*SIZE, f"--workdir={tmp_path}"]
    stopped = run_stopped(*words, folder=tmp_path, pattern="checkpoints/students*.training", number=number)
    assert stopped.returncode == 143 and not stopped.stderr
    assert f"stopped by {number.name}" in stopped.stdout and "the same command resumes" in stopped.stdout
    again = run_here(*words)
    assert again.returncode == 0 and "teacher, runs" not in again.stdout
    assert (tmp_path / "results.json").read_bytes() == whole


# Eight runs over eight devices. Teachers train long enough to be stopped by a signal before their end.
EIGHT = [
    "--config=configs/mnist.py:smoke",
    "--config.runs=8",
    "--config.runs_at_once=8",
    "--config.arms=auxiliary,cross_all,clone",
]
EIGHT += ["--config.teacher.batch=128", "--config.teacher.epochs=3", "--config.checkpoint_every=50"]
THREE_AXES = ["--config.mesh.replica=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


def cluster(work, *args):
    return start_two(*EIGHT, f"--workdir={work}", *args, devices=4)


def values(work):
    return {arm["name"]: arm["runs"] for arm in arms_in(work)}


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory, mnist_folder):
    work = tmp_path_factory.mktemp("one")
    result = run_here(*EIGHT, f"--workdir={work}")
    assert result.returncode == 0, result.stderr
    return values(work)


def assert_close(actual, expected):
    for arm in expected:  # rounding, which Adam amplifies, flips images at the border: at most 20 of 10,000
        np.testing.assert_allclose(actual[arm], expected[arm], atol=2e-3, err_msg=arm)


def test_a_signal_to_one_process_stops_both(mnist_folder, tmp_path):
    both = cluster(tmp_path, "--config.teacher.epochs=1000")  # which it never reaches
    assert wait_for(both[0], tmp_path, "checkpoints/teacher*.training/*")
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        finish(process, 143)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_both_go_on_to_what_one_device_gives(on_one_device, tmp_path):
    both = cluster(tmp_path)
    assert wait_for(both[0], tmp_path, "checkpoints/teacher*.training/50")
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        finish(process, 143)
    for process in cluster(tmp_path):
        finish(process)
    assert_close(values(tmp_path), on_one_device)


@pytest.mark.slow
def test_a_run_that_one_process_began_goes_on_with_two(on_one_device, tmp_path):
    pattern = "checkpoints/teacher*.training/50"
    assert run_stopped(*EIGHT, f"--workdir={tmp_path}", folder=tmp_path, pattern=pattern).returncode == 143
    for process in cluster(tmp_path):
        assert "unreadable" not in finish(process)
    assert_close(values(tmp_path), on_one_device)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[], THREE_AXES], ids=["of runs", "of three axes"])
def test_two_processes_of_four_devices_give_what_one_device_gives(on_one_device, tmp_path, mesh):
    for process in cluster(tmp_path, *mesh):
        finish(process)
    assert_close(values(tmp_path), on_one_device)
