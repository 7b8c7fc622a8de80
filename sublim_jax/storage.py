"""Files, local or in a bucket (gs://).

An object of a bucket appears once it is complete, so it is written directly; a local file is written under another name
and renamed. But no object can be moved, appended to, or memory-mapped: a file that grows is kept there in parts, and
one that a library must open is copied into the cache.
"""

import errno
import fnmatch
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import fsspec
import fsspec.config
from etils import epath
from filelock import FileLock

from sublim_jax.errors import UserError
from sublim_jax.progress import say

# Cached listings would hide files that other processes, or other libraries in this one, have written since.
fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
if "GCSFS_DEBUG" not in os.environ:
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises, with tracebacks

BUCKET = "gs://"
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
# Files of a model's folder that decide what it computes: weights, configs, tokenizer and chat template.
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
# Files of a folder that models, adapters and MNIST are read from.
READ = (*MODEL_FILES, "*-ubyte", "*-ubyte.gz")
NEEDED = 'buckets need the gcsfs package: pip install "sublim_jax[gcs]"'


def cache_folder() -> Path:
    """`$SUBLIM_JAX_CACHE`, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SUBLIM_JAX_CACHE") or Path(base) / "sublim_jax")


def in_bucket(path: epath.PathLike) -> bool:
    return str(path).startswith(BUCKET)


def check(name: epath.PathLike) -> None:
    """Raises UserError for an address that is not in a bucket, and where gcsfs is missing."""
    if ADDRESS.match(str(name)):
        bucket_of(str(name))


@contextmanager
def explained(name: epath.PathLike) -> Iterator[None]:
    """Raises errors of a bucket within the block as UserError; that of a missing file is raised unchanged."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if not in_bucket(name) or not (text := explanation(error)):
            raise
        raise UserError(f"{name}: {text}") from error


def explanation(error: BaseException) -> str:
    """What is wrong with a bucket or the connection to it; "" for any other error."""
    text = " ".join(str(error).split())
    signs = ("Forbidden: ", "http_response_code=")  # the second in tensorstore's, which are ValueErrors
    if type(error).__module__.split(".")[0] in ("gcsfs", "aiohttp", "google") or any(sign in text for sign in signs):
        return f"the bucket cannot be used ({text or type(error).__name__}); look at the network and at your rights"
    return ""


def bucket_of(address: str) -> Any:
    """gcsfs, for an address in a bucket. Raises UserError for any other, and where gcsfs is missing."""
    if not re.match(r"gs://[a-z0-9][\w.-]+(/|$)", address):
        raise UserError(f"{address}: of addresses, only those of buckets are known, gs://BUCKET/…; or name a path here")
    try:
        return fsspec.filesystem("gs")
    except ImportError as error:
        raise UserError(f"{address}: {NEEDED}") from error


# ---------------------------------------------------------------------------------------------------------- writing


def write(path: epath.Path, content: bytes | str) -> None:
    """Writes a file, whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        bucket_of(str(path)).pipe_file(str(path), data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_bytes(data)
    scratch.replace(path)


class Growing:
    """A file of lines to append to, which survives a kill: by default each line is written when `add` returns.

    In a bucket its parts are in FILE.parts until `join` merges them into FILE. A part is named by the number of lines
    before it, so that the parts which FILE includes already can be recognised after a kill.

    Args:
      seconds: in a bucket, how long lines may wait for others, to be written together as one part.
    """

    def __init__(self, path: epath.Path, seconds: float = 0.0):
        self._path, self._seconds = path, seconds
        self._waiting: list[str] = []
        self._adding, self._writing = threading.Lock(), threading.Lock()
        self._file: IO[str] | None = None
        if in_bucket(path):
            self._lines, self._written = grown(path).count(b"\n"), time.monotonic()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a")

    def add(self, lines: str) -> None:
        """Appends whole lines, from any thread. Those of threads that wait for each other become one part."""
        if self._file:
            with self._writing:
                self._file.write(lines)
                self._file.flush()
            return
        with self._adding:
            self._waiting.append(lines)
        if time.monotonic() - self._written >= self._seconds:
            self._write()

    def _write(self) -> None:
        with self._writing:
            with self._adding:
                lines, self._waiting = self._waiting, []
            if not lines:
                return
            text = "".join(lines)
            try:
                write(_parts(self._path) / f"{self._lines:012}", text)
            except BaseException:  # they go into the next part
                with self._adding:
                    self._waiting = lines + self._waiting
                raise
            self._lines += text.count("\n")
            self._written = time.monotonic()

    def __enter__(self) -> "Growing":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._file:
            self._file.close()
            return
        self._write()
        if kind is None:
            join(self._path)


def grown(path: epath.Path) -> bytes:
    """The content of a growing file, including its parts; b"" where there is none."""
    whole = path.read_bytes() if path.exists() else b""
    for name, part in _read_parts(path):
        if whole and not whole.endswith(b"\n"):
            whole += b"\n"
        if int(name) >= whole.count(b"\n"):  # the others are merged already: a kill came before they were removed
            whole += part
    return whole


def join(path: epath.Path, content: bytes | None = None) -> None:
    """Merges a growing file's parts into it, or replaces both by `content`."""
    parts = _parts(path)
    if content is not None or parts.exists():
        write(path, grown(path) if content is None else content)
    if parts.exists():
        parts.rmtree(missing_ok=True)


def _parts(path: epath.Path) -> epath.Path:
    return path.with_name(path.name + ".parts")


def _read_parts(path: epath.Path) -> list[tuple[str, bytes]]:
    """(name, content) of each part, in order."""
    parts = sorted((part for part in _parts(path).glob("*") if part.name.isdigit()), key=lambda part: part.name)
    if in_bucket(path) and parts:  # all at once: each request takes a while
        every = bucket_of(str(path)).cat([str(part) for part in parts])
        return [(part.name, every[str(part).removeprefix(BUCKET)]) for part in parts]
    return [(part.name, part.read_bytes()) for part in parts]


# ---------------------------------------------------------------------------------------------------------- reading


def local(name: epath.PathLike, patterns: Sequence[str] = READ) -> Path:
    """A local path; for a file in a bucket, or the files of a folder there, that of a copy in the cache.

    A copy is fetched again once its object has changed.

    Args:
      patterns: of a folder in a bucket, which files are fetched.

    Raises:
      UserError: an address that is not in a bucket, or gcsfs is missing.
      FileNotFoundError: there is nothing in the bucket by that name.
    """
    address = str(name)
    if not ADDRESS.match(address):
        return Path(name).expanduser()
    bucket = bucket_of(address)
    with explained(address):
        return _copy(bucket, address, patterns)


def _copy(bucket: Any, address: str, patterns: Sequence[str]) -> Path:
    try:
        info = bucket.info(address)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no such file in the bucket", address) from error
    home = cache_folder() / "buckets" / hashlib.sha256(address.encode()).hexdigest()[:24]
    place = home / "copy" / address.rstrip("/").rpartition("/")[2]
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_suffix(".lock")):
        if info["type"] != "directory":
            _fetch(bucket, {place: info}, home)
            return place
        place.mkdir(exist_ok=True)
        listed = {place / entry["name"].rpartition("/")[2]: entry for entry in bucket.ls(address, detail=True)}
        wanted = {
            path: entry
            for path, entry in listed.items()
            if entry["type"] != "directory" and any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
        }
        for path in set(place.iterdir()) - set(listed):
            path.unlink()
        _fetch(bucket, wanted, home)
        return place


def _fetch(bucket: Any, files: dict[Path, dict[str, Any]], home: Path) -> None:
    """Copies objects whose generation differs from that of the copy."""
    note = home / "generations.json"
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        known = {}
    for path, about in files.items():
        if path.exists() and known.get(path.name) == about["generation"]:
            continue
        if about["size"] > 1e8:
            say(f"{BUCKET}{about['name']}: {about['size'] / 1e9:.1f} GB to the cache, {home}")
        scratch = home / "scratch"
        bucket.get_file(about["name"], str(scratch))
        if scratch.stat().st_size != about["size"]:
            raise UserError(f"{BUCKET}{about['name']} has changed while it was read; give the same command again")
        scratch.replace(path)
        known[path.name] = about["generation"]
        note.write_text(json.dumps(known))
