"""Records as JSON lines: written whole or not at all, and read back even where a power cut broke off the last line."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from sublim_jax.errors import UserError

Record = dict[str, Any]


def line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write(path: epath.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """By the first process."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text("".join(map(line, records)))
        scratch.replace(path)


def read(path: str | Path) -> Iterator[tuple[str, Record]]:
    """(where it stands, record) of every line of a user's file.

    A Parquet file, which is what the hub has of most data sets, is read by its rows.

    Raises UserError, naming the line, for one that is no JSON object, and for a file without any.
    """
    if str(path).endswith(".parquet"):
        yield from _rows(path)
        return
    try:
        lines = [one for one in enumerate(_lines(Path(path).expanduser().read_bytes()), 1) if one[1].strip()]
    except OSError as error:
        raise UserError(f"{path}: {error}; name a file of JSON lines") from error
    if not lines:
        raise UserError(f"{path} has no records")
    for number, text in lines:
        try:
            record = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON ({error}); mend or remove it") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: an object is needed, such as {{…}}")
        yield f"{path}, line {number}", record


def _lines(content: bytes) -> list[bytes]:
    # Only these end a line of JSON: a text may hold other line separators of Unicode as they are.
    return content.replace(b"\r\n", b"\n").split(b"\n")


def _rows(path: str | Path) -> Iterator[tuple[str, Record]]:
    import pyarrow  # slow to load, and few files are of this kind
    from pyarrow import parquet

    try:
        rows = parquet.read_table(Path(path).expanduser()).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; name a file of JSON lines or Parquet") from error
    if not rows:
        raise UserError(f"{path} has no records")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def mend(path: epath.Path) -> list[Record]:
    """What an earlier run has appended; a line that was broken off is taken away."""
    kept = []
    for text in _lines(path.read_bytes()) if path.exists() else ():
        try:
            record = json.loads(text)
        except ValueError:  # cut off, perhaps in the middle of a character
            continue
        if isinstance(record, dict):
            kept.append(record)
    write(path, kept)
    return kept
