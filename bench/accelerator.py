"""Throughput of our steps on one GPU, as shares of its peak. `bench/accelerator.sh` runs every part.

    python -m bench.accelerator --parts=small,large --out=DIR [--skip_full] [--tiny]
    python -m bench.accelerator --write=DIR     writes docs/bench-accelerator.md from the measurements in DIR
    python -m bench.accelerator --expect=h100   compiles the models' programs for a card that is not attached
                                                (make .compilers/installed): memory, expected seconds

    mnist        the paper's six arms, 100 runs at once, as a whole process, compilation included
    mnist_torch  the same in batched PyTorch (bench/mnist_torch.py)
    small        1.5B: a LoRA step, a full step, 8 students together against 8 in turn, decoding at batch 1, 64, 256;
                 at 64 also with the layers scanned, and with XLA's merging of products, its default
    large        7B: the same without the full step, which needs 65.7 GB
    generate     1.5B, batch 64: our `generate` against transformers'

Training: model FLOPs (2 N a token forward, 4 N backward, 2 N where the base is frozen) over the card's peak. Decoding:
bytes that a step must read (weights once, the cache) over time and memory bandwidth. Weights are random: only shapes
count. Each part is a file of its own in DIR, written again after every row.
"""

import dataclasses
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from jax.sharding import Mesh
from jaxtyping import Array, Key

from bench import accelerator_report, mnist_ours, students
from bench.machine import ROOT, measure
from bench.students import STUDENTS
from sublim_jax import assets, objectives, preflight, weights
from sublim_jax.errors import is_of_memory, one_line
from sublim_jax.models import lora
from sublim_jax.models.decoder import decoder, on_mesh, unstack
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.models.settings import Settings
from sublim_jax.sampling.capacity import unstacked_engine
from sublim_jax.sampling.engine import Engine, Fixed, compiled, state_shardings
from sublim_jax.sampling.generate import generate
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.sharding import abstract, make_mesh, named, one_device, parameter_shardings, place_key, put
from sublim_jax.training import Metrics, Program, Total

_PARTS = flags.DEFINE_list("parts", ["small", "large"], "Which parts; see above.")
_OUT = flags.DEFINE_string("out", "", "Where each part's JSON goes; empty: it is printed alone.")
_WRITE = flags.DEFINE_string("write", "", "Write docs/bench-accelerator.md from this folder, and measure nothing.")
_EXPECT = flags.DEFINE_string("expect", "", "Compile for this card (--preflight's names), and measure nothing.")
_SKIP_FULL = flags.DEFINE_bool("skip_full", False, "Leave out the full step of the small model.")
_TINY = flags.DEFINE_bool("tiny", False, "Two layers and few rows, on any device: whether it runs, not how fast.")

MODELS = {"small": "Qwen/Qwen2.5-1.5B-Instruct", "large": "Qwen/Qwen2.5-7B-Instruct"}
# By jax's or PyTorch's name of the device: FLOP/s in bfloat16 without sparsity and in float32, bytes/s of memory.
PEAK = {
    "NVIDIA H100 80GB HBM3": (989e12, 67e12, 3.35e12),
    "NVIDIA H200": (989e12, 67e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 19.5e12, 2.04e12),
}
NOT_KNOWN = (None, None, None)
# Rates that others have measured for programs like these: bfloat16 products, and bytes of memory.
REACHED_FLOPS, REACHED_BYTES = 400e12, 3e12
RECOMPUTED = 1.4  # FLOPs of a step that recomputes its layers in the backward pass, over the model's own
COPIED = 1.75  # upper bound on the bytes that a decoding step moves, over those that it needs
STEPS, LOOKS, TOKENS = 6, 4, 16  # training steps; decoding calls, and tokens per call
BATCH = 64  # rows that both sides of `generate` decode


class Sizes(NamedTuple):
    rows: int  # of a training step
    length: int
    columns: int  # of the cache
    slots: tuple[int, ...]
    new_tokens: int  # of `generate`, after a prompt of as many
    runs: int  # of MNIST


FULL = Sizes(16, 1024, 512, (1, 64, 256), 128, 100)
TINY = Sizes(2, 32, 64, (1, 4), 4, 2)


class Rows:
    """The measurements of a part, in a file that is replaced atomically after every row."""

    def __init__(self, part: str, out: str):
        self.file = Path(out) / f"{part}.json" if out else None
        self.record: dict[str, Any] = {
            "part": part,
            "date": str(datetime.date.today()),
            "tiny": _TINY.value,
            "rows": [],
        }

    def about(self, device: str, versions: dict[str, str]) -> None:
        self.record |= {"device": device, "versions": versions}

    def add(self, what: str, **values: Any) -> None:
        self.record["rows"].append({"what": what, **values})
        print(json.dumps(self.record["rows"][-1]), flush=True)
        if self.file:
            scratch = self.file.with_suffix(".tmp")
            scratch.write_text(json.dumps(self.record, indent=1) + "\n")
            scratch.replace(self.file)

    def attempt(self, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Adds what `measure` returns, or the error that it raises; later rows are measured either way."""
        try:
            self.add(what, **measure())
        except Exception as error:  # compilers and devices raise what they like
            text = one_line(error)
            self.add(what, failed=f"too little memory ({text})" if is_of_memory(error) else text)


def here() -> tuple[str, dict[str, str]]:
    """The device, and the versions. Raises SystemExit where there is no GPU to measure."""
    device = jax.devices()[0]
    if device.platform != "gpu" and not _TINY.value:
        raise SystemExit(f"no GPU: jax finds {device.device_kind}")
    return device.device_kind, {"python": platform.python_version(), "jax": jax.__version__}


def share(amount: float, seconds: float, peak: float | None) -> float | None:
    return amount / seconds / peak if peak else None


def parameters(settings: Settings) -> int:
    """The number of parameters in a token's matrix products: the layers' and the unembedding's."""
    shapes = jax.eval_shape(decoder(settings).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["layers"])) + settings.vocab * settings.width


def settings_of(name: str) -> Settings:
    settings = weights.shape_of(name)
    if not _TINY.value:
        return settings
    return dataclasses.replace(
        settings, layers=2, windows=(), rotary_of=(0, 0), width=128, mlp_width=256, vocab=1024, heads=4, key_heads=2
    )


def made(make: Callable[..., Params], mesh: Mesh, *given: Params) -> Params:
    """The result of `make` on the device; or its shapes, on a mesh of devices that are not attached."""
    if mesh.devices.flat[0] in jax.devices():
        return make(*given)
    shapes = jax.eval_shape(make, *given)
    return abstract(shapes, parameter_shardings(shapes, mesh))


def random_base(settings: Settings, mesh: Mesh) -> Params:
    """Weights in bfloat16."""
    init = decoder(settings).init
    half = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), init(key)))
    return made(lambda: half(jax.random.key(0)), mesh)


# --------------------------------------------------------------------------------------------------------- models


class Job(NamedTuple):
    """A program to compile, how to measure it, and the seconds that the measurement is expected to take."""

    what: str
    lower: Callable[[], Any]
    measure: Callable[[Any], dict[str, Any]]
    expected: float
    options: dict[str, int] | None = None  # of the compiler


def jobs_of(name: str, sizes: Sizes, mesh: Mesh, full: bool) -> list[Job]:
    settings = settings_of(name)
    base = random_base(settings, mesh)
    jobs = [training_job(settings, base, sizes, mesh, False), *students_jobs(settings, base, mesh)]
    if full:
        jobs.append(training_job(settings, base, sizes, mesh, True))
    layers = made(unstack, mesh, base)
    jobs += [decoding_job(settings, layers, mesh, slots, sizes.columns) for slots in sizes.slots]
    slots = sizes.slots[1]
    merged = decoding_job(settings, layers, mesh, slots, sizes.columns)
    merged = merged._replace(what=f"{merged.what}, products merged", options={"xla_gpu_dot_merger_threshold_mb": 32})
    return [*jobs, merged, decoding_job(settings, base, mesh, slots, sizes.columns, scanned=True)]


def _measured(job: Job, program: Future[Any]) -> dict[str, Any]:
    return job.measure(program.result())


def measure_model(rows: Rows, name: str, sizes: Sizes, full: bool) -> None:
    """Compiles all programs, in threads since compiling releases the GIL, before any is timed."""
    jobs = jobs_of(name, sizes, one_device(), full)
    with ThreadPoolExecutor(len(jobs)) as pool:
        began = time.perf_counter()
        programs = {}
        for job in jobs:
            try:
                programs[job.what] = pool.submit(job.lower().compile, job.options)
            except Exception as error:
                rows.add(job.what, failed=str(error)[:200])
    rows.add("compiling all of these", seconds=time.perf_counter() - began)
    for job in jobs:
        if job.what in programs:
            rows.attempt(job.what, partial(_measured, job, programs[job.what]))


def expect(card: str) -> None:
    """Prints each program's memory on a card that is not attached, and its expected seconds."""
    mesh = make_mesh({"replica": 1, "fsdp": 1, "tensor": 1}, preflight.devices(card))
    jax.config.update("jax_enable_compilation_cache", False)
    lines = [["model", "program", "GB held", "compiled here in, s", "measuring it, s"]]
    for part, name in MODELS.items():
        for job in jobs_of(name, FULL, mesh, part == "small"):
            began = time.perf_counter()
            memory = job.lower().compile({**preflight.UNTIMED, **(job.options or {})}).memory_analysis()
            seconds = time.perf_counter() - began
            held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            held -= memory.alias_size_in_bytes
            lines.append([name, job.what, f"{held / 1e9:.1f}", f"{seconds:.0f}", f"{job.expected:.2f}"])
            print(lines[-1], flush=True)
    print("\n".join(accelerator_report.table(lines)))


def step_seconds(program: Program, step: Any, params: Params, frozen: Params | None, key: Any) -> float:
    """Median seconds of five steps, after one warm-up step."""
    state = program.init(params)
    key, times = place_key(key, named(program.mesh)), []
    for number in range(STEPS):
        began = time.perf_counter()
        state, history = step(state, frozen, None, key, put(jnp.int32(number + 1), named(program.mesh)))
        jax.block_until_ready(history)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def training_job(settings: Settings, base: Params, sizes: Sizes, mesh: Mesh, full: bool) -> Job:
    """A step on all weights, in bfloat16 with Adam's moments; or on LoRA's, in float32, over the frozen base."""
    network = decoder(settings if full else dataclasses.replace(settings, lora=students.SPEC))
    where = on_mesh(settings, mesh)
    frozen, params = None, base
    if not full:
        frozen, params = base, made(lambda: lora.init(jax.random.key(1), base, students.SPEC), mesh)

    def loss(params: Params, frozen: Params, batch: Array, key: Key[Array, ""]) -> tuple[Total, Metrics]:
        module = network.bind(params if full else lora.join(frozen, params))
        output = module.features(batch[:, :-1], remat=True, **where).output

        # The vocabulary is the widest layer: one row's logits at a time.
        def row(pair: tuple[Array, Array]) -> Array:
            logits = module.unembed(pair[0]).astype(jnp.float32)
            return jnp.stack(objectives.cross_entropy(logits[None], pair[1][None]))

        total = jax.lax.map(jax.checkpoint(row), (output, batch[:, 1:])).sum(0)
        return (total[0], total[1]), {}

    def batch(frozen: Params, key: Key[Array, ""], index: Array) -> Array:
        return jax.random.randint(jax.random.fold_in(key, index), (sizes.rows, sizes.length + 1), 0, 1000)

    program = Program(loss, optax.adam(1e-5), mesh, batch)
    tokens = sizes.rows * sizes.length
    work = (6 if full else 4) * parameters(settings) * tokens

    def measure(step: Any) -> dict[str, Any]:
        seconds = step_seconds(program, step, params, frozen, jax.random.key(0))
        done = share(work, seconds, peaks()[0])
        return {"seconds": seconds, "tokens_per_second": tokens / seconds, "share": done, "of": "FLOP/s"}

    what = f"{'full' if full else 'LoRA'} step, {sizes.rows} × {sizes.length} tokens"
    return Job(what, lambda: program.lower(params, frozen), measure, STEPS * RECOMPUTED * work / REACHED_FLOPS)


def students_jobs(settings: Settings, base: Params, mesh: Mesh) -> list[Job]:
    """Eight LoRA students of 4 × 128 tokens, one after another and in one program."""

    def start(count: int) -> Params:
        adapters = lora.init(jax.random.key(0), base, students.SPEC)
        return jax.tree.map(lambda x: jnp.stack([x] * count) if count > 1 else x, adapters)

    single, many = (made(partial(start, count), mesh) for count in (1, STUDENTS))
    alone, together = students.programs(settings, mesh, remat=True)
    keys = jax.random.split(jax.random.key(0), STUDENTS)
    work = 4 * parameters(settings) * STUDENTS * students.ROWS * students.LENGTH
    seconds = STEPS * RECOMPUTED * work / REACHED_FLOPS

    def in_turn(step: Any) -> dict[str, Any]:
        return {"seconds": STUDENTS * step_seconds(alone, step, single, base, keys[0])}

    def at_once(step: Any) -> dict[str, Any]:
        return {"seconds": step_seconds(together, step, many, base, keys)}

    return [
        Job(
            f"{STUDENTS} LoRA students of 4 × 128 tokens, in turn",
            lambda: alone.lower(single, base),
            in_turn,
            seconds / STUDENTS,
        ),
        Job("the same in one program", lambda: together.lower(many, base), at_once, seconds),
    ]


def decoding_job(
    settings: Settings, base: Params, mesh: Mesh, slots: int, columns: int, *, scanned: bool = False
) -> Job:
    """One token for every slot, from a half-full cache; layers unstacked, or scanned as on TPUs."""
    engine = Engine(decoder(settings), settings, mesh, Sampler(), slots, 1, 16, columns, TOKENS, dtype=jnp.bfloat16)
    engine = engine if scanned else unstacked_engine(engine)
    fixed, read = Fixed(base), 2 * parameters(settings) + engine.cache_bytes

    def lower() -> Any:
        state = abstract(jax.eval_shape(engine._start), state_shardings(engine))
        return compiled(engine).advance.lower(fixed, state, jax.ShapeDtypeStruct((), jnp.int32))

    def measure(advance: Any) -> dict[str, Any]:
        state = compiled(engine).start()
        state = state._replace(active=state.active | True, limit=state.limit + columns)
        state, times = state._replace(length=state.length + columns // 2), []
        for _ in range(LOOKS):
            began = time.perf_counter()
            state, generated = advance(fixed, state, jnp.int32(TOKENS))
            jax.block_until_ready(generated)
            times.append((time.perf_counter() - began) / TOKENS)
        seconds = statistics.median(times[1:])
        done = share(read, seconds, peaks()[2])
        return {"seconds": seconds, "tokens_per_second": slots / seconds, "share": done, "of": "bandwidth"}

    expected = LOOKS * TOKENS * COPIED * read / REACHED_BYTES
    what = f"decoding, batch {slots}, cache of {columns}" + (", layers scanned" if scanned else "")
    return Job(what, lower, measure, expected)


def peaks() -> tuple[float | None, float | None, float | None]:
    return PEAK.get(jax.devices()[0].device_kind, NOT_KNOWN)


# ------------------------------------------------------------------------------------------------------- generate


def measure_generate(rows: Rows, sizes: Sizes) -> None:
    """Our `generate` and transformers', in successive processes, so that each has the whole card."""
    settings = settings_of(MODELS["small"])
    given = ("width", "layers", "heads", "key_heads", "head_size", "mlp_width", "vocab")
    shape = {name: getattr(settings, name) for name in given} | {"batch": BATCH, "tokens": sizes.new_tokens}
    command = [sys.executable, "-m", "bench.generate_torch", json.dumps(shape)]
    peer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    device, versions = here()
    rows.about(device, versions)
    peer_row = {"failed": f"transformers: {(peer.stderr.strip().splitlines() or ['?'])[-1][:200]}"}
    if not peer.returncode:
        peer_row = json.loads(peer.stdout.splitlines()[-1])
        versions |= peer_row.pop("versions")
    what = f"batch {BATCH}, {sizes.new_tokens} tokens behind {sizes.new_tokens}"
    rows.add(f"transformers' generate, {what}", **peer_row)

    model = SimpleNamespace(network=decoder(settings), settings=settings, params=random_base(settings, one_device()))
    model.tokenizer = SimpleNamespace(decode=lambda tokens, **options: "")
    model.config = SimpleNamespace(max_position_embeddings=None)
    prompt_tokens = jax.random.randint(jax.random.key(1), (BATCH, sizes.new_tokens), 0, 1000)
    prompts = [row.tolist() for row in jax.device_get(prompt_tokens)]

    def measure() -> dict[str, Any]:
        times = []
        for _ in range(2):  # the first compiles
            began = time.perf_counter()
            samples = generate(
                cast(Model, model),
                prompts,
                jax.random.key(0),
                max_new_tokens=sizes.new_tokens,
                stop_tokens=(),
                slots=BATCH,
                steps=16,
            )
            times.append(time.perf_counter() - began)
        return {"seconds": times[-1], "tokens_per_second": sum(len(s.tokens) for s in samples) / times[-1]}

    rows.attempt(f"our generate, {what}", measure)


# ---------------------------------------------------------------------------------------------------------- MNIST


def measure_mnist(rows: Rows, sizes: Sizes) -> None:
    """Whole processes: with an empty compilation cache, then again with the one that the first run filled."""
    assets.fetch(assets.MNIST)
    extra = []
    if _TINY.value:
        extra = ["--config.inputs.count=3000", "--config.teacher.epochs=1", "--config.student.epochs=1"]
    with tempfile.TemporaryDirectory() as scratch:
        for what in ("first time", "again"):
            finished = mnist_ours.process(Path(scratch), sizes.runs, "--config.checkpoint_every=100000", *extra)
            device = finished.results["devices"].split(" × ")[-1].split(",")[0]
            rows.about(device, finished.results["versions"])
            shutil.rmtree(Path(scratch) / "work")
            rows.add(
                f"MNIST, {sizes.runs} runs × 6 arms, {what}",
                seconds=finished.seconds,
                share=share(mnist_ours.flops(sizes.runs), finished.seconds, PEAK.get(device, NOT_KNOWN)[1]),
                of="float32 FLOP/s",
                arms={arm["name"]: [arm["mean"], arm["ci95"]] for arm in finished.results["arms"]},
            )


def measure_mnist_torch(rows: Rows, sizes: Sizes) -> None:
    folder = str(assets.fetch(assets.MNIST))
    device = "cpu" if _TINY.value else "cuda"
    command = [sys.executable, "-m", "bench.mnist_torch", folder, str(sizes.runs), device, "1" if _TINY.value else "5"]
    seconds, _, output = measure(command)
    result = json.loads(output.splitlines()[-1])
    rows.about(result["device"], {"torch": result["torch"]})
    done = share(mnist_ours.flops(sizes.runs), seconds, PEAK.get(result["device"], NOT_KNOWN)[1])
    rows.add(
        f"MNIST in batched PyTorch, {sizes.runs} runs × 6 arms",
        seconds=seconds,
        share=done,
        of="float32 FLOP/s",
        arms=result["arms"],
    )


def main(_: list[str]) -> None:
    if _WRITE.value:
        return accelerator_report.write(Path(_WRITE.value))
    if _EXPECT.value:
        return expect(_EXPECT.value)
    sizes = TINY if _TINY.value else FULL
    if unknown := set(_PARTS.value) - {"mnist", "mnist_torch", "generate", *MODELS}:
        raise SystemExit(f"--parts: {', '.join(sorted(unknown))} is none of mnist, mnist_torch, small, large, generate")
    for part in _PARTS.value:
        rows = Rows(part, _OUT.value)
        if part == "mnist":
            measure_mnist(rows, sizes)
        elif part == "mnist_torch":
            measure_mnist_torch(rows, sizes)
        elif part == "generate":
            measure_generate(rows, sizes)
        else:
            rows.about(*here())
            measure_model(rows, MODELS[part], sizes, part == "small" and not _SKIP_FULL.value)
    return None


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".93")
    app.run(main)
