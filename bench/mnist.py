"""MNIST noise distillation: ours against batched PyTorch (`bench/mnist_torch.py`), alternating, in one run.

    make bench        or        python -m bench.mnist --peer=PYTHON [--runs=8] [--repeats=2]

Whole processes are timed, imports, data, compilation and checkpoints included; ours starts with an empty
compilation cache. Memory is the peak resident size. Writes docs/bench-mnist.md, or the GPU's page on a GPU.
"""

import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path

import jax
from absl import app, flags

from bench import mnist_ours
from bench.machine import ROOT, cpu_name, measure, product_rate
from sublim_jax import assets

_RUNS = flags.DEFINE_integer("runs", 8, "Runs trained at once by both.")
_REPEATS = flags.DEFINE_integer("repeats", 2, "How often each is measured; the faster time counts for both.")
_PEER = flags.DEFINE_string("peer", sys.executable, "The Python that has PyTorch.")
_PROBE = flags.DEFINE_bool("memory_probe", True, "Also measure the memory of one further run.")

PRODUCT = (1024, 784, 256)  # of the first layer, of all runs alike


def ours(runs: int) -> tuple[float, float, dict[str, float]]:
    with tempfile.TemporaryDirectory() as scratch:
        seconds, megabytes, results = mnist_ours.process(Path(scratch), runs)
    return seconds, megabytes, {arm["name"]: arm["mean"] for arm in results["arms"]}


def torchs(runs: int, device: str) -> tuple[float, float, dict[str, float], str]:
    folder = str(assets.cache_folder() / "mnist")
    command = [_PEER.value, "-m", "bench.mnist_torch", folder, str(runs), device]
    seconds, megabytes, output = measure(command)
    result = json.loads(output.splitlines()[-1])
    return seconds, megabytes, result["arms"], result["torch"]


def main(arguments: list[str]) -> None:
    assets.fetch(assets.MNIST)
    gpu = jax.devices()[0].platform == "gpu"
    runs, device = _RUNS.value, "cuda" if gpu else "cpu"
    jax_results, torch_results, rates = [], [], []
    for _ in range(_REPEATS.value):
        torch_results.append(torchs(runs, device))
        jax_results.append(ours(runs))
        (torch_seconds, torch_mb, *_), (seconds, mb, _) = torch_results[-1], jax_results[-1]
        rates.append(product_rate(*PRODUCT))
        print(f"torch {torch_seconds:.1f} s {torch_mb:.0f} MB, ours {seconds:.1f} s {mb:.0f} MB")
    fast, slow = min(jax_results), min(torch_results)
    gflops = [mnist_ours.flops(runs) / seconds / 1e9 for seconds in (fast[0], slow[0])]
    lines = [
        f"# MNIST noise distillation, {runs} runs, against batched PyTorch",
        "",
        f"`make bench`, {datetime.date.today()}: {jax.devices()[0].device_kind if gpu else cpu_name()}; "
        f"python {platform.python_version()}, jax {jax.__version__}, torch {slow[3]}. "
        f"Whole processes, compilation included, best of {_REPEATS.value}, alternating.",
        "",
        "| | PyTorch | sublim_jax | ratio |",
        "|---|---|---|---|",
        f"| seconds | {slow[0]:.1f} | {fast[0]:.1f} | **{slow[0] / fast[0]:.2f} ×** as fast |",
        f"| peak memory, MB | {slow[1]:.0f} | {fast[1]:.0f} | **{fast[1] / slow[1]:.2f}** of it |",
        f"| training products, GFLOP/s over the whole time | {gflops[1]:.0f} | {gflops[0]:.0f} | |",
    ]
    if not gpu:
        limit = max(rates)
        lines.append(
            f"| share of one product alone ({' × '.join(map(str, PRODUCT))}, {limit:.0f} GFLOP/s) "
            f"| {gflops[1] / limit:.0%} | {gflops[0] / limit:.0%} | |"
        )
    if _PROBE.value:
        more = ours(runs + 4)
        lines += [f"| each further run, MB ({runs} → {runs + 4} runs) | | {(more[1] - fast[1]) / 4:.0f} | |"]
    lines += ["", "| arm | PyTorch | sublim_jax |", "|---|---|---|"]
    lines += [f"| {name} | {a:.3f} | {b:.3f} |" for (name, a), b in zip(slow[2].items(), fast[2].values())]
    text = "\n".join(lines) + "\n"
    (ROOT / "docs" / f"bench-mnist{'-gpu' if gpu else ''}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    app.run(main)
