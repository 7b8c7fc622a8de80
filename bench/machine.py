"""Where measurements are made."""

import os
import platform
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).parents[1]


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{os.cpu_count()} cores of {name}"


def product_rate(rows: int) -> float:
    """GFLOP/s of one product of an MLP's shape, alone."""
    x, w = jnp.ones((rows, 576)), jnp.ones((576, 1536))
    product = jax.jit(jnp.dot)
    product(x, w).block_until_ready()
    began = time.perf_counter()
    for _ in range(20):
        y = product(x, w)
    y.block_until_ready()
    return 20 * 2 * rows * 576 * 1536 / (time.perf_counter() - began) / 1e9


def measure(command: list[str], **env: str) -> tuple[float, float, str]:
    """Seconds, peak MB and output of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None  # pipes
    output = process.stdout.read()
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed:\n{output}\n{errors}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024, output
