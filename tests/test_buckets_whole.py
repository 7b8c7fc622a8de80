"""Whole runs in a bucket, killed, stopped, and by two processes: the same bytes as in a local folder."""

import fnmatch
import json
import signal
import time

import pytest
from etils import epath
from launch_kit import arms_in, assert_same_arms, finish, start, start_two

pytestmark = pytest.mark.slow

# Larger than `smoke`, so that the run is still at work when it is killed.
MNIST = ["--config=configs/mnist.py:smoke", "--config.inputs.count=20000", "--config.student.epochs=3"]


@pytest.fixture
def wait_for(emulator, bucket):
    """Waits until a run has written `count` objects that match a pattern."""

    def wait(process, pattern, count=1):
        while process.poll() is None:
            if len(fnmatch.filter(emulator.names(bucket.removeprefix("gs://")), pattern)) >= count:
                return
            time.sleep(0.02)
        pytest.fail(process.communicate()[0])

    return wait


def together(*words):
    """Runs the command in two processes of four devices."""
    for process in start_two(*words, devices=4):
        finish(process)


def test_mnist_killed_and_stopped_ends_with_the_same_results(bucket, wait_for, tmp_path, mnist_folder):
    work = f"{bucket}/run"
    finish(start(*MNIST, f"--workdir={tmp_path}"))
    process = start(*MNIST, f"--workdir={work}")
    wait_for(process, "run/checkpoints/teacher*.training/*/commit_success.txt", 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process = start(*MNIST, f"--workdir={work}")  # takes over once the killed run's heartbeat has stopped
    wait_for(process, "run/checkpoints/students*.training/*")
    process.send_signal(signal.SIGTERM)
    output = finish(process, 143)
    assert "no sign of life, going on in its place" in output and "the same command resumes" in output
    output = finish(start(*MNIST, f"--workdir={work}"))
    assert "sign of life" not in output and "teacher, runs" not in output and "Traceback" not in output
    assert_same_arms(arms_in(work), arms_in(tmp_path), atol=1e-5)


def test_mnist_by_two_processes(bucket, tmp_path, mnist_folder):
    words = [*MNIST, "--config.runs=8", "--config.runs_at_once=8", "--config.arms=auxiliary,cross_all,clone"]
    for work in (f"{bucket}/two", tmp_path):
        together(*words, f"--workdir={work}")
    assert_same_arms(arms_in(f"{bucket}/two"), arms_in(tmp_path), atol=1e-5)


def test_samples_killed_and_stopped_and_by_two_processes(bucket, wait_for, tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Number {i}?"}) + "\n" for i in range(40)))
    words = ["--config=configs/sample.py", f"--config.model.name={tiny_folder}", f"--config.prompts={prompts}"]
    # Work for about a minute; a part is written every ten seconds.
    words += ["--config.slots=4", "--config.max_new_tokens=300", "--config.num_samples=100", "--config.chat=False"]
    finish(start(*words, f"--workdir={tmp_path / 'work'}"))
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        process = start(*words, f"--workdir={bucket}/work")
        wait_for(process, "work/checkpoints/samples*.jsonl.parts/*", 1 if code == 143 else 2)
        process.send_signal(number)
        finish(process, code)
    finish(start(*words, f"--workdir={bucket}/work"))
    together(*words, f"--workdir={bucket}/two")
    expected = (tmp_path / "work" / "samples.jsonl").read_bytes()
    for work in ("work", "two"):
        assert (epath.Path(bucket) / work / "samples.jsonl").read_bytes() == expected
