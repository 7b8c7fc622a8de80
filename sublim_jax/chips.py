"""Chips by their makers' data sheets."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """What a chip has by its maker's data sheet."""

    memory: int  # bytes
    flops: float  # a second, of products of bfloat16
    bandwidth: float  # bytes a second, of its memory
    links: float  # bytes a second, to and from its neighbours


# By jax's name of the device kind.
CHIPS = {
    "TPU v4": Chip(32 << 30, 275e12, 1.228e12, 300e9),
    "TPU v5 lite": Chip(16 << 30, 197e12, 0.819e12, 200e9),
    "TPU v5": Chip(95 << 30, 459e12, 2.765e12, 600e9),
    "TPU v5p": Chip(95 << 30, 459e12, 2.765e12, 600e9),
    "TPU v6 lite": Chip(32 << 30, 918e12, 1.640e12, 448e9),
    "NVIDIA H100 80GB HBM3": Chip(84_929_347_584, 989e12, 3.352e12, 900e9),
}


def memory_of(device: jax.Device) -> int | None:
    """Bytes by the data sheet, or as an attached device reports them; None for a CPU."""
    if chip := CHIPS.get(device.device_kind):
        return chip.memory
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        return None
