"""Training and decoding of 1.5B and 7B models on one GPU, as shares of what it can do.

    python -m bench.accelerator [--models=NAME,…] [--tiny]

Training: LoRA and full steps in bfloat16, model FLOPs (2 N a token forward, 4 N backward, 2 N where the base is frozen)
over the peak of the card. Students: eight in one program beside eight in turn. Decoding: bytes that a step must read
(weights once, the cache) over time and memory bandwidth, at batch 1, 64 and 256. Weights are random: only shapes count.
Writes docs/bench-accelerator.md.
"""

import dataclasses
import datetime
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from bench.lora import STUDENTS, in_turn_and_at_once
from bench.machine import ROOT
from sublim_jax import objectives, weights
from sublim_jax.models import lora
from sublim_jax.models.decoder import decoder, on_mesh
from sublim_jax.sampling.engine import Engine, Fixed, compiled
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.sharding import one_device
from sublim_jax.training import Program

_MODELS = flags.DEFINE_list(
    "models", ["Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"], "Names of sublim_jax/weights/shapes.py."
)
_TINY = flags.DEFINE_bool("tiny", False, "Two layers and few rows: whether it runs, not how fast.")

# FLOP/s in bfloat16 without sparsity, and bytes/s of memory, by jax's name of the device.
PEAK = {
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
}
ROWS, LENGTH = 16, 1024
COLUMNS = 512


def training(settings, rows: int, length: int, full: bool) -> tuple[float, float]:
    """(seconds a step, model FLOPs a step)."""
    mesh = one_device()
    adapted = settings if full else dataclasses.replace(settings, lora=lora.Lora(8, 8))
    network, where = decoder(adapted), on_mesh(settings, mesh)
    # All parameters in bfloat16 with Adam's moments: a full step of 7B needs 46 GB for them.
    half = jax.jit(lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), network.init(jax.random.key(0))))()
    base, adapters = (None, half) if full else lora.split(half)

    def loss(params, frozen, batch, key):
        module = network.bind(params if full else lora.join(frozen, params))
        output = module.features(batch[:, :-1], remat=True, **where).output

        # The vocabulary is the widest layer: one row's logits at a time.
        def row(pair):
            logits = module.unembed(pair[0]).astype(jnp.float32)
            return jnp.stack(objectives.cross_entropy(logits[None], pair[1][None]))

        total = jax.lax.map(jax.checkpoint(row), (output, batch[:, 1:])).sum(0)
        return (total[0], total[1]), {}

    def batch(frozen, key, index):
        return jax.random.randint(jax.random.fold_in(key, index), (rows, length + 1), 0, 1000)

    params = adapters if full else jax.tree.map(lambda x: x.astype(jnp.float32), adapters)
    program = Program(loss, optax.adam(1e-5), mesh, batch)
    state = program.init(params)
    del params, half, adapters
    times = []
    for step in range(6):
        began = time.perf_counter()
        state, history = program.dispatch(state, base, None, jax.random.key(0), jnp.int32(step + 1))
        float(history["loss"][0])
        times.append(time.perf_counter() - began)
    kernels = parameters(settings)
    return statistics.median(times[1:]), (6 if full else 4) * kernels * rows * length


def parameters(settings) -> int:
    shapes = jax.eval_shape(decoder(settings).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["layers"])) + settings.vocab * settings.width


def decoding(settings, slots: int, columns: int) -> tuple[float, float]:
    """(seconds a step, bytes that it must read)."""
    mesh = one_device()
    network = decoder(settings)
    params = jax.jit(lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), network.init(jax.random.key(0))))()
    engine = Engine(network, settings, mesh, Sampler(), slots, 1, 16, columns, 16, dtype=jnp.bfloat16)
    run, fixed = compiled(engine), Fixed(params)
    state = run.start()
    state = state._replace(active=state.active | True, limit=state.limit + columns, length=state.length + columns // 2)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        state, drawn = run.advance(fixed, state, jnp.int32(16))
        jax.block_until_ready(drawn)
        times.append((time.perf_counter() - began) / 16)
    return statistics.median(times[1:]), 2 * parameters(settings) + engine.cache_bytes


def main(_: list[str]) -> None:
    device = jax.devices()[0]
    flops, bandwidth = PEAK.get(device.device_kind, (None, None))
    lines = [
        "# Training and decoding on one accelerator",
        "",
        f"`python -m bench.accelerator`, {datetime.date.today()}: {device.device_kind}, jax {jax.__version__}; "
        "bfloat16, random weights of these shapes.",
        "",
        "| model | step | ms | tokens/s | share of the peak |",
        "|---|---|---|---|---|",
    ]

    def share(amount: float, seconds: float, peak: float | None) -> str:
        return f"{amount / seconds / peak:.0%}" if peak else "peak not known"

    for name in _MODELS.value:
        settings = weights.shape_of(name)
        rows, length, columns, batches = ROWS, LENGTH, COLUMNS, (1, 64, 256)
        if _TINY.value:
            settings = dataclasses.replace(settings, layers=2, windows=(), rotary_of=(0, 0))
            rows, length, columns, batches = 2, 32, 64, (1, 4)
        for full in (False, True):
            seconds, amount = training(settings, rows, length, full)
            kind = f"{'full' if full else 'LoRA'} step, {rows} × {length} tokens"
            lines.append(
                f"| {name} | {kind} | {seconds * 1e3:.1f} | {rows * length / seconds:.0f} | "
                f"{share(amount, seconds, flops)} |"
            )
            print(lines[-1], flush=True)
        base = jax.jit(
            lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), decoder(settings).init(jax.random.key(0)))  # noqa: B023
        )()
        turn, once = in_turn_and_at_once(settings, base, STUDENTS)
        del base
        lines.append(
            f"| {name} | {STUDENTS} LoRA students of 4 × 128 tokens, in turn | {turn * 1e3:.1f} | | |\n"
            f"| {name} | the same in one program | {once * 1e3:.1f} | | {once / turn:.2f} × the time in turn |"
        )
        print(lines[-1], flush=True)
        for slots in batches:
            seconds, amount = decoding(settings, slots, columns)
            lines.append(
                f"| {name} | decoding, batch {slots}, cache of {columns} | {seconds * 1e3:.2f} | "
                f"{slots / seconds:.0f} | {share(amount, seconds, bandwidth)} |"
            )
            print(lines[-1], flush=True)
    if not _TINY.value:
        (Path(ROOT) / "docs" / "bench-accelerator.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
