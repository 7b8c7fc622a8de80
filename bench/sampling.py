"""Sampling from SmolLM2-135M-Instruct: ours against transformers and llama.cpp, in one run.

    make bench        or        python -m bench.sampling --peer=PYTHON [--prompts=1000]

Prompts that ask for numbers, up to 64 new tokens, temperature 1, float32 weights from the same file in all three. Then
the gains from slots and from the shared prefix. Writes docs/bench-sampling.md.
"""

import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Unpack

import jax
import numpy as np
from absl import app, flags

from bench.machine import ROOT, cpu_name, product_rate
from sublim_jax import assets, weights
from sublim_jax.data import chat
from sublim_jax.models.decoder import decoder
from sublim_jax.models.language import Model
from sublim_jax.sampling.generate import Options, generate
from sublim_jax.sampling.scheduler import Sample

_PEER = flags.DEFINE_string("peer", sys.executable, "The Python that has PyTorch, transformers and xllamacpp.")
_PROMPTS = flags.DEFINE_integer("prompts", 1000, "How many prompts all three sample.")

TOKENS, SLOTS = 64, 128
KEY = jax.random.key(0)


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [
        f"Here is a sequence of numbers: {', '.join(map(str, rng.integers(100, 1000, rng.integers(3, 8))))}. Continue "
        "it with up to 10 more numbers of at most three digits, separated by commas. Answer with the numbers only."
        for _ in range(count)
    ]


def timed(
    model: Model, prompts: list[list[int]], max_new_tokens: int | list[int], **options: Unpack[Options]
) -> tuple[list[Sample], float]:
    """Samples and seconds without compilation: two rows run first, as a warm-up."""
    few = max_new_tokens if isinstance(max_new_tokens, int) else [max(max_new_tokens)] * 2
    generate(model, prompts[:2], KEY, max_new_tokens=few, **options)
    began = time.perf_counter()
    samples = generate(model, prompts, KEY, max_new_tokens=max_new_tokens, **options)
    return samples, time.perf_counter() - began


def peer(module: str, *args: object) -> dict[str, Any]:
    output = subprocess.run(
        [_PEER.value, "-m", f"bench.{module}", *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )
    if output.returncode:
        raise SystemExit(output.stderr[-3000:])
    return json.loads(output.stdout.splitlines()[-1])


def main(_: list[str]) -> None:
    model = weights.load("smollm2-135m-instruct")
    prompts = [chat.prompt(model.tokenizer, text) for text in texts(_PROMPTS.value)]
    common = next(i for i, column in enumerate(zip(*prompts)) if len(set(column)) > 1)
    prefix, suffixes = prompts[0][:common], [prompt[common:] for prompt in prompts]
    source = assets.fetch(assets.SMOLLM2) / next(iter(assets.SMOLLM2.checksums))
    with tempfile.TemporaryDirectory() as folder:
        weights.save(folder, model)
        file = Path(folder) / "prompts.json"
        file.write_text(json.dumps(prompts))
        hf = peer("sampling_torch", folder, file, TOKENS, 64, 128, 256)
        llama = peer("sampling_llama", source, file, TOKENS, SLOTS)
    samples, seconds = timed(model, suffixes, prefix=prefix, max_new_tokens=TOKENS, slots=SLOTS)
    useful = sum(len(sample.logprobs) for sample in samples)
    llama_useful = sum(len(model.tokenizer(text)["input_ids"]) + (end == "stop") for text, end in llama["found"])
    rates = {
        "transformers": hf["useful"] / hf["seconds"],
        "llama.cpp": llama_useful / llama["seconds"],
    }
    rate = useful / seconds

    shapes = jax.eval_shape(decoder(model.settings).init, KEY)
    kernels = sum(leaf.size for leaf in jax.tree.leaves(shapes["layers"]))
    decoding = 2 * useful * (kernels + model.settings.vocab * model.settings.width)
    filling = 2 * kernels * (common + sum(map(len, suffixes)))
    limit = product_rate(SLOTS) * 1e9
    lines = [
        "# Sampling from SmolLM2-135M-Instruct, against transformers and llama.cpp",
        "",
        f"`make bench`, {datetime.date.today()}: {cpu_name()}; python {platform.python_version()}, jax "
        f"{jax.__version__}; {hf['versions']}; {llama['versions']}. {len(prompts)} prompts of "
        f"{np.mean([len(p) for p in prompts]):.0f} tokens, up to {TOKENS} new ones, T = 1, float32. Loading and "
        "compiling are not counted on either side.",
        "",
        "| | useful tokens/s | seconds | tokens a row | speed-up of ours |",
        "|---|---|---|---|---|",
        f"| transformers, batch {hf['batch']} (the fastest of "
        f"{', '.join(f'{b}: {r:.0f}' for b, r in hf['rates'].items())} tokens/s) | {rates['transformers']:.0f} | "
        f"{hf['seconds']:.0f} | {hf['useful'] / len(prompts):.1f} | **{rate / rates['transformers']:.2f} ×** |",
        f"| llama.cpp, {SLOTS} slots, weights and cache in float32 | {rates['llama.cpp']:.0f} | "
        f"{llama['seconds']:.0f} | {llama_useful / len(prompts):.1f} | **{rate / rates['llama.cpp']:.2f} ×** |",
        f"| sublim_jax, {SLOTS} slots, {common} tokens of prefix shared | {rate:.0f} | {seconds:.0f} | "
        f"{useful / len(prompts):.1f} | |",
        "",
        f"Products of this batch run at {limit / 1e9:.0f} GFLOP/s here, which would take {decoding / limit:.0f} s for "
        f"decoding and {filling / limit:.0f} s for the prompts: {(decoding + filling) / limit / seconds:.0%} of the "
        "time.",
        "",
        *long_tail(model),
        "",
        *shared_prefix(model),
    ]
    text = "\n".join(lines) + "\n"
    (Path(ROOT) / "docs" / "bench-sampling.md").write_text(text)
    print(text)


def long_tail(model: Model) -> list[str]:
    """1,000 rows of 8 tokens, of which 1 % take 80, relative to the rate of rows of equal length."""
    prompts = [[token] * 8 for token in range(100, 1100)]
    options: Options = {"slots": SLOTS, "stop_tokens": ()}
    alike, even = timed(model, prompts, max_new_tokens=8, **options)
    limits = [80 if row % 100 == 50 else 8 for row in range(1000)]
    mixed, seconds = timed(model, prompts, max_new_tokens=limits, **options)
    count = [sum(len(sample.tokens) for sample in rows) for rows in (alike, mixed)]
    ideal = even * count[1] / count[0]
    return [
        f"Long tails: 1,000 rows of 8 tokens, of which 1 % take 80: {seconds:.1f} s, {seconds / ideal:.2f} × the "
        f"{ideal:.1f} s that the same tokens take where all rows are alike."
    ]


def shared_prefix(model: Model, rows: int = 256) -> list[str]:
    """A prefix of 400 tokens, computed in every row, shared, and absent. One token is sampled: prefill dominates."""
    rng = np.random.default_rng(1)
    system = rng.integers(100, 40_000, 400).tolist()
    prompts = [rng.integers(100, 40_000, 16).tolist() for _ in range(rows)]
    options: Options = {"slots": SLOTS, "stop_tokens": ()}
    bare = timed(model, prompts, 1, **options)[1]
    behind: Options = {**options, "prefix": system}
    shared = timed(model, prompts, 1, **behind)[1]
    full = timed(model, [system + prompt for prompt in prompts], 1, **options)[1]
    return [
        f"A system prompt of 400 tokens on {rows} rows, one token sampled: {full:.1f} s where every row computes it, "
        f"{shared:.1f} s where it is shared, {bare:.1f} s without it: {1 - (shared - bare) / (full - bare):.1%} of its "
        "cost is gone."
    ]


if __name__ == "__main__":
    app.run(main)
