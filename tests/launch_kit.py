"""Ways to run launch.py: in this process, in a subprocess, and in several that are killed or work together."""

import contextlib
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from filelock import FileLock

import launch as launcher
from sublim_jax import signals as process_signals

ROOT = Path(__file__).parents[1]
# A subprocess runs as if only requirements.txt were installed: torch, which transformers would import, is hidden.
LAUNCH = (
    sys.executable,
    "-c",
    """
import runpy, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name == "torch" else find(name, *where)
sys.argv[0] = "launch.py"
runpy.run_path("launch.py", run_name="__main__")
""",
)


@contextlib.contextmanager
def shared_folder(factory, name):
    """A folder shared by all workers of the session, under a lock; the first worker has to create it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        yield folder


def run_here(*words, signals=False, devices=1):
    """Runs the command in this process; returns its exit code, stdout and stderr like `subprocess.run`.

    Args:
      signals: whether the command installs its signal handlers.
    """
    out, errors = io.StringIO(), io.StringIO()
    config: Any = jax.config  # mypy does not know its flags
    first, cached = jax.devices()[:devices], config.jax_enable_compilation_cache
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.setattr(jax, "devices", lambda *_: first)
        if not signals:
            patch.setattr(process_signals, "install", lambda: None)
        try:
            code = launcher.run(["launch.py", *map(str, words)])
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)  # which --preflight turns off
    gc.collect()  # releases the lock of the workdir
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=errors.getvalue())


class Running:
    """Stands for a process in `wait_for`: it polls as running until `ended` is set."""

    def __init__(self):
        self.ended = threading.Event()

    def poll(self):
        return 0 if self.ended.is_set() else None


def run_stopped(*words, folder, pattern, number=signal.SIGTERM):
    """Like `run_here`, but sends this process a signal once a file in the folder matches the pattern."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    running = Running()

    def stop():
        if wait_for(running, folder, pattern):
            os.kill(os.getpid(), number)

    watcher = threading.Thread(target=stop)
    watcher.start()
    try:
        return run_here(*words, signals=True)
    finally:
        running.ended.set()
        watcher.join()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def assert_refused(result, *words):
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("launch.py: ")
    for word in words:
        assert word in lines[0]


def start(*words, devices=1):
    """Starts the command in a subprocess."""
    return start_process(*LAUNCH, *words, devices=devices)


def start_process(*command, devices=1):
    """Starts any command in a subprocess."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    words, pipe = list(map(str, command)), subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def start_two(*words, devices=1):
    """Starts the command in two subprocesses that run together."""
    join = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    return [start(*words, *join, f"--process_id={number}", devices=devices) for number in range(2)]


def finish(process, code=0):
    """Waits for the process, asserts its exit code and returns its output."""
    output, _ = process.communicate()
    assert process.returncode == code, output
    return output


def arms_in(work):
    """The arms of a run's results.json, here or in a bucket."""
    return json.loads((epath.Path(work) / "results.json").read_text())["arms"]


def assert_same_arms(actual, expected, atol, rtol=0.0):
    """Asserts that both have the same arms, with the same value in every run up to rounding."""
    assert [arm["name"] for arm in actual] == [arm["name"] for arm in expected]
    for arm, other in zip(actual, expected):
        values, known = (np.asarray(some["runs"], float) for some in (arm, other))  # null: not a number
        np.testing.assert_allclose(values, known, atol=atol, rtol=rtol, err_msg=arm["name"])


def wait_for(process, folder, pattern):
    """Waits until a file matches the pattern; False if the process ended first."""
    while process.poll() is None:
        if any(Path(folder).glob(pattern)):
            return True
        time.sleep(0.02)
    return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
