"""Specs: a config's values as frozen dataclasses, checked when they are made.

A spec describes an experiment in types. `read` makes one from a `ConfigDict`; each spec's `__post_init__` refuses, with
the flag's path, every value that is invalid for any model and file. Code that is given a spec does not use
`ConfigDict`.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar, get_args, get_type_hints

import dacite
from ml_collections import ConfigDict

from sublim_jax.errors import UserError
from sublim_jax.overrides import check_distinct
from sublim_jax.sharding import check_sizes

Spec = TypeVar("Spec")

NUM_SEEDS = 2**32  # jax.random.key tells these apart, and no others
MAX_INDEX = 2**31 - 1  # arrays are counted and indexed by 32 bits
MAX_ROWS = 10**7  # of what Python holds one by one: prompts, samples, random numbers
PRECISIONS = ("float32", "tensorfloat32", "bfloat16")  # of products of float32
MAX_WIDTH = 2**20  # of one axis of a layer, or of a cache
MIN_FLOAT, MAX_FLOAT = 1e-12, 1e6  # in between, sums and products of float32 stay finite


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh's axes; -1 for the devices that are left."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Checked:
    """A spec whose fields say by their type how they are checked: `Annotated[int, check_count]`."""

    where: ClassVar[str] = ""  # in front of the fields' names

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            for check in getattr(hints[field.name], "__metadata__", ()):
                check(self.path(field.name), getattr(self, field.name))

    def path(self, name: str) -> str:
        """The path of a field, for error messages."""
        return f"{self.where}{name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentSpec(Checked):
    """What every experiment's spec has; `values` is all of its config as JSON values, for the report."""

    experiment: str
    preset: str
    values: Mapping[str, object] = dataclasses.field(default_factory=dict, compare=False, repr=False)


def read(kind: type[Spec], config: ConfigDict, **made: object) -> Spec:
    """The spec of class `kind` for a config; values that the spec does not have are ignored.

    A spec's field `values` is all of the config as JSON values, for the report.

    Args:
      made: fields that differ from the config's values.

    Raises:
      UserError: a value is missing, of another type, or invalid.
    """
    values = plain(config)
    check_numbers(values)
    return build(kind, {**values, **made, "values": json.loads(json.dumps(values))})


def build(kind: type[Spec], values: Mapping[str, object], prefix: str = "") -> Spec:
    """The spec of plain values. Raises UserError, naming the value behind `prefix`, as `read`."""
    try:
        return dacite.from_dict(kind, dict(values), dacite.Config(type_hooks={float: _as_float}))
    except dacite.MissingValueError as error:
        raise UserError(f"the config has no value {prefix}{error.field_path}, which the experiment needs") from error
    except dacite.WrongTypeError as error:
        type_name = type(error.value).__name__
        name = None if get_args(error.field_type) else getattr(error.field_type, "__name__", None)
        kinds = name or str(error.field_type)
        raise UserError(
            f"config.{prefix}{error.field_path}={error.value!r} is of type {type_name}, not {kinds}"
        ) from error


def _as_float(value: object) -> object:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def plain(config: ConfigDict) -> dict[str, Any]:
    """A config's values, lists as tuples."""
    return {name: _plain(value) for name, value in config.items()}


def _plain(value: object) -> object:
    if isinstance(value, ConfigDict | dict):
        return {name: _plain(item) for name, item in value.items()}
    return tuple(_plain(item) for item in value) if isinstance(value, tuple | list) else value


# --------------------------------------------------------------------------------------------------------- checks
# Each raises UserError, one line that names the value by its path.


def check_numbers(values: Mapping[str, object], prefix: str = "") -> None:
    """Every number is in the range of JAX's types, every seed in that of `jax.random.key`, and every mesh is valid."""
    for name, value in values.items():
        where = f"{prefix}{name}"
        if isinstance(value, Mapping):
            check_numbers(value, f"{where}.")
            if name == "mesh":
                check_sizes(dict(value))
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if name == "seed" and isinstance(item, int) and not 0 <= item < NUM_SEEDS:
                raise UserError(f"{where}={item}: a seed is 0 to {NUM_SEEDS - 1}")
            if isinstance(item, int) and name != "seed" and abs(item) > MAX_INDEX:
                raise UserError(f"{where}={item}: choose {MAX_INDEX} or less")
            if isinstance(item, float) and not (item == 0 or MIN_FLOAT <= abs(item) <= MAX_FLOAT):
                raise UserError(
                    f"{where}={item}: choose a number of size {MIN_FLOAT:g} to {MAX_FLOAT:g}, or 0; float32 cannot "
                    "compute with it"
                )


def check_count(path: str, value: int | float, minimum: int = 1, maximum: int = MAX_INDEX) -> None:
    """A number in a range."""
    if not minimum <= value <= maximum:
        limit = f"{minimum} or more" if value < minimum else f"{maximum} or less"
        raise UserError(f"{path}={value}: choose {limit}")


def check_positive(path: str, value: int | float) -> None:
    if not value > 0:
        raise UserError(f"{path}={value} must be positive")


def check_not_negative(path: str, value: int | float) -> None:
    if not value >= 0:
        raise UserError(f"{path}={value} must not be negative")


def check_one_of(path: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), map(str, choices), 1, 0.75)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"{path}: {value!r} is none of {', '.join(str(choice) or repr(choice) for choice in choices)}{hint}"
        )


def check_some_of(path: str, values: Sequence[object], choices: Collection[object]) -> None:
    """One of the choices or more, each once."""
    if not values:
        raise UserError(f"{path} is empty: choose some of {', '.join(map(str, choices))}")
    for value in values:
        check_one_of(path, value, choices)
    check_distinct(path, values)


def check_text(path: str, value: str) -> None:
    """A text that must not be empty."""
    if not value.strip():
        raise UserError(f"{path} is empty; name one, or leave --config.{path} out")


def check_file(path: str, read: Callable[[], object]) -> None:
    """The file that a value names can be read; the message also names the value."""
    try:
        read()
    except (UserError, OSError, RuntimeError) as error:  # of a path that is too long, or of a user who is not here
        raise UserError(f"{error} (--config.{path})") from error


Count: TypeAlias = Annotated[int, check_count]
Precision: TypeAlias = Annotated[str, partial(check_one_of, choices=PRECISIONS)]
Place: TypeAlias = Annotated[int, partial(check_count, minimum=0)]
Rows: TypeAlias = Annotated[int, partial(check_count, maximum=MAX_ROWS)]
Width: TypeAlias = Annotated[int, partial(check_count, maximum=MAX_WIDTH)]
Positive: TypeAlias = Annotated[float, check_positive]
NotNegative: TypeAlias = Annotated[float, check_not_negative]
Text: TypeAlias = Annotated[str, check_text]
Distinct: TypeAlias = Annotated[tuple[str, ...], check_distinct]
