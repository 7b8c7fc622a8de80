"""Checks of a config's values before anything is loaded: each raises UserError, one line that names the value."""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import reduce
from operator import getitem
from typing import Any

from ml_collections import ConfigDict

from sublim_jax.errors import UserError
from sublim_jax.overrides import check_distinct
from sublim_jax.sharding import check_sizes

SEEDS = 2**32  # jax.random.key takes these apart, and no others
LARGEST = 2**31 - 1  # of what arrays are counted and indexed by
MOST_ROWS = 10**7  # of what Python holds one by one: prompts, samples, random numbers
WIDEST = 2**20  # of one axis of a layer, or of a cache
SMALLEST_REAL, LARGEST_REAL = 1e-12, 1e6  # in between, sums and products of float32 stay numbers


def at(config: ConfigDict, path: str) -> Any:
    """The value at a dotted path."""
    return reduce(getitem, path.split("."), config)


def check_numbers(config: ConfigDict, prefix: str = "") -> None:
    """Every number of a config is one that JAX can compute with, every seed one that it tells from others, and every
    mesh one that there can be.
    """
    for name, value in config.items():
        where = f"{prefix}{name}"
        if isinstance(value, ConfigDict):
            check_numbers(value, f"{where}.")
            if name == "mesh":
                check_sizes(value.to_dict())
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            if name == "seed" and not 0 <= one < SEEDS:
                raise UserError(f"{where}={one}: a seed is 0 to {SEEDS - 1}")
            if isinstance(one, int) and name != "seed" and abs(one) > LARGEST:
                raise UserError(f"{where}={one}: choose {LARGEST} or less")
            if isinstance(one, float) and not (one == 0 or SMALLEST_REAL <= abs(one) <= LARGEST_REAL):
                raise UserError(
                    f"{where}={one}: choose a number of size {SMALLEST_REAL:g} to {LARGEST_REAL:g}, or 0; float32 "
                    "cannot compute with it"
                )


def check_whole(config: ConfigDict, paths: Iterable[str], least: int = 1, most: int = LARGEST) -> None:
    """Counts, in a range."""
    for path in paths:
        if not least <= (given := at(config, path)) <= most:
            limit = f"{least} or more" if given < least else f"{most} or less"
            raise UserError(f"{path}={given}: choose {limit}")


def check_positive(config: ConfigDict, paths: Iterable[str]) -> None:
    for path in paths:
        if not (given := at(config, path)) > 0:
            raise UserError(f"{path}={given} must be positive")


def check_not_negative(config: ConfigDict, paths: Iterable[str]) -> None:
    for path in paths:
        if not (given := at(config, path)) >= 0:
            raise UserError(f"{path}={given} must not be negative")


def check_one_of(path: str, value: Any, choices: Collection[Any]) -> None:
    if value not in choices:
        raise UserError(f"{path}: {value!r} is none of {', '.join(str(one) or repr(one) for one in choices)}")


def check_some_of(path: str, values: Sequence[Any], choices: Collection[Any]) -> None:
    """One of the choices or more, each once."""
    if not values:
        raise UserError(f"{path} is empty: choose some of {', '.join(map(str, choices))}")
    for value in values:
        check_one_of(path, value, choices)
    check_distinct(path, values)


def check_file(path: str, read: Callable[[], object]) -> None:
    """What a value names can be read; what is wrong with it is told by the value's name, too."""
    try:
        read()
    except (UserError, OSError, RuntimeError) as error:  # of a path that is too long, or of a user who is not here
        raise UserError(f"{error} (--config.{path})") from error


def check_texts(config: ConfigDict, paths: Iterable[str]) -> None:
    """Texts that must not be empty."""
    for path in paths:
        if not at(config, path).strip():
            raise UserError(f"{path} is empty; name one, or leave --config.{path} out")
