"""SHA-256 of files that are read, computed once: artefacts are named by content, not by a path.

A large file's digest is remembered with its size and the time of its last change, so that 15 GB are not read twice.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sublim_jax.assets import cache_folder, digest
from sublim_jax.storage import MODEL_FILES

LARGE = 1 << 26  # bytes; smaller files are read again, in less than a tenth of a second


class Source(NamedTuple):
    """Where a model was read from: its name, the path of its files, and their digest."""

    name: str
    path: str
    digest: str


def of_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises OSError where it cannot be read."""
    path = path.resolve()
    stat = path.stat()
    if stat.st_size < LARGE:
        return digest(path)
    known = {"path": str(path), "size": stat.st_size, "changed": stat.st_mtime_ns}
    note = cache_folder() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    try:
        noted = json.loads(note.read_text())
        if {name: noted[name] for name in known} == known:
            return str(noted["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sha256 = digest(path)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        scratch = note.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(json.dumps({**known, "sha256": sha256}))
        scratch.replace(note)
    except OSError:  # a cache that cannot be written: computed again next time
        pass
    return sha256


def of_array(array: np.ndarray) -> str:
    """The SHA-256 of an array's type, shape and content."""
    array = np.ascontiguousarray(array)
    hasher = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    hasher.update(array.reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def of_model(path: Path) -> str:
    """One digest of a model's file, or of the files of its folder and their names."""
    if path.is_file():
        return of_file(path)
    files = sorted({file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    listed = [[file.name, of_file(file)] for file in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
