"""A config's file and preset, and the values that are typed after them: `--config=FILE:preset --config.key=value`.

A value is parsed as the type of the one that it replaces. "None" is the empty text or list.
"""

import ast
import difflib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from absl import flags
from ml_collections import ConfigDict

from sublim_jax.data import files
from sublim_jax.errors import UserError, one_line

Value = TypeVar("Value")
Item = str | int | float

SHOWN = 60  # characters of a typed value in a message


def load(name: str) -> ConfigDict:
    """The config of "FILE" or "FILE:preset", to which no key can be added.

    Raises UserError for a file that is missing, no config, or without that preset.
    """
    file, *preset = name.split(":", 1)
    where = f"--config={name}"
    config_module = module(name)
    make = getattr(config_module, "get_config", None)
    if not callable(make):
        raise UserError(f"{where}: it has no get_config(); name a config, such as configs/mnist.py")
    presets = getattr(config_module, "PRESETS", None)
    if preset and presets is not None and preset[0] not in presets:
        raise UserError(f"{file} has no preset {preset[0]!r}; it has {', '.join(presets)}")
    try:
        inspect.signature(make).bind(*preset)
    except TypeError as error:
        raise UserError(
            f"{where}: {file} " + ("has no presets" if preset else "needs a preset: --config=FILE:PRESET")
        ) from error
    config = _guarded(where, file, make, *preset)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{where}: its get_config() gives no ConfigDict")
    config.lock()
    return config


def module(name: str) -> ModuleType:
    """The module of a config's "FILE" or "FILE:preset". Raises UserError where there is no such file."""
    file, where = name.split(":")[0], f"--config={name}"
    if not files.exists(file):
        known = [str(path) for folder in (Path(file).parent, Path("configs")) for path in sorted(folder.glob("*.py"))]
        close = difflib.get_close_matches(file, known, 1) or [path for path in known if Path(path).stem == file]
        raise UserError(f"{where}: there is no such file" + (f"; did you mean {close[0]}?" if close else ""))
    if not Path(file).is_file():
        raise UserError(f"{where}: it is not a file")
    loader = importlib.machinery.SourceFileLoader("given_config", file)
    made = ModuleType("given_config")
    made.__file__ = file
    sys.modules["given_config"] = made  # where its dataclasses look their module up
    _guarded(where, file, loader.exec_module, made)
    return made


def _guarded(where: str, file: str, function: Callable[..., Value], *args: object) -> Value:
    """Calls a function of a config's file; raises any of its errors as a UserError of one line."""
    try:
        return function(*args)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        text = one_line(error, limit=None)
        if isinstance(error, SyntaxError | UnicodeError):
            raise UserError(f"{where}: it is not a Python file ({text})") from error
        if isinstance(error, ValueError):  # how a config refuses a preset
            raise UserError(text if file in text else f"{where}: {text}") from error
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        at = f", line {lines[-1]}" if lines else ""
        raise UserError(f"{where}{at}: {type(error).__name__}: {text}") from error


def override(config: ConfigDict, key: str, typed: Sequence[str | bool]) -> None:
    """Sets a dotted key of the config to its typed value: the last of several, or all of them for a list.

    Args:
      typed: True and False where the key stands alone, as switches may.

    Raises UserError for a key that does not exist, and for a value that cannot be read as what the key holds.
    """
    holder, name = _holder(config, key), key.split(".")[-1]
    old, where = holder[name], f"config.{key}"
    if isinstance(old, ConfigDict):
        inside = ", ".join(f"{where}.{inner}" for inner in keys(old)[:4]) or "none in this config"
        raise UserError(f"{where} is a group of values; set one of them: {inside}")
    if not isinstance(old, bool) and not all(isinstance(text, str) for text in typed):
        raise UserError(f"{where} has no value; write --{where}=…")
    texts = [str(text) for text in typed]
    holder[name] = _many(where, texts, old) if isinstance(old, tuple | list) else _scalar(where, texts[-1], old)


def _holder(config: ConfigDict, key: str) -> ConfigDict:
    """The part of the config that holds the key's value."""
    holder: object = config
    *path, name = key.split(".")
    for part in path:
        holder = holder[part] if isinstance(holder, ConfigDict) and part in holder else None
    if not isinstance(holder, ConfigDict) or name not in holder:
        raise UserError(f"there is no config.{key}; {_nearest(key, keys(config))}")
    return holder


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted keys of all values."""
    dotted = []
    for name, value in config.items():
        inside = keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else []
        dotted += inside or [f"{prefix}{name}"]
    return dotted


def _nearest(key: str, known: list[str]) -> str:
    """A hint at the intended key: one of a similar path, or of this name elsewhere; else the keys that exist."""
    *groups, name = key.split(".")
    close = [
        candidate
        for candidate in difflib.get_close_matches(key, known, 3, 0.75)
        if _alike(key.split("."), candidate.split("."))
    ]
    if close:
        return f"did you mean config.{close[0]}?"
    there = [part for depth, part in enumerate(groups, 1) if _inside(groups[:depth], known)]
    names = {candidate.split(".")[-1]: candidate for candidate in reversed(known)}
    close = difflib.get_close_matches(name, names, 1, 0.75)
    if close and there in ([], groups):
        return f"did you mean config.{names[close[0]]}?"
    inside = [".".join(candidate.split(".")[: len(there) + 1]) for candidate in _inside(there, known)]
    more = "; a config file may have more (docs/extending.md)" if there == ["arm"] else ""
    return "there are config." + ", config.".join(dict.fromkeys(inside)) + more


def _alike(path: list[str], other: list[str]) -> bool:
    """Whether two paths are similar in every part that both have."""
    return all(difflib.SequenceMatcher(None, *parts).ratio() > 0.5 for parts in zip(path, other))


def _inside(groups: list[str], known: list[str]) -> list[str]:
    """The keys of a group."""
    return [key for key in known if key.split(".")[: len(groups)] == groups]


def _scalar(where: str, typed: str, old: object) -> object:
    """One value in the type of the one that it replaces."""
    shown = f"{where}={_short(typed)}"
    _check_text(shown, typed)
    if isinstance(old, str):
        return "" if typed == "None" else typed
    try:
        if isinstance(old, bool):
            return flags.BooleanParser().parse(typed)
        if isinstance(old, int):
            return flags.IntegerParser().parse(typed)
        if isinstance(old, float):
            value = flags.FloatParser().parse(typed)
            if math.isfinite(value):
                return value
    except (TypeError, ValueError):
        pass
    kinds = {bool: "true or false", int: "a whole number", float: "a finite number"}
    raise UserError(f"{shown}: {kinds.get(type(old), 'another type')} is needed, such as {old!r}")


def _many(where: str, typed: list[str], old: tuple[Item, ...] | list[Item]) -> tuple[Item, ...] | list[Item]:
    """A list, its items in the type of those that it replaces.

    An empty list has no type of items: they are whole numbers where all of them can be, else texts. Either way str() of
    an item is the typed text.
    """
    shown = f"{where}={_short(','.join(typed))}"
    _check_text(shown, ",".join(typed))
    items = [item for text in typed for item in _items(where, text)]
    if old and not isinstance(old[0], str):
        return type(old)(_number(shown, item, old) for item in items)
    texts = [str(item) for item in items]
    if not old and all(_is_whole(text) for text in texts):
        return type(old)(int(text) for text in texts)
    check_distinct(where, texts)
    return type(old)(texts)


def _items(where: str, text: str) -> Sequence[Item]:
    """The items of a typed list: words with commas in between, or Python's brackets or quotes."""
    if text.strip()[:1] not in ("(", "[", '"', "'"):
        return _split(where, text)
    try:
        items = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(
            f"{where}={_short(text)}: leave brackets and quotes out, or put each text in quotes, such as \"('a', 'b')\""
        ) from error
    items = list(items) if isinstance(items, tuple | list) else [items]
    if wrong := [item for item in items if not isinstance(item, str | int | float)]:
        raise UserError(f"{where}: {wrong[0]!r} is neither a text nor a number")
    return items


def _split(where: str, text: str) -> list[str]:
    """The items of a list with commas in between, without the spaces around them; a comma at the end is forgiven.

    Raises UserError, naming the value by `where`, for an empty item.
    """
    if not text.strip() or text.strip() == "None":
        return []
    items = [item.strip() for item in text.split(",")]
    if len(items) > 1 and not items[-1]:
        items.pop()
    if not all(items):
        raise UserError(f"{where}={_short(text)}: there is nothing in front of a comma; leave the comma out")
    return items


def covers(name: str, key: str) -> bool:
    """Whether a key has this name, or begins with it where the name ends in "." or "_"."""
    return key == name or (name[-1] in "._" and key.startswith(name))


def check_distinct(where: str, values: Iterable[object]) -> None:
    """Raises UserError for a value that is there twice."""
    seen = set()
    for value in values:
        if value in seen:
            raise UserError(f"{where}: {value!r} appears twice; name each once")
        seen.add(value)


def _number(shown: str, item: Item, old: Sequence[Item]) -> int | float:
    kind = int if isinstance(old[0], int) else float
    try:
        if isinstance(item, bool) or (kind is int and not float(item).is_integer()):
            raise ValueError
        value = kind(item)
        if math.isfinite(value):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    needed = "whole numbers are" if kind is int else "finite numbers are"
    raise UserError(f"{shown}: {item!r} is none; {needed} needed, such as {','.join(map(str, old))}")


def _is_whole(text: str) -> bool:
    try:
        return str(int(text)) == text
    except ValueError:
        return False


def _check_text(shown: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{shown!a}: this is not UTF-8 text") from error
    if "\0" in text:
        raise UserError(f"{shown!a}: a text cannot have the character 0")


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")
