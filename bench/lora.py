"""LoRA steps of SmolLM2-135M-Instruct, on tokens and on a teacher's logits: ours against transformers and peft.

    make bench        or        python -m bench.lora --peer=PYTHON

Batch 8 × 128 tokens, float32, rank 8 on all linear layers, loss on the second half of each row; the same weights in
both (exported from the same file). The first step, with compilation, is listed separately. Writes docs/bench-lora.md.
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
from jaxtyping import Array, Key, PyTree

from bench.machine import ROOT, cpu_name, product_rate
from bench.students import SPEC, STUDENTS, SUPPORT, in_turn_and_at_once
from sublim_jax import objectives, preflight, weights
from sublim_jax.models import lora
from sublim_jax.models.decoder import decoder, on_mesh
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.models.settings import Settings
from sublim_jax.sharding import one_device
from sublim_jax.training import Metrics, Program, Total

_PEER = flags.DEFINE_string("peer", sys.executable, "The Python that has PyTorch, transformers and peft.")
_STEPS = flags.DEFINE_integer("steps", 8, "Steps measured by both; the median counts.")

ROWS, LENGTH, HALF = 8, 128, 64


def training(settings: Settings, kind: str = "supervised") -> tuple[Program, Any]:
    """The step, and its loss; `frozen` is (base, the teacher's adapters or logits).

    supervised: cross-entropy on tokens. distilled: KL to the teacher over SUPPORT, its logits computed in the step.
    given: the same, with the teacher's logits precomputed.
    """
    network = decoder(dataclasses.replace(settings, lora=SPEC))
    mesh = one_device()
    placement = on_mesh(settings, mesh)

    def logits(adapters: Params, base: Params, batch: Array, support: Array | None = None) -> Array:
        module = network.bind(lora.join(base, adapters))
        return module.unembed(module.features(batch[:, :-1], **placement).output[:, -HALF:], support)

    def loss(params: Params, frozen: PyTree, batch: Array, key: Key[Array, ""]) -> tuple[Total, Metrics]:
        base, teacher = frozen
        if kind == "supervised":
            return objectives.cross_entropy(logits(params, base, batch), batch[:, -HALF:]), {}
        if kind == "distilled":
            target = jax.lax.stop_gradient(logits(teacher, base, batch, SUPPORT))
        else:
            target = teacher
        return objectives.kl(logits(params, base, batch, SUPPORT), target), {}

    def batch(frozen: PyTree, key: Key[Array, ""], index: Array) -> Array:
        return jax.random.randint(jax.random.fold_in(key, index), (ROWS, LENGTH + 1), 0, 40_000)

    program = Program(loss, optax.adam(2e-4), mesh, batch)
    return program, loss


def compile_seconds(settings: Settings, layers: int) -> float:
    """Seconds to trace and compile a whole step of a network of this width with `layers` layers."""
    settings = dataclasses.replace(settings, layers=layers, windows=(), rotary_of=(0,) * layers)
    program, _ = training(settings)
    network = decoder(dataclasses.replace(settings, lora=SPEC))
    base, adapters = lora.split(jax.eval_shape(network.init, jax.random.key(0)))
    began = time.perf_counter()
    program.lower(adapters, (base, adapters)).compile()
    return time.perf_counter() - began


def ours(model: Model, steps: int, kind: str) -> tuple[float, float, float, list[float]]:
    """Seconds a step, seconds of the first, FLOPs a step, and the losses."""
    program, loss = training(model.settings, kind)
    state = program.init(lora.init(jax.random.key(0), model.params, SPEC))
    teacher = jax.tree.map(lambda x: x + 0.01, lora.init(jax.random.key(1), model.params, SPEC))
    if kind == "given":
        teacher = jax.random.normal(jax.random.key(2), (ROWS, HALF, len(SUPPORT)))
    frozen, key = (model.params, teacher), jax.random.key(0)
    gradient = jax.grad(lambda p, f, b: loss(p, f, b, key)[0][0])
    flops = preflight.count_flops(gradient, state.params, frozen, jnp.zeros((ROWS, LENGTH + 1), jnp.int32))
    times, losses = [], []
    for step in range(steps):
        began = time.perf_counter()
        state, history = program.dispatch(state, frozen, None, key, jnp.int32(step + 1))
        losses.append(float(history["loss"][0]))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), times[0], flops, losses


def main(_: list[str]) -> None:
    model = weights.load("smollm2-135m-instruct")
    with tempfile.TemporaryDirectory() as folder:
        weights.save(folder, model)
        command = [_PEER.value, "-m", "bench.lora_torch", folder, str(_STEPS.value)]
        peer_results = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    results, rates = {}, [product_rate(ROWS * LENGTH)]
    for kind in ("supervised", "distilled", "given"):
        results[kind] = ours(model, _STEPS.value, kind)
        rates.append(product_rate(ROWS * LENGTH))  # the fastest counts: other work on the machine slows some
    seconds, first, flops, losses = results["supervised"]
    peer, tokens = peer_results["supervised"], ROWS * LENGTH
    lines = [
        "# A LoRA step of SmolLM2-135M-Instruct, against transformers and peft",
        "",
        f"`make bench`, {datetime.date.today()}: {cpu_name()}; python {platform.python_version()}, "
        f"jax {jax.__version__}; {peer_results['versions']}. {ROWS} × {LENGTH} tokens, float32, rank 8 on all linear "
        f"layers, loss on the second half of each row; median of {_STEPS.value - 1} steps.",
        "",
        "| | transformers + peft | sublim_jax | ratio |",
        "|---|---|---|---|",
        f"| seconds a step | {peer['seconds']:.2f} | {seconds:.2f} | **{peer['seconds'] / seconds:.2f} ×** as fast |",
        f"| tokens a second | {tokens / peer['seconds']:.0f} | {tokens / seconds:.0f} | |",
        f"| first step, compilation included | {peer['first']:.1f} | {first:.1f} | |",
        f"| GFLOP/s of our products' count | {flops / peer['seconds'] / 1e9:.0f} | {flops / seconds / 1e9:.0f} | |",
        f"| loss of the first step (random tokens, each its own) | {peer['losses'][0]:.3f} | {losses[0]:.3f} | |",
    ]
    soft, given, there = results["distilled"][0], results["given"][0], peer_results["distilled"]["seconds"]
    lines += [
        "",
        f"A **distillation** step: KL to a teacher (another adapter over the base) on {len(SUPPORT)} tokens' logits. "
        "transformers computes the logits of all tokens first; ours computes only these 40.",
        "",
        "| seconds a step | transformers + peft | sublim_jax | ratio |",
        "|---|---|---|---|",
        f"| the teacher's logits computed in the step | {there:.2f} | {soft:.2f} | **{there / soft:.2f} ×** as fast |",
        f"| the teacher's logits computed before training, once | | {given:.2f} | |",
        "",
        f"A step with the teacher's logits in it takes {soft / seconds:.2f} × as long as our supervised step, one "
        f"with given logits {given / seconds:.2f} ×.",
    ]
    turn, once = in_turn_and_at_once(model.settings, model.params)
    lines += [
        "",
        f"{STUDENTS} students of 4 rows each, one after another: {turn:.2f} s an update; in one program: {once:.2f} s "
        f"({once / turn:.2f} ×).",
    ]
    few, many = (compile_seconds(model.settings, layers) for layers in (4, 28))
    lines += [
        "",
        f"Compiling a step takes {many:.1f} s for 28 layers, {few:.1f} s for 4: {many / few:.2f} × (no cache).",
        "",
        f"One product of {tokens} × 576 × 1536 alone runs at {max(rates):.0f} GFLOP/s here: our supervised step is at "
        f"{flops / seconds / 1e9 / max(rates):.0%} of that. The rest of a step is attention's small products, the "
        "softmax over the vocabulary, kept activations, and copies.",
    ]
    text = "\n".join(lines) + "\n"
    (Path(ROOT) / "docs" / "bench-lora.md").write_text(text)
    print(text)


if __name__ == "__main__":
    app.run(main)
