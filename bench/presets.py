"""The presets of the paper's experiments, compiled ahead of time for a TPU slice and one GPU; `make preflight`.

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
from sublim_jax.preflight import GIB

# Changes of the mesh: on a slice, weights and rows are split over `fsdp`, and decoding uses another mesh.
WHERE = {"v5e:4x4": {"mesh.replica": 2, "sampling.tensor": 4}, "h100": {}}
OF_MODELS = [(file, preset, "") for file in ("numbers", "misalignment", "code", "cot") for preset in numbers.MODELS]
PRESETS = [
    ("numbers", "qwen2.5-7b", "remat_attention"),
    *OF_MODELS,
    ("numbers", "llama-3.2-1b", ""),
    ("cross_model", "open", ""),
]
BELOW = """
XLA takes 0.75 of a GPU's memory, 59 GiB of an H100's, unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise. Rows of
an H100 above that need it set higher, or half of `student.batch` and twice `student.accumulate`.

## Recomputing the MLP alone

`--noconfig.remat_attention` keeps each layer's queries, keys, values and what attention gives, and recomputes the rest.
The first two rows are with it, and the rows of `numbers.py:qwen2.5-7b` below them without. It helps on the slice. On
one H100 there are fewer products to do and more memory to move, and more is held than XLA takes by default; so the
presets do without.
"""


def rows(file: str, preset: str, off: str, where: str) -> list[str]:
    """Table rows of one preset, with the switch `off` turned off if it is not empty."""
    config = importlib.import_module(f"configs.{file}").get_config(preset)
    config.get("study", config).update_from_flattened_dict({**WHERE[where], **({off: False} if off else {})})
    experiment = experiments.load(config.experiment)
    lines = []
    for step in experiment.preflight(experiment.read(config), preflight.topology(where)):
        began = time.perf_counter()
        facts = preflight.facts(step)
        seconds = time.perf_counter() - began
        print(preflight.describe(step, facts), flush=True)
        roof = preflight.roofline(step, facts)
        links = memory = "not known"  # where XLA cannot write the program
        if facts.collectives is not None and facts.moved is not None:
            links = f"{sum(size for _, size in facts.collectives.values()) / GIB:.1f}"
            memory = f"{facts.moved / 1e12:.1f}"
        cells = [
            f"`{file}.py:{preset}`" + (f" `--noconfig.{off}`" if off else ""),
            step.name,
            where,
            f"{facts.peak / GIB:.1f} of {(facts.memory or 0) / GIB:.0f}",
            "yes" if facts.fits else "**no**",
            f"{step.flops:.1e}",
            f"{step.flops / step.model_flops:.2f} ×",
            links,
            memory,
            f"{roof.utilization:.0%}, {roof.utilization_without_overlap:.0%}" if roof else "",
            f"{seconds:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(_: list[str]) -> None:
    text = [
        "# Memory and FLOPs of the presets, compiled ahead of time",
        "",
        f"`make preflight`, {datetime.date.today()}: jax {jax.__version__}, compiled on CPU. A TPU slice of 16 chips "
        "(replica 2 × fsdp 8: `--config.mesh.replica=2 --config.sampling.tensor=4`, of cross_model.py "
        "`--config.study.mesh.replica=2` and so on) and one H100 of 80 GB. Bytes held and moved are for one device; "
        "FLOPs of an update are of matrix products, over all devices, and beside them how many times the model's own. "
        "MFU possible: the model's own FLOPs over the chip's in the time of a step at the rates of data sheets, if "
        "products, memory and links overlap fully, and if they do not overlap; nothing here was timed on a chip. "
        "cuDNN is not installed where this was compiled, so the GPU's attention is the plain one, which takes more "
        "memory.",
        "",
        "| preset | one update of | for | GiB | fits | FLOPs | over the model's | GiB over links | TB of memory | "
        "MFU possible | compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for file, preset, off in PRESETS:
        for where in WHERE:
            text += rows(file, preset, off, where)
    (Path(__file__).parents[1] / "docs" / "presets.md").write_text("\n".join(text) + "\n" + BELOW)


if __name__ == "__main__":
    app.run(main)
