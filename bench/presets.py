"""The presets of the paper's experiments, compiled for a TPU slice and for one GPU that are not here; `make preflight`.

    JAX_PLATFORMS=cpu python -m bench.presets        needs libtpu, and jax's compiler for GPUs

Writes docs/presets.md.
"""

import datetime
import importlib
import time
from pathlib import Path

import jax
from absl import app

from configs import numbers
from sublim_jax import experiments, preflight
from sublim_jax.preflight import GB

WHERE = {"v5e:4x4": 4, "h100": 1}  # and the mesh axis tensor
PRESETS = [(file, preset) for file in ("numbers", "misalignment", "code", "cot") for preset in numbers.MODELS]
PRESETS += [("numbers", "llama-3.2-1b"), ("cross_model", "open")]


def rows(file: str, preset: str, where: str) -> list[str]:
    config = importlib.import_module(f"configs.{file}").get_config(preset)
    config.get("study", config).mesh.tensor = WHERE[where]
    experiment = experiments.load(config.experiment)
    lines = []
    for step in experiment.preflight(experiment.read(config), preflight.topology(where)):
        began = time.perf_counter()
        found = preflight.facts(step)
        seconds = time.perf_counter() - began
        print(preflight.describe(step, found), flush=True)
        moved = sum(size for _, size in found.collectives.values())
        cells = [
            f"`{file}.py:{preset}`",
            step.name,
            where,
            f"{found.peak / GB:.1f} of {(found.memory or 0) / GB:.0f}",
            "yes" if found.fits else "**no**",
            f"{step.flops:.1e}",
            f"{step.flops / step.model_flops:.2f} ×",
            f"{moved / GB:.1f}",
            f"{seconds:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(_: list[str]) -> None:
    text = [
        "# Presets, compiled for machines that are not here",
        "",
        f"`make preflight`, {datetime.date.today()}: jax {jax.__version__}, compiled on CPU. A TPU slice of 16 chips "
        "(fsdp 4 × tensor 4) and one H100 of 80 GB (`--config.mesh.tensor=1`; "
        "`--config.study.mesh.tensor=1` of cross_model.py). Bytes and what is moved are a device's; "
        "FLOPs of an update are of matrix products, over all devices, and beside them how many times the model's own. "
        "cuDNN is not installed where this was compiled, so the GPU's attention is the plain one, which takes more "
        "memory.",
        "",
        "| preset | one update of | for | GB | fits | FLOPs | over the model's | GB moved | compiled in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for file, preset in PRESETS:
        for where in WHERE:
            text += rows(file, preset, where)
    (Path(__file__).parents[1] / "docs" / "presets.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    app.run(main)
