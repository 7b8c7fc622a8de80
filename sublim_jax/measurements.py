"""One long table of measurements: every number that an experiment reports, kept as Parquet beside its report.

    import pandas
    pandas.read_parquet("runs/mnist-quick/measurements.parquet")

`results.json`, `report.md` and the figures are functions of this table, of the spec and of a few notes.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from sublim_jax import storage

FILE = "measurements.parquet"


class Measurement(NamedTuple):
    """One number.

    Attributes:
      arm: what was done: the experiment's arm, or its setting.
      run: which replicate, counted from 0.
      teacher: of a student: its teacher.
      subject: what was measured: "student", "teacher", "base", an objective, a model.
      measure: of what, with its unit where it has one: "margin", "test_accuracy".
      item: which of several: a word, a question; "" for a single number.
      step: training updates before the measurement; or the number of a step along a scale.
    """

    arm: str
    measure: str
    value: float
    run: int = 0
    teacher: str = ""
    subject: str = ""
    item: str = ""
    step: int = 0


_SCHEMA = pa.schema(
    [
        ("experiment", pa.string()),
        ("arm", pa.string()),
        ("run", pa.int32()),
        ("teacher", pa.string()),
        ("subject", pa.string()),
        ("measure", pa.string()),
        ("item", pa.string()),
        ("step", pa.int64()),
        ("value", pa.float64()),
    ]
)


class Measurements(tuple[Measurement, ...]):
    """Rows in the order in which they were measured."""

    def where(self, **given: object) -> "Measurements":
        """The rows whose fields have these values."""
        return Measurements(row for row in self if all(getattr(row, name) == value for name, value in given.items()))

    def values(self, **given: object) -> list[float]:
        """The numbers of the rows whose fields have these values."""
        return [row.value for row in self.where(**given)]

    @overload
    def names(self, field: Literal["run", "step"], **given: object) -> list[int]: ...
    @overload
    def names(self, field: Literal["arm", "teacher", "subject", "measure", "item"], **given: object) -> list[str]: ...
    def names(self, field: str, **given: object) -> list[int] | list[str]:
        """The distinct values of a field, in order."""
        return list(dict.fromkeys(getattr(row, field) for row in self.where(**given)))


def from_array(
    values: npt.ArrayLike, along: str | Mapping[str, Sequence[Any]] = "run", **fields: Any
) -> list[Measurement]:
    """One row for each number of an array, in order.

    Args:
      along: the field of each axis, with its values; or a single field that counts from 0.
    """
    numbers = np.asarray(values, np.float64)
    axes = {along: range(len(numbers))} if isinstance(along, str) else along
    places = itertools.product(*axes.values())
    return [
        Measurement(value=value, **dict(zip(axes, place)), **fields)
        for place, value in zip(places, numbers.ravel().tolist(), strict=True)
    ]


def write(folder: epath.PathLike, experiment: str, rows: Sequence[Measurement]) -> bool:
    """Writes the table, whole or not at all, by the first process, unless the folder holds the same one.

    Returns:
      whether it was written.
    """
    if jax.process_index():
        return False
    columns: dict[str, list[object]] = {name: [getattr(row, name) for row in rows] for name in Measurement._fields}
    columns["experiment"] = [experiment] * len(rows)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: columns[name] for name in _SCHEMA.names}, schema=_SCHEMA), sink)
    file, content = epath.Path(folder) / FILE, sink.getvalue().to_pybytes()
    if file.exists() and file.read_bytes() == content:
        return False
    storage.write(file, content)
    return True


def read(folder: epath.PathLike) -> Measurements:
    """The table of a finished run. Raises OSError where there is none."""
    table = pq.read_table(pa.BufferReader((epath.Path(folder) / FILE).read_bytes())).drop_columns(["experiment"])
    return Measurements(Measurement(**row) for row in table.to_pylist())
