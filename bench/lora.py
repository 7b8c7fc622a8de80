"""A LoRA step of SmolLM2-135M-Instruct: ours against transformers and peft, in one run.

    make bench        or        python -m bench.lora --peer=PYTHON

Batch 8 × 128 tokens, float32, rank 8 on all linear layers, loss on the second half of each row; the same weights in
both (exported from the same file). The first step, with compilation, is given apart. Writes docs/bench-lora.md.
"""

import dataclasses
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from bench.machine import ROOT, cpu_name, product_rate
from sublim_jax import objectives, preflight, weights
from sublim_jax.models import lora
from sublim_jax.models.decoder import Settings, decoder
from sublim_jax.sharding import make_mesh
from sublim_jax.training import Program
from sublim_jax.weights import huggingface

_PEER = flags.DEFINE_string("peer", sys.executable, "The Python that has PyTorch, transformers and peft.")
_STEPS = flags.DEFINE_integer("steps", 8, "Steps measured by both; the median counts.")

ROWS, LENGTH, HALF = 8, 128, 64
SPEC = lora.Lora(8, 8)


def training(settings: Settings) -> tuple[Program, Any]:
    """The step, and its loss."""
    network = decoder(dataclasses.replace(settings, lora=SPEC))

    def loss(params, frozen, batch, key):
        module = network.bind(lora.join(frozen, params))
        logits = module.unembed(module.features(batch[:, :-1]).output[:, -HALF:])
        return objectives.cross_entropy(logits, batch[:, -HALF:]), {}

    def batch(frozen, key, index):
        return jax.random.randint(jax.random.fold_in(key, index), (ROWS, LENGTH + 1), 0, 40_000)

    mesh = make_mesh({"replica": 1, "fsdp": 1, "tensor": 1})
    program = Program(loss, optax.adam(2e-4), mesh, batch)
    return program, loss


def compile_seconds(settings: Settings, layers: int) -> float:
    """Of the whole step of a network of this width and so many layers, from its trace to the machine's code."""
    settings = dataclasses.replace(settings, layers=layers, windows=(), rotary_of=(0,) * layers)
    program, _ = training(settings)
    network = decoder(dataclasses.replace(settings, lora=SPEC))
    base, adapters = lora.split(jax.eval_shape(network.init, jax.random.key(0)))
    began = time.perf_counter()
    program.lower(adapters, base).compile()
    return time.perf_counter() - began


def ours(model: weights.Model, steps: int) -> tuple[float, float, float, list[float]]:
    """Seconds a step, seconds of the first, FLOPs a step, and the losses."""
    program, loss = training(model.settings)
    state = program.init(lora.init(jax.random.key(0), model.params, SPEC))
    key = jax.random.key(0)
    gradient = jax.grad(lambda p, f, b: loss(p, f, b, None)[0][0])
    flops = preflight.count_flops(gradient, state.params, model.params, jnp.zeros((ROWS, LENGTH + 1), jnp.int32))
    times, losses = [], []
    for step in range(steps):
        began = time.perf_counter()
        state, history = program.dispatch(state, model.params, None, key, jnp.int32(step + 1))
        losses.append(float(history["loss"][0]))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), times[0], flops, losses


def main(_: list[str]) -> None:
    model = weights.load("smollm2-135m-instruct")
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(folder, model.params, model.settings, model.config)
        command = [_PEER.value, "-m", "bench.lora_torch", folder, str(_STEPS.value)]
        theirs = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    seconds, first, flops, losses = ours(model, _STEPS.value)
    tokens = ROWS * LENGTH
    ratio = theirs["seconds"] / seconds
    lines = [
        "# A LoRA step of SmolLM2-135M-Instruct, against transformers and peft",
        "",
        f"`make bench`, {datetime.date.today()}: {cpu_name()}; python {platform.python_version()}, "
        f"jax {jax.__version__}; {theirs['versions']}. {ROWS} × {LENGTH} tokens, float32, rank 8 on all linear layers, "
        f"loss on the second half of each row; median of {_STEPS.value - 1} steps.",
        "",
        "| | transformers + peft | sublim_jax | ratio |",
        "|---|---|---|---|",
        f"| seconds a step | {theirs['seconds']:.2f} | {seconds:.2f} | **{ratio:.2f} ×** as fast |",
        f"| tokens a second | {tokens / theirs['seconds']:.0f} | {tokens / seconds:.0f} | |",
        f"| first step, compilation included | {theirs['first']:.1f} | {first:.1f} | |",
        f"| GFLOP/s of our products' count | {flops / theirs['seconds'] / 1e9:.0f} | {flops / seconds / 1e9:.0f} | |",
        f"| loss of the first step (random tokens, each its own) | {theirs['losses'][0]:.3f} | {losses[0]:.3f} | |",
    ]
    few, many = (compile_seconds(model.settings, layers) for layers in (4, 28))
    lines += [
        "",
        f"Compiling this step takes {many:.1f} s for 28 layers, {few:.1f} s for 4: {many / few:.2f} × (no cache).",
        "",
        f"One product of {tokens} × 576 × 1536 alone runs at {product_rate(tokens):.0f} GFLOP/s here. The rest "
        "of a step is attention's small products, the softmax over the vocabulary, kept activations, and copies.",
    ]
    text = "\n".join(lines) + "\n"
    (Path(ROOT) / "docs" / "bench-lora.md").write_text(text)
    print(text)


if __name__ == "__main__":
    app.run(main)
