"""Records as JSON lines: written whole or not at all, and read back even where a power cut broke off the last line."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

Record = dict[str, Any]


def write(path: epath.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """By the first process."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        scratch.replace(path)


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
