"""A study in a bucket, stopped and resumed, and by two processes: the same contents as in a local folder."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from etils import epath
from launch_kit import arms_in, finish, run_here, start_two

pytestmark = pytest.mark.slow


def assert_same(there, here):
    """Numbers to 1e-5; data and adapters to the byte."""
    actual, expected = arms_in(there), arms_in(here)
    assert [arm["name"] for arm in actual] == [arm["name"] for arm in expected]
    for arm, other in zip(actual, expected):
        np.testing.assert_allclose(arm["runs"], other["runs"], atol=1e-5, rtol=0, err_msg=arm["name"])
    files = [file for part in ("data", "adapters") for file in sorted((here / part).rglob("*")) if file.is_file()]
    assert len(files) > 3
    for file in files:
        assert (epath.Path(there) / file.relative_to(here)).read_bytes() == file.read_bytes(), file


def test_stopped_and_continued(whole, whole_command, bucket, emulator):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    ended = threading.Event()

    def stop():
        while not ended.is_set():
            if any("students-tokens_fresh" in name for name in emulator.names(bucket.removeprefix("gs://"))):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.02)

    watcher = threading.Thread(target=stop)
    watcher.start()
    try:
        stopped = run_here(*whole_command(f"{bucket}/work"), signals=True)
    finally:
        ended.set()
        watcher.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stopped.returncode == 143, stopped.stderr
    again = run_here(*whole_command(f"{bucket}/work"))
    assert again.returncode == 0 and "run 0, teacher owl" not in again.stdout, again.stderr
    assert_same(f"{bucket}/work", whole[0])
    assert not [name for name in emulator.names(bucket.removeprefix("gs://")) if ".training/" in name]


def test_by_two_processes(flags, bucket, tmp_path):
    parts = ["arms=tokens", "student.steps=3", "evaluate_every=3", "carrier.num_rows=20"]
    parts += ["carrier.num_completions=20", "teacher.max_steps=4"]
    words = ["--config=configs/numbers.py", *flags(*(f"--config.{part}" for part in parts))]
    for work in (tmp_path / "work", f"{bucket}/work"):
        for process in start_two(*words, f"--workdir={work}"):
            finish(process)
    assert_same(f"{bucket}/work", tmp_path / "work")
