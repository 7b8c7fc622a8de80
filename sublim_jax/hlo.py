"""Bytes that a compiled program moves through memory and over links, read from its HLO text.

The compiler's own count includes the body of a loop once. Here a loop with a constant trip count is counted as often as
it runs, and one whose end depends on data (the dispatch) once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1, "s64": 8, "u64": 8, "f64": 8}
# Instructions that move no bytes: they name buffers, or end an operation that was counted at its start.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
FREE |= {"while", "conditional", "call", "replica-id"}  # the computations that they run are counted
PARTS = {"dynamic-slice", "slice", "gather"}  # read no more than they return
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # write into their first operand no more than this one of them


class Instruction(NamedTuple):
    name: str
    shape: str  # as written: a type with its layout, or several in brackets
    kind: str
    operands: tuple[str, ...]
    line: str
    root: bool


class Text(NamedTuple):
    computations: dict[str, dict[str, Instruction]]
    entry: str


def parse(text: str) -> Text:
    """The instructions of each computation by name, in order."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            name = head[2]
            computations[name] = {}
            entry = name if head[1] else entry
        elif name and (instruction := _instruction(line)):
            computations[name][instruction.name] = instruction
    return Text(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"^\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:]
    call = re.match(r"\s*([\w\-]+)\(", rest)
    if not call:
        return None
    inside = rest[call.end() - 1 :]
    operands = re.findall(r"%?([\w.\-]+)(?=[,)])", inside[: _closing(inside)])
    return Instruction(head[2], shape, call[1], tuple(operands), line, bool(head[1]))


def _closing(text: str) -> int:
    """The index after the bracket that closes the one at the start of a text."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    return len(text)


def runs(text: Text) -> Iterator[tuple[str, int, bool]]:
    """(computation, how often it runs, whether it is the inside of a fusion), from the entry on."""

    def visit(name: str, times: int, fused: bool) -> Iterator[tuple[str, int, bool]]:
        yield name, times, fused
        for instruction in text.computations.get(name, {}).values():
            inner = re.findall(r"(?:body|calls|to_apply|called_computations)=\{?%?([\w.\-]+)", instruction.line)
            if branches := _branches(instruction):
                inner.append(max(branches, key=partial(_results, text)))
            for called in inner:
                yield from visit(called, times * _trips(text, instruction), fused or instruction.kind not in FREE)

    yield from visit(text.entry, 1, False)


def _branches(instruction: Instruction) -> list[str]:
    """The computations of which a conditional runs one."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.line)
    named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.line)
    return re.findall(r"[\w.\-]+", listed[1]) if listed else named


def _results(text: Text, name: str) -> int:
    """Bytes of the results of a computation's instructions, by which a conditional's largest branch is chosen."""
    return sum(sum(sizes(instruction.shape)) for instruction in text.computations.get(name, {}).values())


def _trips(text: Text, instruction: Instruction) -> int:
    """How often a while loop runs: as the compiler notes it, or by the constant of its condition."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", instruction.line) if instruction.kind == "while" else None
    lines = [inner.line for inner in text.computations[condition[1]].values()] if condition else []
    limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(lines))
    return int(limits[0]) if len(limits) == 1 else 1


def collectives(text: Text) -> dict[str, tuple[int, int]]:
    """By kind: how often collectives run, and the bytes of their results, a device.

    A collective that the compiler has split to overlap it with other work counts once: its pieces share a channel.
    """
    by_channel: dict[str, tuple[str, int, int]] = {}
    for name, times, _ in runs(text):
        for instruction in text.computations.get(name, {}).values():
            kind = instruction.kind.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.line)
            key = channel[1] if channel else f"{name} {instruction.name}"
            size = max(sizes(instruction.shape, everywhere=True), default=0)  # a start also names its operand
            by_channel[key] = max(by_channel.get(key, (kind, 0, 0)), (kind, times, size))
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for kind, times, size in by_channel.values():
        counts[kind][0] += times
        counts[kind][1] += times * size
    return {kind: (count, size) for kind, (count, size) in counts.items()}


def memory_bytes(text: Text) -> int:
    """Bytes that go to and from a device's memory, if each instruction reads its operands there and writes its result.

    A fusion reads no more of an operand than the slices that it takes of it, and writes no more than it updates.
    """
    total, seen = 0, set()
    for name, times, fused in runs(text):
        if fused:
            continue
        for instruction in text.computations.get(name, {}).values():
            if instruction.kind in FREE or instruction.kind.endswith("-done"):
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.line)
            if channel and channel[1] in seen:
                continue
            seen |= {channel[1]} if channel else set()
            total += times * _touched(text, text.computations[name], instruction)
    return total


def _touched(text: Text, around: dict[str, Instruction], instruction: Instruction) -> int:
    if instruction.kind in ("copy-start", "slice-start"):  # between memory and the chip's own
        return min((size for size in sizes(instruction.shape, everywhere=True) if size > 16), default=0)
    operands = [around[operand].shape for operand in instruction.operands if operand in around]
    if instruction.kind == "fusion" and (calls := re.search(r"calls=%?([\w.\-]+)", instruction.line)):
        return _fused(text, calls[1], operands, instruction.shape)
    if instruction.kind in PARTS:
        return 2 * sum(sizes(instruction.shape))
    if instruction.kind in UPDATES:
        return 2 * sum(sizes(operands[UPDATES[instruction.kind]]))
    if instruction.kind == "custom-call":
        if re.search(r'custom_call_target="(AllocateBuffer|Assume\w+|Sharding)"', instruction.line):
            return 0
        # Without a library's scratch space.
        results = [size for size in sizes(re.sub(r"s8\[[^\]]*\]", "", instruction.shape))]
        return sum(results) + sum(map(_whole, operands))
    return _whole(instruction.shape) * (not instruction.kind.endswith("-start")) + sum(map(_whole, operands))


def _fused(text: Text, name: str, operands: list[str], result: str) -> int:
    inside = text.computations[name]
    read = sum(
        min(_taken(text, name, number), _whole(shape)) for number, shape in enumerate(operands) if sum(sizes(shape))
    )
    root = next((instruction for instruction in inside.values() if instruction.root), None)
    return read + (_written(inside, root) if root and sum(sizes(result)) else 0)


def _taken(text: Text, name: str, number: int) -> int:
    """Bytes that a fusion reads of one of its operands; more than any array has where it may read all of it."""
    users: dict[str, list[Instruction]] = defaultdict(list)
    given = None
    for instruction in text.computations[name].values():
        for operand in set(instruction.operands):
            users[operand].append(instruction)
        if instruction.kind == "parameter" and instruction.operands[0] == str(number):
            given = instruction.name
    return sum(_read(text, users, user, given) for user in users[given]) if given else 0


def _read(text: Text, users: dict[str, list[Instruction]], user: Instruction, name: str) -> int:
    """Bytes that an instruction in a fusion reads of its operand `name`."""
    if user.kind == "bitcast" and not user.root:
        return sum(_read(text, users, after, user.name) for after in users[user.name])
    if user.kind in PARTS and user.operands[0] == name:
        return sum(sizes(user.shape, everywhere=True))
    if user.kind in UPDATES and user.operands[0] == name:
        return 0  # in place
    if user.kind == "fusion" and (calls := re.search(r"calls=%?([\w.\-]+)", user.line)):  # as on TPUs, within another
        return sum(_taken(text, calls[1], place) for place, operand in enumerate(user.operands) if operand == name)
    return 1 << 62


def _written(inside: dict[str, Instruction], root: Instruction) -> int:
    if root.kind == "tuple":
        return sum(_written(inside, inside[name]) for name in root.operands if name in inside)
    if root.kind == "bitcast" and root.operands[0] in inside:
        return _written(inside, inside[root.operands[0]])
    if root.kind in UPDATES and root.operands[UPDATES[root.kind]] in inside:
        return sum(sizes(inside[root.operands[UPDATES[root.kind]]].shape, everywhere=True))
    return sum(sizes(root.shape))


def _whole(shape: str) -> int:
    return sum(sizes(shape))


def sizes(shape: str, everywhere: bool = False) -> list[int]:
    """Bytes of each array of a type.

    Args:
      everywhere: include arrays in on-chip memory, which a layout marks by S(1) and the like.
    """
    byte_counts = []
    for kind, dimensions, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape):
        if kind in BYTES and (everywhere or not re.search(r"S\([1-9]", layout)):
            byte_counts.append(BYTES[kind] * math.prod(int(d) for d in dimensions.split(",") if d))
    return byte_counts
