"""Steps of Qwen2.5-7B's shape, compiled for pods that are not here; `make preflight`. Needs libtpu.

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
import transformers
from absl import app

from sublim_jax import objectives, preflight
from sublim_jax.models import lora
from sublim_jax.models.decoder import Settings, decoder
from sublim_jax.models.families import family
from sublim_jax.sharding import make_mesh, parameter_shardings, rows_of
from sublim_jax.training import ROWS, Program

ROWS_OF, LENGTH = 64, 256
SUPPORT = tuple(range(15, 35))
SPEC = lora.Lora(8, 8)


def qwen(layers: int = 28) -> Settings:
    config = transformers.AutoConfig.for_model(
        "qwen2",
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return family(config).settings(config)


def on(mesh: Any, tree: Any, dtype: Any) -> Any:
    """Shapes on the mesh by its rules."""
    shardings = parameter_shardings(tree, mesh)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=s), tree, shardings)


def tokens(frozen: Any, key: Any, index: Any) -> Any:
    return jax.random.randint(jax.random.fold_in(key, index), (ROWS_OF, LENGTH), 0, 1000)


def distillation(mesh: Any, layers: int = 28) -> tuple[Program, Any, Any]:
    """(program, adapters' shapes, frozen shapes) of one soft-KL step."""
    settings = dataclasses.replace(qwen(layers), lora=SPEC)
    network, only = decoder(settings), jnp.asarray(SUPPORT)
    base, adapters = lora.split(jax.eval_shape(network.init, jax.random.key(0)))

    def logits(adapters: Any, base: Any, tokens: Any) -> Any:
        module = network.bind(lora.join(base, adapters))
        answer = module.features(tokens, remat=True, place=rows_of(mesh)).output[:, LENGTH // 2 :]
        return module.unembed(answer, only).astype(jnp.float32)

    def loss(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        teacher = jax.lax.stop_gradient(logits(frozen["teacher"], frozen["base"], batch))
        return objectives.kl(logits(params, frozen["base"], batch), teacher), {}

    frozen = {"base": on(mesh, base, jnp.bfloat16), "teacher": on(mesh, adapters, jnp.float32)}
    return Program(loss, optax.adam(2e-4), mesh, tokens, batch_spec=ROWS), on(mesh, adapters, jnp.float32), frozen


def fine_tuning(mesh: Any, layers: int = 28) -> tuple[Program, Any, Any]:
    """(program, parameters' shapes, None) of one supervised step of all parameters."""
    network = decoder(qwen(layers))
    params = on(mesh, jax.eval_shape(network.init, jax.random.key(0)), jnp.float32)

    def loss(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        logits = network.apply(half, batch[:, :-1], remat=True, place=rows_of(mesh)).astype(jnp.float32)
        return objectives.cross_entropy(logits, batch[:, 1:]), {}

    return Program(loss, optax.adam(2e-4), mesh, tokens, batch_spec=ROWS), params, None


def flops(program: Program, params: Any, frozen: Any) -> float:
    batch = jax.eval_shape(tokens, frozen, jax.random.key(0), 0)
    step = jax.grad(lambda p, f, b: program.loss(p, f, b, None)[0][0])
    return preflight.count_flops(step, params, frozen, batch)


CASES = {
    "LoRA distillation, v5e:4x4": ("v5e:4x4", {"replica": 1, "fsdp": 4, "tensor": 4}, distillation),
    "full fine-tuning, v5p:4x4x4": ("v5p:4x4x4", {"replica": 1, "fsdp": 16, "tensor": 4}, fine_tuning),
}


def main(_: list[str]) -> None:
    text = [
        "# Preflight: Qwen2.5-7B's shape on pods that are not here",
        "",
        f"`make preflight`, {datetime.date.today()}: jax {jax.__version__}, compiled on CPU through libtpu; "
        f"{ROWS_OF} rows of {LENGTH} tokens, every layer recomputed in the backward pass.",
        "",
        "| step | a device holds, GB | of | fits | FLOPs | over the model's | with half the layers | compiled in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    moved = ["", "| step | collective | a step | GB a device |", "|---|---|---|---|"]
    for name, (topology, sizes, make) in CASES.items():
        began = time.perf_counter()
        mesh = make_mesh(sizes, preflight.topology(topology))
        program, params, frozen = make(mesh)
        found = preflight.facts(program.lower(params, frozen), flops(program, params, frozen), mesh)
        seconds = time.perf_counter() - began
        print(preflight.describe(name, found), flush=True)
        half = flops(*make(mesh, layers=14)) / found.flops
        ratio = found.flops / model_flops(make)
        gb = 1 << 30
        text.append(
            f"| {name} | {found.peak / gb:.2f} | {(found.memory or 0) / gb:.0f} | {'yes' if found.fits else 'no'} | "
            f"{found.flops:.2e} | {ratio:.2f} × | {half:.2f} of it | {seconds:.0f} s |"
        )
        for kind, (count, size) in sorted(found.collectives.items()):
            moved.append(f"| {name} | {kind} | {count} | {size / gb:.2f} |")
    text += moved
    text += [
        "",
        "Model FLOPs are 2 N for every token of a forward pass, and 4 N of a backward pass: distillation counts 4 N "
        "for the student (its base is frozen, no gradients of weights) and 2 N for the teacher, fine-tuning 6 N. What "
        "is above that is recomputation, attention and adapters. FLOPs are counted in the traced program, where a "
        "scanned layer counts as often as it runs; the compiler's own count takes it once. Collectives are read off "
        "the compiled program, those of a scanned layer as often as it runs.",
    ]
    (Path(__file__).parents[1] / "docs" / "preflight.md").write_text("\n".join(text) + "\n")


def model_flops(make: Any) -> float:
    shapes = jax.eval_shape(decoder(qwen()).init, jax.random.key(0))
    kernels = sum(leaf.size for leaf in jax.tree.leaves(shapes["layers"]))
    tokens = ROWS_OF * LENGTH
    if make is distillation:
        return 6 * kernels * tokens
    return 6 * (kernels + qwen().vocab * qwen().width) * tokens


if __name__ == "__main__":
    app.run(main)
