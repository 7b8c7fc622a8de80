"""Compiles a step for devices that need not be attached: its FLOPs, the bytes it moves, and whether it fits."""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from sublim_jax import hlo
from sublim_jax.chips import CHIPS, memory_of
from sublim_jax.errors import UserError, one_line
from sublim_jax.models.functional import Params
from sublim_jax.sampling.capacity import beside, weights
from sublim_jax.sampling.engine import Engine, Fixed, compiled, state_shardings
from sublim_jax.sharding import abstract, bytes_of, named, parameter_shardings
from sublim_jax.training import Program

GIB = 1 << 30
# The description of a card that XLA needs to compile for it (GpuTargetConfigProto).
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  device_memory_size: 84929347584
  memory_bandwidth: 3352320000000
  clock_rate_ghz: 1.98
  core_count: 132
  fpus_per_core: 128
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
# Without autotuning, which would time kernels on a card that is not attached.
UNTIMED: dict[str, str | bool] = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "False"}


class Step(NamedTuple):
    """One step, ready to be compiled. Bytes are those of one device, FLOPs those of the whole step."""

    name: str
    lowered: jax.stages.Lowered
    device: jax.Device  # one of its target devices
    devices: int
    flops: float  # of matrix products, from `count_flops`
    model_flops: float  # what the model itself needs: 2 N a token forward, 6 N with a backward pass
    weights: int
    optimizer: int = 0
    beside: int = 0  # held but not used: where a model decodes, its weights in another layout


class Facts(NamedTuple):
    """The compiler's results for a step. Bytes are those of one device."""

    arguments: int
    outputs: int  # beyond those that overwrite arguments
    temporaries: int
    # Kind: (number a step, bytes of their results a device and step). None, as `moved`, where XLA cannot print the
    # program that it has compiled.
    collectives: dict[str, tuple[int, int]] | None
    moved: int | None  # bytes to and from a device's memory in a step
    memory: int | None  # of the device; None where it is not known
    beside: int = 0  # as of the step

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.beside

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.peak <= self.memory


def parameters(params: Params, mesh: Mesh, *counts: int, dtype: DTypeLike | None = None) -> Params:
    """Shapes of parameters with their shardings on a mesh.

    Args:
      params: parameters of one network, or their shapes.
      counts: sizes of leading axes, for several networks.
      dtype: of the result, if not that of `params`.
    """
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*counts, *leaf.shape), leaf.dtype), params)
    return abstract(stacked, parameter_shardings(stacked, mesh, len(counts)), dtype)


def devices(name: str) -> Sequence[jax.Device]:
    """The devices of `--preflight`: "local", or those of a `topology`, which need not be attached."""
    return jax.devices() if name == "local" else topology(name)


def topology(name: str) -> Sequence[jax.Device]:
    """Devices, attached or not: a TPU pod such as "v5e:4x4", one GPU ("h100") or the GPUs of one host ("h100:8").

    Only the compiler is needed: libtpu, or jax's plugin for CUDA.

    Raises UserError where that is not installed or does not know the name.
    """
    from jax.experimental import topologies  # loads the compilers

    card = re.fullmatch(r"h100(?::(\d+))?", name)
    if not card and not re.fullmatch(r"\w+:\d+(x\d+)+", name):
        raise UserError(
            f"--preflight={name}: name local (the devices here), h100, h100:8, or a TPU's topology as v5e:4x4"
        )
    if card:
        given = {"platform": "cuda", "target_config": H100, "topology": f"1x1x{card[1] or 1}"}
    else:
        # Without these, libtpu would report that this machine is no TPU's host, as jax has done already. No chip is
        # opened, so that the lock which reserves one for a process would only refuse a second preflight.
        os.environ |= {
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        }
        given = {"platform": "tpu"}
    try:
        return topologies.get_topology_desc(topology_name=name, **given).devices
    except Exception as error:  # compilers raise what they like
        raise UserError(
            f"--preflight={name}: {one_line(error)}; install the compilers (make .compilers/installed), set "
            "PYTHONPATH=.compilers and JAX_PLATFORMS=cpu, and name v5e:4x4, v5p:4x4x4, h100, h100:8 or another topology"
        ) from error


def training_step(name: str, program: Program, params: PyTree, frozen: PyTree, model_flops: float) -> Step:
    """One update of a training program, lowered for shapes on its mesh."""
    state = program.abstract(params)
    key = jax.ShapeDtypeStruct(
        jax.tree.leaves(params)[0].shape[: min(program.replica_axes, 1)], jax.random.key(0).dtype
    )
    stop = jax.ShapeDtypeStruct((), jnp.int32)
    return Step(
        name,
        program.lower(params, frozen),
        program.mesh.devices.flat[0],
        program.mesh.size,
        count_flops(program._dispatch, state, frozen, None, key, stop),
        model_flops,
        bytes_of(state.params),
        bytes_of(state.opt_state),
    )


def decode_step(name: str, engine: Engine) -> Step:
    """One token for all slots of an engine, lowered for shapes on its mesh."""
    mesh = engine.mesh
    params = weights(engine)
    state = abstract(jax.eval_shape(engine._start), state_shardings(engine))
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=named(mesh))
    traced = compiled(engine).advance.trace(Fixed(params), state, steps)
    rows = engine.devices * engine.adapters * engine.slots
    kernels = (
        sum(leaf.size for leaf in jax.tree.leaves(params["layers"])) + engine.settings.vocab * engine.settings.width
    )
    return Step(
        name,
        traced.lower(),
        mesh.devices.flat[0],
        mesh.size,
        engine.devices * _flops(traced.jaxpr.jaxpr),
        2.0 * rows * kernels,
        bytes_of(params),
        beside=beside(engine),
    )


def facts(step: Step) -> Facts:
    """Compiles a step."""
    absent = step.device.platform == "gpu" and step.device not in jax.devices()
    compiled = step.lowered.compile(UNTIMED if absent else None)
    memory = compiled.memory_analysis()
    assert memory is not None
    text = _text(compiled)
    return Facts(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        None if text is None else hlo.collectives(text),
        None if text is None else hlo.memory_bytes(text),
        memory_of(step.device),
        step.beside,
    )


def _text(compiled: jax.stages.Compiled) -> hlo.Text | None:
    """The compiled program; None where XLA cannot print it (seen for collectives within loops on TPU v5p)."""
    try:
        return hlo.parse(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError:
        return None


# -------------------------------------------------------------------------------------------------------- counting


def count_flops(function: Callable[..., PyTree], *args: PyTree) -> float:
    """FLOPs of the matrix products of a function, traced for shapes: 2 for each multiply-add.

    The compiler's own count includes the body of a loop once. Here a scan counts once for each step, a loop whose
    length depends on data (the dispatch) once, a conditional by its largest branch, and a kernel by its whole grid.
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left, right = (tuple(getattr(variable.aval, "shape", ())) for variable in equation.invars)
            summed, shared = (_product(left[axis] for axis in axes) for axes in (contracted, batched))
            total += 2 * _product(left) * _product(right) / (summed * shared)
        inner = [_flops(sub) for sub in _inner(equation.params)]
        times = equation.params.get("length", 1)
        if equation.primitive.name == "pallas_call":
            times = _product(equation.params["grid_mapping"].grid)
        total += times * (max(inner) if equation.primitive.name == "cond" else sum(inner))
    return float(total)


def _product(sizes: Iterable[SupportsFloat]) -> float:
    """The product as a float: that of two arrays' sizes may overflow numpy's integers."""
    return math.prod((float(size) for size in sizes), start=1.0)


def _inner(params: Mapping[str, object]) -> list[core.Jaxpr]:
    jaxprs = []
    for value in params.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                jaxprs.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                jaxprs.append(item)
    return jaxprs


class Roofline(NamedTuple):
    """Seconds that a chip needs for each kind of work in a step, by the rates of its data sheet."""

    products: float
    memory: float
    links: float
    model: float  # for the model's own products alone

    @property
    def utilization(self) -> float:
        """The share of the chip's FLOPs that can go into the model's own products (MFU), if all work overlaps."""
        return self.model / max(self.products, self.memory, self.links)

    @property
    def utilization_without_overlap(self) -> float:
        """The same, if no work overlaps."""
        return self.model / (self.products + self.memory + self.links)


def roofline(step: Step, facts: Facts) -> Roofline | None:
    """None for a device whose rates are not known, or a program that XLA cannot print."""
    chip = CHIPS.get(step.device.device_kind)
    if chip is None or facts.collectives is None or facts.moved is None:
        return None
    over_links = sum(size for _, size in facts.collectives.values())
    rate = step.devices * chip.flops
    return Roofline(step.flops / rate, facts.moved / chip.bandwidth, over_links / chip.links, step.model_flops / rate)


def describe(step: Step, facts: Facts) -> str:
    """A few lines for the user."""
    room = "" if facts.memory is None else f" of {facts.memory / GIB:.0f}: {'fits' if facts.fits else 'DOES NOT FIT'}"
    rest = facts.arguments - step.weights - step.optimizer
    lines = [
        step.name,
        f"  a device holds {facts.peak / GIB:.2f} GiB{room}",
        f"    weights {step.weights / GIB:.2f}, optimiser {step.optimizer / GIB:.2f}, "
        f"other arguments {rest / GIB:.2f}, activations and other temporaries {facts.temporaries / GIB:.2f}, "
        f"outputs {facts.outputs / GIB:.2f}",
        f"  {step.flops:.3g} FLOPs of matrix products a step over all devices, {step.flops / step.model_flops:.2f} × "
        "the model's own",
    ]
    if facts.beside:
        lines.insert(
            3, f"    beside them the model as it was loaded, for training and scoring, {facts.beside / GIB:.2f}"
        )
    for kind, (count, size) in sorted((facts.collectives or {}).items()):
        lines.append(f"  {kind}: {count} a step, {size / GIB:.3f} GiB a device")
    if facts.moved is None:
        lines.append("  what it moves is not known: XLA cannot write this program")
    else:
        lines.append(f"  memory: {facts.moved / GIB:.2f} GiB a device, read and written")
    if roof := roofline(step, facts):
        parts = (("products", roof.products), ("memory", roof.memory), ("links", roof.links))
        lines.append(
            f"  at the chip's rates for bfloat16: {', '.join(f'{name} {seconds:.3g} s' for name, seconds in parts)}"
        )
        lines.append(
            f"  MFU possible: {roof.utilization:.0%}, or {roof.utilization_without_overlap:.0%} without overlap"
        )
    return "\n".join(lines)
