"""Our side of the MNIST experiment: `launch.py` as a user runs it, and the FLOPs of both sides."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import measure
from sublim_jax import assets

# Products of one step of one run: forward, gradients of three kernels, gradients of two hidden layers.
MACS = 784 * 256 + 256 * 256 + 256 * 13
FLOPS_A_STEP = 2 * 1024 * (3 * MACS - 784 * 256)
TRAININGS, STEPS = 5, 295


class Finished(NamedTuple):
    seconds: float
    megabytes: float
    results: dict[str, Any]  # of results.json


def flops(runs: int) -> float:
    """FLOPs of the training products of all arms of `configs/mnist.py:bench`."""
    return float(runs * TRAININGS * STEPS * FLOPS_A_STEP)


def process(scratch: Path, runs: int, *more: str) -> Finished:
    """Runs `launch.py` on all runs at once, with its compilation cache in `scratch`."""
    cache, work = scratch / "cache", scratch / "work"
    cache.mkdir(exist_ok=True)
    if not (cache / "mnist").exists():
        (cache / "mnist").symlink_to(assets.cache_folder() / "mnist")
    command = [sys.executable, "launch.py", "--config=configs/mnist.py:bench", f"--workdir={work}"]
    command += [f"--config.runs={runs}", f"--config.runs_at_once={runs}", *more]
    seconds, megabytes, _ = measure(command, SUBLIM_JAX_CACHE=str(cache))
    return Finished(seconds, megabytes, json.loads((work / "results.json").read_text()))
