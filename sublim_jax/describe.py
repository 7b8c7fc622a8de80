"""`launch.py --describe`: what a config is, its presets, and every value with its meaning.

All of it is read from the config's source. While a config is made, the line that first sets each value is noted, in
whichever file and function it stands; the comment on that line or directly above it is the value's meaning. The comment
of a group is about all of its values where none of them has its own.
"""

import ast
import io
import sys
import textwrap
import tokenize
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import ml_collections
from ml_collections import ConfigDict

from sublim_jax import overrides

WIDTH, NAME, VALUE = 116, 30, 24  # of a line, and of its first two columns
MIN_ALIKE = 3  # from this number on, groups of the same values are described once
_NO_CONFIG = (str(Path(ml_collections.__file__).parents[1]), __file__, "<")  # prefixes of files that are not configs


class Origin(NamedTuple):
    """Where a value was first set, and to what."""

    file: str
    line: int
    key: str  # where the line makes a group from a dict: the name of the value in it
    value: object


class Origins:
    """Origins of configs' values, in order."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], Origin] = {}
        self._groups: list[ConfigDict] = []  # kept alive, so that no other gets its id

    def add(self, group: ConfigDict, name: str, value: object, frame: FrameType | None) -> None:
        if (id(group), name) in self._known:
            return
        functions = []
        while frame and frame.f_code.co_filename.startswith(_NO_CONFIG):
            functions.append(frame.f_code.co_name)
            frame = frame.f_back
        if frame:
            key = name if "_configdict_fill_seed" in functions else ""
            self._known[id(group), name] = Origin(frame.f_code.co_filename, frame.f_lineno, key, value)
            self._groups.append(group)

    def of(self, group: ConfigDict, name: str) -> Origin:
        return self._known.get((id(group), name), Origin("", 0, "", None))

    def names(self, group: ConfigDict) -> list[str]:
        """The names of a group's values, in the order in which they were set."""
        order = {name: place for place, (known, name) in enumerate(self._known) if known == id(group)}
        return sorted(group, key=lambda name: order.get(name, len(self._known)))

    def meaning(self, group: ConfigDict, name: str) -> str:
        """The comment on a value in the source; empty where there is none."""
        origin = self.of(group, name)
        return _source(origin.file).comment(origin.line, origin.key) if Path(origin.file).is_file() else ""


@contextmanager
def traced() -> Iterator[Origins]:
    """Records where every value of the configs made in the block was first set."""
    origins, set_item = Origins(), ConfigDict.__setitem__

    def noted(group: ConfigDict, name: str, value: object) -> None:
        set_item(group, name, value)
        origins.add(group, name, value, sys._getframe(1))

    ConfigDict.__setitem__ = noted
    try:
        yield origins
    finally:
        ConfigDict.__setitem__ = set_item


class _Source:
    """The comments of a file of Python, by the statements that they are about."""

    def __init__(self, text: str):
        self._beside: dict[int, str] = {}  # by line
        self._alone: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                alone = not token.line[: token.start[1]].strip()
                (self._alone if alone else self._beside)[token.start[0]] = token.string.lstrip("# ")
        simple = (ast.Assign, ast.AnnAssign, ast.Expr, ast.Return)
        self._statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, simple)]

    def comment(self, line: int, key: str) -> str:
        """The comment about the statement on a line, or about a key of a dict in it that has a line for each."""
        at = [node for node in self._statements if node.lineno <= line <= (node.end_lineno or 0)]
        if not at:
            return ""
        dicts = [node for node in ast.walk(at[0]) if isinstance(node, ast.Dict)]
        dicts = [node for node in dicts if node.lineno < (node.end_lineno or 0)]
        if not key:
            inside = {line for node in dicts for line in range(node.lineno + 1, node.end_lineno or 0)}
            return self._about(at[0].lineno, at[0].end_lineno or 0, inside)
        pairs = [pair for node in dicts for pair in zip(node.keys, node.values)]
        spans = [(k.lineno, v.end_lineno or 0) for k, v in pairs if isinstance(k, ast.Constant) and k.value == key]
        return self._about(*spans[0]) if spans else ""

    def _about(self, first: int, last: int, but: Collection[int] = ()) -> str:
        above = first
        while above - 1 in self._alone:
            above -= 1
        lines = [self._alone[line] for line in range(above, first)]
        lines += [self._beside[line] for line in range(first, last + 1) if line in self._beside and line not in but]
        return " ".join(lines)


@cache
def _source(file: str) -> _Source:
    return _Source(Path(file).read_text())


# ------------------------------------------------------------------------------------------------------- the text


class Row(NamedTuple):
    """A value, or a group of values, by its path."""

    path: str
    value: str
    meaning: str


def text(name: str, config: ConfigDict, origins: Origins) -> str:
    """What `--describe` prints.

    Args:
      name: as given by --config.
      config: with the values that were typed.
      origins: from when the config was made.
    """
    file = name.split(":")[0]
    module = overrides.module(name)
    parts = [(module.__doc__ or file).strip()]
    if presets := getattr(module, "PRESETS", {}):
        mark = {config.get("preset"): " (this one)"}
        meanings = presets if isinstance(presets, Mapping) else dict.fromkeys(presets, "")
        lines = [_line(preset, "", f"{meaning}{mark.get(preset, '')}") for preset, meaning in meanings.items()]
        parts.append(f"Presets (--config={file}:NAME):" + "".join(lines))
    lines = [_line(*row) for row in rows(config, overrides.load(name), origins)]
    head = "Values (--config.NAME=VALUE; --config.NAME= empties a list or a text), and the preset's where they differ:"
    parts.append(head + "".join(lines))
    return "\n\n".join(parts)


def rows(config: ConfigDict, default: ConfigDict, origins: Origins, prefix: str = "") -> list[Row]:
    """Every value of a config; groups of the same values together."""
    entries = []
    for name in origins.names(config):
        if name in ("experiment", "preset") and "experiment" in config:
            continue  # what the config is
        value, path, meaning = config[name], f"{prefix}{name}", origins.meaning(config, name)
        if not isinstance(value, ConfigDict) or not value:
            entries.append(Row(path, _shown(value, default[name]), meaning))
            continue
        if meaning:
            entries.append(Row(path, "", meaning))
        if _alike(value, origins):
            entries += _together(value, default[name], origins, f"{path}.")
        else:
            entries += rows(value, default[name], origins, f"{path}.")
    return entries


def _alike(group: ConfigDict, origins: Origins) -> bool:
    """Whether a group consists of several groups whose values were set by the same lines."""
    inside = list(group.values())
    if len(inside) < MIN_ALIKE or not all(isinstance(subgroup, ConfigDict) for subgroup in inside):
        return False
    return len({tuple(origins.of(subgroup, name)[:2] for name in origins.names(subgroup)) for subgroup in inside}) == 1


def _together(group: ConfigDict, default: ConfigDict, origins: Origins, prefix: str) -> list[Row]:
    """The values of similar groups with their meaning, and the changes in each group."""
    names = origins.names(group)
    first = group[names[0]]
    base = {name: origins.of(first, name).value for name in first}
    same = {
        name for name in first if all(origins.of(subgroup, name).value == base[name] for subgroup in group.values())
    }
    entries = []
    for name in origins.names(first):
        shown = _text(base[name]) if name in same and not isinstance(base[name], ConfigDict | dict) else ""
        entries.append(Row(f"{prefix}NAME.{name}", shown, origins.meaning(first, name)))
    for name in names:
        values, before = _flat(group[name], origins), _flat(default[name], origins)
        changed = [
            key for key in values if key not in same or values[key] != base[key] or values[key] != before.get(key)
        ]
        changes = "; ".join(f"{key}={_shown(values[key], before.get(key, values[key]))}" for key in changed)
        meaning = origins.meaning(group, name)
        entries.append(Row(f"{prefix}{name}", "", f"{changes or 'as above'}{f' – {meaning}' if meaning else ''}"))
    return entries


def _flat(group: ConfigDict, origins: Origins) -> dict[str, object]:
    """A group's values by their paths in it."""
    values: dict[str, object] = {}
    for name in origins.names(group):
        value = group[name]
        if isinstance(value, ConfigDict):
            values |= {f"{name}.{key}": item for key, item in _flat(value, origins).items()}
        else:
            values[name] = value
    return values


def _shown(value: object, default: object) -> str:
    return _text(value) + (f" (preset: {_text(default)})" if value != default else "")


def _text(value: object) -> str:
    """A value as it may be typed; "(none)" and "(empty)" for lists and texts that are empty."""
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) if value else "(none)"
    if isinstance(value, ConfigDict):
        return "" if value else "(no values)"
    shown = str(value)
    if not shown:
        return "(empty)"
    return shown if shown == shown.strip() else f'"{shown}"'


def _line(name: str, value: str, meaning: str) -> str:
    """A line of three columns; a text that is too long for its column continues on the next line."""
    second, third = NAME + 4, NAME + VALUE + 6
    lines = [f"  {name:<{NAME}}  "]
    if value or not meaning:
        if len(value) <= VALUE and len(name) <= NAME:
            lines = [f"{lines[0]}{value:<{VALUE}}  "]
        else:
            lines = textwrap.wrap(lines[0] + value, WIDTH, subsequent_indent=" " * second, break_on_hyphens=False)
            lines.append(" " * third)
    elif len(name) <= NAME:
        third = second
    if meaning.strip():
        wrapped = textwrap.wrap(meaning, WIDTH - third, break_on_hyphens=False)
        lines = [*lines[:-1], lines[-1] + wrapped[0], *(" " * third + line for line in wrapped[1:])]
    return "".join(f"\n{line.rstrip()}" for line in lines if line.strip())
