"""Compiling a step for devices that are not there: what it computes, what it moves, and whether it fits."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.sharding import Mesh

from sublim_jax.errors import UserError

# Memory of a chip in bytes, by jax's name of the device kind.
MEMORY = {
    "TPU v4": 32 << 30,
    "TPU v5 lite": 16 << 30,
    "TPU v5": 95 << 30,
    "TPU v5p": 95 << 30,
    "TPU v6 lite": 32 << 30,
}


class Facts(NamedTuple):
    """One compiled program. Bytes are those of one device, FLOPs those of the whole program."""

    arguments: int
    outputs: int  # beyond those that overwrite arguments
    temporaries: int
    flops: float  # of matrix products, a scanned layer counted as often as it runs, recomputation included
    collectives: dict[str, tuple[int, int]]  # kind: (how often a step, bytes of their results a device and step)
    memory: int | None  # of the device; None where it is not known

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs + self.temporaries

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.peak <= self.memory


def topology(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU pod by name, such as "v5e:4x4"; nothing of it needs to be there but libtpu.

    Raises UserError where libtpu is not installed or does not know the name.
    """
    from jax.experimental import topologies  # loads libtpu

    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu raises what it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--preflight={name}: {reason}; install libtpu (pip install 'jax[tpu]'), set JAX_PLATFORMS=cpu, and "
            "name a topology such as v5e:4x4 or v5p:4x4x4"
        ) from error


def facts(lowered: Any, flops: float, mesh: Mesh) -> Facts:
    """Compiles a lowered program and reads what the compiler says of it.

    Args:
      flops: from `count_flops` of the same step.
    """
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return Facts(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        flops,
        collectives(compiled.as_text()),
        MEMORY.get(mesh.devices.flat[0].device_kind),
    )


# -------------------------------------------------------------------------------------------------------- counting


def count_flops(function: Any, *args: Any) -> float:
    """FLOPs of the matrix products of a function, traced for shapes: 2 for each multiply-add.

    The compiler's own count takes the body of a loop once; here a scan counts its length, and a loop whose length
    depends on data (the dispatch) once.
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left, right = (tuple(getattr(variable.aval, "shape", ())) for variable in equation.invars)
            summed = np.prod([left[axis] for axis in contracted], initial=1.0)
            shared = np.prod([left[axis] for axis in batched], initial=1.0)
            total += 2 * np.prod(left, initial=1.0) * np.prod(right, initial=1.0) / (summed * shared)
        inner = sum(_flops(sub) for sub in _inner(equation.params))
        total += inner * equation.params.get("length", 1)
    return float(total)


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Collectives of a compiled program by kind: how often they run, and the bytes of their results.

    Those in a loop that counts to a constant count as often as it runs; the loop of the dispatch, once.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if match := re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif name:
            bodies[name].append(line)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def trips(line: str) -> int:
        """How often a while loop runs, by the constant of its condition."""
        condition = re.search(r" while\(.*condition=%?([\w.\-]+)", line)
        limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[condition[1]])) if condition else []
        return int(limits[0]) if len(limits) == 1 else 1

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            for kind in KINDS:
                if match := re.search(rf"= (.*?) {kind}(-start)?\(", line):
                    counts[kind][0] += times
                    counts[kind][1] += times * _bytes(match[1])
            for inner in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                visit(inner, times * trips(line))

    visit(entry, 1)
    return {kind: (count, size) for kind, (count, size) in counts.items()}


def _bytes(shape: str) -> int:
    """Of the largest array in a result's type; a start of a collective also names its operand."""
    sizes = [0]
    for kind, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        if kind in BYTES:
            sizes.append(BYTES[kind] * int(np.prod([int(d) for d in dimensions.split(",") if d], initial=1)))
    return max(sizes)


def describe(name: str, found: Facts) -> str:
    """A few lines for the user."""
    gb = 1 << 30
    room = "" if found.memory is None else f" of {found.memory / gb:.0f}: {'fits' if found.fits else 'DOES NOT FIT'}"
    lines = [
        f"{name}",
        f"  a device holds {found.peak / gb:.2f} GB{room} (arguments {found.arguments / gb:.2f}, temporaries "
        f"{found.temporaries / gb:.2f}, outputs {found.outputs / gb:.2f})",
        f"  {found.flops:.3g} FLOPs of matrix products a step, over all devices, recomputation included",
    ]
    for kind, (count, size) in sorted(found.collectives.items()):
        lines.append(f"  {kind}: {count} a step, {size / gb:.3f} GB a device")
    return "\n".join(lines)
