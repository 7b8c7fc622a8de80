"""Records as JSON lines: written whole or not at all, and readable even if a power cut truncated the last line."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from sublim_jax import storage
from sublim_jax.data import files
from sublim_jax.errors import UserError

JSON = (".jsonl", ".ndjson", ".jsonlines", ".json")
Record = dict[str, Any]


def line(record: Mapping[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write(path: epath.Path, records: Sequence[Mapping[str, object]]) -> None:
    """Writes from the first process, whole or not at all."""
    if jax.process_index() == 0:
        storage.write(path, "".join(map(line, records)))


def read(path: str | Path) -> Iterator[tuple[str, Record]]:
    """(location, record) of every line of a user's file, or of every element of a JSON array.

    A Parquet file, the hub's format for most data sets, is read row by row.

    Raises UserError, naming the line, for a record that is not a JSON object, and for a file without records.
    """
    every = _rows(path) if kind(path) == "parquet" else _objects(path)
    if not every:
        raise UserError(f"{path} has no records")
    for where, record in every:
        if not isinstance(record, dict):
            raise UserError(f"{where}: an object is needed, such as {{…}}")
        yield where, record


def kind(path: str | Path) -> str:
    """How a file is read, by its extension: as "parquet", "json" (lines, or an array), or "text"."""
    name = str(path).lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return "parquet"
    return "json" if name.endswith(JSON) else "text"


def _objects(path: str | Path) -> list[tuple[str, object]]:
    text = files.text_of(path, "name a file of JSON lines")
    whole = _whole(text)
    if whole:
        located: list[tuple[str, object]] = [
            (f"{path}, record {number}", record) for number, record in enumerate(whole, 1)
        ]
        for where, record in located:
            files.check_characters(record, where)
        return located
    lines = [(f"{path}, line {number}", line) for number, line in files.lines(text)]
    return [(where, files.json_of(line, where)) for where, line in lines]


def _whole(text: str) -> list[Record]:
    """The objects of a text that is one JSON value: an array, or an object over several lines; [] for JSON lines."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if isinstance(value, dict) and len(files.lines(text)) > 1:
        return [value]
    return value if isinstance(value, list) and all(isinstance(record, dict) for record in value) else []


def _rows(path: str | Path) -> list[tuple[str, object]]:
    import pyarrow  # slow to load, and few files are of this kind
    from pyarrow import parquet

    try:
        rows = parquet.read_table(storage.local(path)).to_pylist()
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; name a file of JSON lines or Parquet") from error
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def repair(path: epath.Path) -> list[Record]:
    """The records that an earlier run appended (`storage.Growing`); a truncated line is removed from the file."""
    kept = []
    # Only a line feed ends a line: texts may contain Unicode's other line separators.
    for text in storage.grown(path).split(b"\n"):
        try:
            record = json.loads(text)
        except ValueError:  # cut off, perhaps in the middle of a character
            continue
        if isinstance(record, dict):
            kept.append(record)
    if jax.process_index() == 0:
        storage.join(path, "".join(map(line, kept)).encode())
    return kept
