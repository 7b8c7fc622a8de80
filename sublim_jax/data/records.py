"""Records as JSON lines: written whole or not at all, and read back even where a power cut broke off the last line."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from sublim_jax.errors import UserError

Record = dict[str, Any]


def write(path: epath.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """By the first process."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        scratch.replace(path)


def read(path: str | Path) -> Iterator[tuple[str, Record]]:
    """(where it stands, record) of every line of a user's file.

    Raises UserError, naming the line, for one that is no JSON object, and for a file without any.
    """
    try:
        lines = [line for line in enumerate(Path(path).expanduser().read_text().splitlines(), 1) if line[1].strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; name a file of JSON lines") from error
    if not lines:
        raise UserError(f"{path} has no records")
    for number, line in lines:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON ({error}); mend or remove it") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: an object is needed, such as {{…}}")
        yield f"{path}, line {number}", record


def mend(path: epath.Path) -> list[Record]:
    """What an earlier run has appended; a line that was broken off is taken away."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            kept.append(json.loads(line))
        except ValueError:
            continue
    write(path, kept)
    return kept
