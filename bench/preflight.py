"""Steps of Qwen2.5-7B's shape, compiled ahead of time for TPU pods; `make preflight`. Needs libtpu.

    JAX_PLATFORMS=cpu python -m bench.preflight

LoRA distillation on v5e:4x4 (soft KL on 20 of the vocabulary's tokens, teacher and student over one base in bfloat16),
and full fine-tuning in float32 on v5p:4x4x4. Writes docs/preflight.md.
"""

import dataclasses
import datetime
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app

from sublim_jax import objectives, preflight, weights
from sublim_jax.models import attention, lora
from sublim_jax.models.decoder import decoder, on_mesh
from sublim_jax.models.settings import Settings
from sublim_jax.sharding import abstract, make_mesh, parameter_shardings
from sublim_jax.training import Program

ROWS, LENGTH = 64, 256
SUPPORT = tuple(range(15, 35))
SPEC = lora.Lora(8, 8)


def qwen(layers: int = 28) -> Settings:
    settings = weights.shape_of("Qwen/Qwen2.5-7B-Instruct")
    return dataclasses.replace(settings, layers=layers, windows=(0,) * layers)


def on(mesh: Any, tree: Any, dtype: Any) -> Any:
    """Abstract arrays with the shardings of the mesh's parameter rules."""
    return abstract(tree, parameter_shardings(tree, mesh), dtype)


def tokens(rows: int, length: int) -> Any:
    return lambda frozen, key, index: jax.random.randint(jax.random.fold_in(key, index), (rows, length), 0, 1000)


def distillation(
    mesh: Any, layers: int = 28, rows: int = ROWS, length: int = LENGTH, **where: Any
) -> tuple[Program, Any, Any]:
    """(program, adapters' shapes, frozen shapes) of one soft-KL step."""
    where = {**on_mesh(qwen(layers), mesh), **where}
    settings = dataclasses.replace(qwen(layers), lora=SPEC)
    network, only = decoder(settings), jnp.asarray(SUPPORT)
    base, adapters = lora.split(jax.eval_shape(network.init, jax.random.key(0)))

    def logits(adapters: Any, base: Any, tokens: Any) -> Any:
        module = network.bind(lora.join(base, adapters))
        answer = module.features(tokens, remat=True, **where).output[:, length // 2 :]
        return module.unembed(answer, only).astype(jnp.float32)

    def loss(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        teacher = jax.lax.stop_gradient(logits(frozen["teacher"], frozen["base"], batch))
        return objectives.kl(logits(params, frozen["base"], batch), teacher), {}

    frozen = {"base": on(mesh, base, jnp.bfloat16), "teacher": on(mesh, adapters, jnp.float32)}
    program = Program(loss, optax.adam(2e-4), mesh, tokens(rows, length))
    return program, on(mesh, adapters, jnp.float32), frozen


def fine_tuning(mesh: Any, layers: int = 28) -> tuple[Program, Any, Any]:
    """(program, parameters' shapes, None) of one supervised step of all parameters."""
    network = decoder(qwen(layers))
    params = on(mesh, jax.eval_shape(network.init, jax.random.key(0)), jnp.float32)

    def loss(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        logits = network.apply(half, batch[:, :-1], remat=True, **on_mesh(qwen(layers), mesh)).astype(jnp.float32)
        return objectives.cross_entropy(logits, batch[:, 1:]), {}

    return Program(loss, optax.adam(2e-4), mesh, tokens(ROWS, LENGTH)), params, None


CASES = {
    "LoRA distillation, v5e:4x4": ("v5e:4x4", {"replica": 1, "fsdp": 4, "tensor": 4}, distillation),
    "full fine-tuning, v5p:4x4x4": ("v5p:4x4x4", {"replica": 1, "fsdp": 16, "tensor": 4}, fine_tuning),
}


def main(_: list[str]) -> None:
    text = [
        "# Preflight: Qwen2.5-7B's shape on TPU pods, compiled ahead of time",
        "",
        f"`make preflight`, {datetime.date.today()}: jax {jax.__version__}, compiled on CPU through libtpu; "
        f"{ROWS} rows of {LENGTH} tokens, every layer recomputed in the backward pass.",
        "",
        "| step | a device holds, GiB | of | fits | trained weights + optimiser + temporaries | FLOPs | "
        "over the model's | with half the layers | compiled in | seconds of products + memory + links | MFU possible |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    moved = ["", "| step | collective | a step | GiB a device |", "|---|---|---|---|"]
    for name, (topology, sizes, make) in CASES.items():
        began = time.perf_counter()
        mesh = make_mesh(sizes, preflight.topology(topology))
        step = preflight.training_step(name, *make(mesh), model_flops(make))
        facts = preflight.facts(step)
        seconds = time.perf_counter() - began
        print(preflight.describe(step, facts), flush=True)
        half = preflight.training_step(name, *make(mesh, layers=14), 1).flops / step.flops
        gib = preflight.GIB
        text.append(
            f"| {name} | {facts.peak / gib:.2f} | {(facts.memory or 0) / gib:.0f} | {'yes' if facts.fits else 'no'} | "
            f"{step.weights / gib:.2f} + {step.optimizer / gib:.2f} + {facts.temporaries / gib:.2f} | "
            f"{step.flops:.2e} | {step.flops / step.model_flops:.2f} × | {half:.2f} of it | {seconds:.0f} s |"
        )
        for kind, (count, size) in sorted((facts.collectives or {}).items()):
            moved.append(f"| {name} | {kind} | {count} | {size / gib:.2f} |")
        roof = preflight.roofline(step, facts)
        if roof is None:
            text[-1] += " not known: XLA cannot write this program | |"
            continue
        text[-1] += f" {roof.products:.3g} + {roof.memory:.3g} + {roof.links:.3g} | {roof.utilization:.0%} |"
    text += moved + long_texts()
    text += [
        "",
        "Model FLOPs are 2 N for every token of a forward pass, and 4 N of a backward pass: distillation counts 4 N "
        "for the student (its base is frozen, no gradients of weights) and 2 N for the teacher, fine-tuning 6 N. What "
        "is above that is recomputation, attention and adapters. FLOPs are counted in the traced program, where a "
        "scanned layer counts as often as it runs; the compiler's own count includes it once. Collectives are read off "
        "the compiled program, those of a scanned layer as often as it runs.",
    ]
    (Path(__file__).parents[1] / "docs" / "preflight.md").write_text("\n".join(text) + "\n")


def long_texts() -> list[str]:
    """The distillation step on texts of 4096 tokens, with plain attention and with the flash kernel."""
    lines = ["", "| 16 rows of 4096 tokens, v5e:4x4 | a device holds, GiB | fits |", "|---|---|---|"]
    mesh = make_mesh({"replica": 1, "fsdp": 4, "tensor": 4}, preflight.topology("v5e:4x4"))
    for name, attend in {"plain attention": attention.xla, "flash kernel (chosen on TPUs)": attention.on(mesh)}.items():
        step = preflight.training_step(name, *distillation(mesh, rows=16, length=4096, attend=attend), 1)
        facts = preflight.facts(step)
        lines.append(f"| {name} | {facts.peak / preflight.GIB:.2f} | {'yes' if facts.fits else 'no'} |")
        print(lines[-1], flush=True)
    return lines


def model_flops(make: Any) -> float:
    shapes = jax.eval_shape(decoder(qwen()).init, jax.random.key(0))
    kernels = sum(leaf.size for leaf in jax.tree.leaves(shapes["layers"]))
    tokens = ROWS * LENGTH
    if make is distillation:
        return 6 * kernels * tokens
    return 6 * (kernels + qwen().vocab * qwen().width) * tokens


if __name__ == "__main__":
    app.run(main)
