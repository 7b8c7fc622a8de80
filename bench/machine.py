"""Where measurements are made."""

import os
import platform
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).parents[1]
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}  # of Linux's flags, the widest first


def cpu_name() -> str:
    """Cores, name and widest vector instructions: peers that do not use the widest differ by them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name, instructions = said["model name"], said["flags"].split()
    except (OSError, KeyError):
        return f"{os.cpu_count()} cores of {platform.processor()}"
    vectors = next((f" with {vector}" for flag, vector in VECTORS.items() if flag in instructions), "")
    return f"{os.cpu_count()} cores of {name}{vectors}"


def product_rate(rows: int, inputs: int = 576, outputs: int = 1536) -> float:
    """GFLOP/s of one product alone, by default of the shape of SmolLM2's MLP."""
    x, w = jnp.ones((rows, inputs)), jnp.ones((inputs, outputs))
    product = jax.jit(jnp.dot)
    product(x, w).block_until_ready()
    began = time.perf_counter()
    for _ in range(20):
        y = product(x, w)
    y.block_until_ready()
    return 20 * 2 * rows * inputs * outputs / (time.perf_counter() - began) / 1e9


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
