"""The header of a GGUF file, checked against its length; tensors stay on the disk until they are read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the `gguf` package makes an array
of every string, which takes seconds for a vocabulary.
"""

import mmap
import struct
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import gguf
import numpy as np

from sublim_jax.errors import UserError
from sublim_jax.weights.config_fields import check_fetched

Value: TypeAlias = int | float | bool | str | list["Value"]

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
Scalar: TypeAlias = int | float | bool | str


class Tensor(NamedTuple):
    """One tensor: its shape, outermost axis first, and its bytes (*shape[:-1], bytes of a row)."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    rows: np.ndarray

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The values at an index of slices, as float32."""
        rows = np.array(self.rows[index[:-1]])  # jax keeps what it is given, and the file may be written again
        values = gguf.dequantize(rows, self.kind)  # rows are quantised each by itself
        return values[(..., index[-1])]


class Fields:
    """The fields of a header by name. Those that were read are recorded, so that none is ignored."""

    def __init__(self, path: str, values: Mapping[str, Value]):
        self.path = path
        self._values = values
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Value | None:
        self._read.add(name)
        return self._values.get(name)

    def whole(self, name: str, default: int | None = None) -> int:
        """Raises UserError where it is missing and has no default, or is not a whole number."""
        return int(self._checked(name, self._of(name, default), int))

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._checked(name, self._of(name, default), int, float))

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._checked(name, self._of(name, default), bool))

    def text(self, name: str, default: str | None = None) -> str:
        return str(self._checked(name, self._of(name, default), str))

    def every_layer(self, name: str, default: int | None = None) -> int:
        """A whole number that may be given layer by layer; raises UserError where layers differ."""
        value = self.get(name)
        if not isinstance(value, list):
            return self.whole(name, default)
        if len(set(map(str, value))) != 1:
            raise UserError(f"{self.path}: {name} differs from layer to layer, which is not supported")
        return int(self._checked(name, value[0], int))

    def texts(self, name: str) -> list[str]:
        """Raises UserError where it is missing or no list of texts."""
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise UserError(f"{self.path}: {name} is missing or no list of texts")
        return [str(entry) for entry in value]

    def numbers(self, name: str, length: int | None = None) -> list[float]:
        """Raises UserError where it is missing or no list of numbers, of that length."""
        value = self.get(name)
        if not isinstance(value, list) or any(isinstance(x, str | list) for x in value):
            raise UserError(f"{self.path}: {name} is missing or no list of numbers")
        if length not in (None, len(value)):
            raise UserError(f"{self.path}: {name} has {len(value)} numbers, and must have {length}")
        return [float(x) for x in value if not isinstance(x, str | list)]

    def refuse_others(
        self, prefix: str, harmless: Collection[str], neutral: Mapping[str, Collection[Value]], why: Mapping[str, str]
    ) -> None:
        """Raises UserError for a field under `prefix` that was never read, and so changes nothing here.

        Args:
          harmless: patterns of names, without the prefix, of fields that change neither logits nor tokens.
          neutral: by name, the values that have no effect; for any other field, empty and zero.
          why: by name, the meaning of a field, for the message.
        """
        for full, value in self._values.items():
            name = full.removeprefix(prefix)
            if full in self._read or name == full or any(fnmatchcase(name, pattern) for pattern in harmless):
                continue
            if value in neutral[name] if name in neutral else _off(value):
                continue
            shown = f"{value!r:.60}" + (f" ({why[name]})" if name in why else "")
            raise UserError(f"{self.path}: {full} is {shown}, which is not supported")

    def _of(self, name: str, default: Value | None) -> Value:
        value = self.get(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.path} has no {name}; use a GGUF file of a whole model, with its tokenizer")
        return value

    def _checked(self, name: str, value: Value, *types: type) -> Scalar:
        if isinstance(value, list) or type(value) not in types:
            raise UserError(f"{self.path}: {name} is {value!r:.60}, not {KINDS[types[-1]]}")
        return value


class File(NamedTuple):
    path: str
    fields: Fields
    tensors: dict[str, Tensor]


def _off(value: Value) -> bool:
    return all(map(_off, value)) if isinstance(value, list) else not value


def open_model(path: str | Path) -> File:
    """The header of a file that holds one whole model.

    Raises UserError where it is missing, broken, a part of a model, or no language model.
    """
    file = _open(Path(path))
    fields = file.fields
    if (parts := fields.whole("split.count", 0)) > 1:
        raise UserError(
            f"{path} is part {fields.whole('split.no') + 1} of {parts} of one model; join the parts with "
            "`llama-gguf-split --merge` and name the whole"
        )
    kind = fields.text("general.type", "model")
    architecture = fields.text("general.architecture")
    if kind != "model" or architecture == "clip":
        raise UserError(
            f"{path} holds no language model: general.type is {kind!r}, and general.architecture {architecture!r}"
        )
    return file


def _open(path: Path) -> File:
    if not path.is_file():
        raise UserError(f"{path} is missing")
    check_fetched(path)
    try:
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            head = _Head(data, str(path))
            values, infos = head.read()
        return File(str(path), Fields(str(path), values), _tensors(path, values, infos, head.at))
    except (ValueError, OSError, struct.error) as error:
        raise UserError(f"{path} is truncated or not a GGUF file ({error}); fetch it again") from error


class _Info(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Head:
    """A cursor over the header."""

    def __init__(self, data: mmap.mmap, path: str):
        self.at = 0
        self._data = data
        self._path = path

    def read(self) -> tuple[dict[str, Value], list[_Info]]:
        if self._data[:4] != b"GGUF":
            raise UserError(
                f"{self._path} is not a GGUF file: it starts with {self._data[:4]!r}; name a GGUF file, or "
                "a folder of safetensors"
            )
        self.at = 4
        (version,) = self._unpack("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            reason = "is of a machine with the other byte order" if swapped else f"is of version {version} of GGUF"
            raise UserError(f"{self._path} {reason}, which is not read; convert the model again")
        tensors, fields = self._unpack("QQ")
        values: dict[str, Value] = {}
        for _ in range(fields):
            name = self._name()
            if name in values:
                raise UserError(f"{self._path} has the field {name} twice; convert the model again")
            values[name] = self._value(*self._unpack("I"))
        infos = []
        for _ in range(tensors):
            name, (axes,) = self._name(), self._unpack("I")
            shape = tuple(reversed(self._unpack(f"{axes}Q")))
            infos.append(_Info(name, shape, *self._unpack("IQ")))
        return values, infos

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self._data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values

    def _text(self) -> str:
        (length,) = self._unpack("Q")
        if self.at + length > len(self._data):
            raise ValueError(f"a text of {length} bytes at byte {self.at} goes past its end")
        self.at += length
        return self._data[self.at - length : self.at].decode()

    def _name(self) -> str:
        start, name = self.at, self._text()
        if not name.isprintable():  # messages show names, in one line
            raise ValueError(f"the name {name!r:.60} at byte {start}")
        return name

    def _value(self, kind: int) -> Value:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            inner, length = self._unpack("IQ")
            if inner in SCALARS:
                return list(self._unpack(f"{length}{SCALARS[inner]}"))
            return [self._value(inner) for _ in range(length)]
        if kind not in SCALARS:
            raise ValueError(f"a value of the unknown type {kind} at byte {self.at}")
        return self._unpack(SCALARS[kind])[0]


def _tensors(path: Path, values: Mapping[str, Value], infos: list[_Info], end: int) -> dict[str, Tensor]:
    alignment = values.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-end // alignment) * alignment
    data = np.memmap(path, np.uint8, "r")
    tensors = {}
    for name, shape, number, offset in infos:
        try:
            kind = _kind(number)
        except LookupError as error:
            raise UserError(
                f"{path}: tensor {name} is of a type that the gguf package cannot read ({error})"
            ) from error
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name} of shape {shape} is not a whole number of blocks of {block}")
        layout = (*shape[:-1], shape[-1] // block * size)
        first = start + offset
        last = first + int(np.prod(layout, dtype=object))
        if last > len(data):
            raise ValueError(f"tensor {name} ends at byte {last}, and the file at byte {len(data)}")
        tensors[name] = Tensor(shape, kind, data[first:last].reshape(layout))
    return tensors


@lru_cache
def _kind(number: int) -> gguf.GGMLQuantizationType:
    """Raises LookupError for a type whose values the gguf package cannot compute."""
    try:
        kind = gguf.GGMLQuantizationType(number)
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError) as error:
        raise LookupError(str(error)) from error
    return kind
