"""The folder of a run: claimed for one config, and locked by a process for as long as it lives."""

import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping

import jax
from etils import epath
from filelock import FileLock, Timeout

from sublim_jax import lease, storage
from sublim_jax.errors import UserError
from sublim_jax.lease import Lease
from sublim_jax.sharding import agreed, from_first
from sublim_jax.store import Store, write_json

# How a run is computed, not what: these may change between an interruption and the resumed run. They are values of an
# experiment, or of the experiment in it; an arm's `data` is another thing.
EXECUTION = ("mesh", "runs_at_once", "checkpoint_every", "data", "sampling")
PREFIXES = ("", ".study", ".mnist")
# Seconds until a host must see a new file of a shared folder; NFS may remember for 60 that it is missing.
NOTICED = 90.0
QUERIES = ("max_concurrent", "max_per_minute", "prices")  # how a judge is queried


def claim(
    folder: epath.PathLike, config: Mapping[str, object], *, update: bool = False, bytes_needed: int = 0
) -> Store:
    """The store of a run's folder, claimed for a config for as long as this process lives.

    Args:
      config: the run's values, as JSON has them.
      update: accept a folder with another config's run in it: what still holds is reused.

    Raises:
      UserError: the folder holds a run of another config, cannot be written, is too full, or is not the same one on all
        hosts.
    """
    path = epath.Path(folder).expanduser()
    storage.check(path)
    held: list[FileLock | Lease] = []
    from_first(lambda: held.append(_claimed(path, config, update, bytes_needed)))
    if jax.process_count() > 1:
        _check_shared(path)
    return Store(path, held)


def check(folder: epath.PathLike, config: Mapping[str, object], *, update: bool = False) -> None:
    """Checks a folder without claiming it, before a model is loaded. Raises UserError for a run of another config."""
    path = epath.Path(folder).expanduser()
    storage.check(path)
    with _folder_errors(path):
        _check_config(path, config, update)


def _claimed(path: epath.Path, config: Mapping[str, object], update: bool, bytes_needed: int) -> FileLock | Lease:
    with _folder_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        _check_space(path, bytes_needed)
        _check_config(path, config, update)
        write_json(path / "config.json", config)
    return lock


def _check_shared(path: epath.Path) -> None:
    """Raises UserError on all processes where one of them does not see what the first writes."""

    def write() -> str:
        name = f".seen-{uuid.uuid4().hex}"
        storage.write(path / name, b"")
        return name

    sign = path / from_first(write)
    agreed(lambda: _wait_for(sign))
    from_first(lambda: sign.unlink(missing_ok=True))


def _wait_for(sign: epath.Path) -> None:
    until = time.monotonic() + NOTICED
    while not sign.exists():
        if time.monotonic() > until:
            raise UserError(
                f"--workdir={sign.parent} is another folder on the host of process {jax.process_index()} than on the "
                "first one's; name a folder that all hosts share, or a bucket"
            )
        time.sleep(0.5)


def _check_config(path: epath.Path, config: Mapping[str, object], update: bool) -> None:
    if not (path / "config.json").exists():
        return
    old = config_of(path)
    if old.get("experiment") != config.get("experiment"):
        raise UserError(
            f"{path} holds a run of another experiment, {old.get('experiment')} (preset {old.get('preset')}); "
            "choose another --workdir"
        )
    if not update and (changed := _differences(old, config)):
        raise UserError(
            f"{path} holds a run with another config ({'; '.join(changed[:3])}); choose another --workdir, or "
            "add --update to reuse what still holds and replace the results"
        )


@contextlib.contextmanager
def _folder_errors(path: epath.Path) -> Iterator[None]:
    """Raises errors of a folder, or a bucket, as UserError of one line."""
    try:
        with storage.explained(path):
            if path.exists() and not path.is_dir():
                raise UserError(f"--workdir={path} is a file; name a folder")
            yield
    except OSError as error:
        if storage.in_bucket(path):
            raise UserError(f"cannot write to --workdir={path}: there is no bucket {path.parts[2]} for you") from error
        raise UserError(f"cannot write to --workdir={path} ({error.strerror or error})") from error


def _lock(path: epath.Path) -> FileLock | Lease:
    """A lock that refuses a second run for as long as it is held."""
    if storage.in_bucket(path):
        return lease.take(str(path / ".lock"))
    lock = FileLock(str(path / ".lock"), is_singleton=True)  # a later run of this process is not a second one
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another run is at work in {path}; wait for it or choose another --workdir") from error
    return lock


def config_of(folder: epath.Path) -> dict[str, object]:
    """The config that a folder holds a run of. Raises UserError where it holds none."""
    known = folder / "config.json"
    try:
        config = json.loads(known.read_text())
    except OSError as error:
        raise UserError(f"{folder} holds no run: there is no config.json") from error
    except ValueError as error:
        raise UserError(f"{known} is not readable as JSON ({error}); choose another --workdir") from error
    if not isinstance(config, dict):
        raise UserError(f"{known} is not the config of a run; choose another --workdir")
    return config


def _differences(old: object, new: object, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        execution: tuple[str, ...] = EXECUTION if prefix in PREFIXES else ()
        if prefix.endswith(".evals.judge"):
            execution = QUERIES
        names = sorted((set(old) | set(new)) - set(execution))
        return [line for name in names for line in _differences(old.get(name), new.get(name), f"{prefix}.{name}")]
    return [] if old == new else [f"{prefix.removeprefix('.')}: {old} → {new}"]


def _check_space(path: epath.Path, bytes_needed: int) -> None:
    if storage.in_bucket(path):
        return
    free = shutil.disk_usage(path).free
    if free < bytes_needed:
        raise UserError(
            f"{path} has {free / 1e6:.0f} MB free and this run may need {bytes_needed / 1e6:.0f} MB; "
            "free some space or choose another --workdir"
        )
