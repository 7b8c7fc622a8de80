"""The folder of one run: its config, and artefacts named by a hash of everything they depend on.

An artefact is written once, whole or not at all. A second run finds it there; an interrupted one goes on from the
last checkpoint beside it; a changed config redoes only what the change touches.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sublim_jax import checkpoints
from sublim_jax.errors import UserError
from sublim_jax.progress import say
from sublim_jax.store import Store

Tree = TypeVar("Tree")

# How a run is computed, not what: these may change between an interruption and its continuation.
EXECUTION = ("mesh", "runs_at_once", "checkpoint_every", "data", "sampling")


def claim(folder: epath.PathLike, config: Mapping[str, Any], *, update: bool = False, bytes_needed: int = 0) -> Store:
    """The store of a run's folder, claimed for a config for as long as this process lives.

    Args:
      config: the run's values, JSON values.
      update: accept a folder with another config's run in it: what still holds is reused.

    Raises:
      UserError: the folder holds a run of another config, cannot be written, or is too full.
    """
    workdir = Workdir(folder)
    workdir.open(config, update=update, bytes_needed=bytes_needed)
    return Store(workdir.path, lock=workdir.held)


class Workdir:
    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path).expanduser()
        self.held: FileLock | None = None

    def open(self, config: Any, *, update: bool = False, bytes_needed: int = 0) -> None:
        """Claims the folder for a config.

        Args:
          update: accept a folder with another config's run in it: what still holds is reused.

        Raises:
          UserError: the folder holds a run of another config, cannot be written, or is too full.
        """
        known = self.path / "config.json"
        new = plain(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            old = config_of(self.path) if known.exists() else None
            self._lock()
            _check_space(self.path, bytes_needed)
            if old is not None and not update and (changed := _differences(old, new)):
                raise UserError(
                    f"{self.path} holds a run with another config ({'; '.join(changed[:3])}); choose another "
                    "--workdir, or add --update to reuse what still holds and replace the results"
                )
            write_json(known, new)
        except OSError as error:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--workdir={self.path} is a file; name a folder") from error
            raise UserError(f"cannot write to --workdir={self.path} ({error.strerror or error})") from error
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("workdir")

    def _lock(self) -> None:
        """Keeps a second run out for as long as this process lives."""
        if jax.process_index() or "://" in str(self.path):
            return
        self.held = FileLock(str(self.path / ".lock"))
        try:
            self.held.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"another run is at work in {self.path}; wait for it or choose another --workdir"
            ) from error

    def tree(self, name: str, depends: Any, make: Callable[[epath.Path], Tree], like: Tree) -> Tree:
        """An artefact of arrays: read if it is there, else made and written.

        Args:
          depends: everything the artefact depends on, as JSON values.
          make: makes it; its argument is a folder for checkpoints on the way.
          like: a tree with the artefact's shapes, dtypes and shardings.
        """
        path = self.artefact(name, depends)
        if _agreed(path.exists()):
            try:
                return checkpoints.load_tree(path, like)
            except Exception as error:  # whatever a damaged file makes the storage libraries raise
                say(f"{path} is unreadable and is made again ({(str(error).splitlines() or ['?'])[0]})")
        on_the_way = path.with_name(path.name + ".training")
        value = make(on_the_way)
        checkpoints.save_tree(path, value)
        if jax.process_index() == 0 and on_the_way.exists():
            on_the_way.rmtree()
        return value

    def json(self, name: str, depends: Any, make: Callable[[], Any]) -> Any:
        """An artefact of JSON values: read if it is there, else made and written."""
        path = self.artefact(name, depends)
        path = path.with_name(path.name + ".json")
        if _agreed(path.exists()):
            try:
                return json.loads(path.read_text())
            except ValueError:
                say(f"{path} is unreadable and is made again")
        value = make()
        write_json(path, value)
        return value

    def known(self, name: str, depends: Any) -> bool:
        """Whether an artefact of JSON values is there."""
        path = self.artefact(name, depends)
        return _agreed(path.with_name(path.name + ".json").exists())

    def artefact(self, name: str, depends: Any) -> epath.Path:
        """Where an artefact lies, by a hash of what it depends on."""
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
        return self.path / "checkpoints" / f"{name}-{digest}"


def config_of(folder: epath.Path) -> dict[str, Any]:
    """The config that a folder holds a run of. Raises UserError where it holds none."""
    known = folder / "config.json"
    try:
        config = json.loads(known.read_text())
    except OSError as error:
        raise UserError(f"{folder} holds no run: there is no config.json") from error
    except ValueError as error:
        raise UserError(f"{known} is not readable as JSON ({error}); choose another --workdir") from error
    if not isinstance(config, dict):
        raise UserError(f"{known} is no config of a run; choose another --workdir")
    return config


def digest(tree: Any) -> str:
    """A hash of a tree's arrays, for what depends on them."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(leaf)
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def plain(config: Any) -> Any:
    """A config as JSON values."""
    return json.loads(config.to_json() if isinstance(config, ConfigDict) else json.dumps(config))


def write_json(path: epath.Path, value: Any) -> None:
    """Writes from the first process, whole or not at all."""
    if jax.process_index():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(value, indent=1) + "\n")
    scratch.replace(path)


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted((set(old) | set(new)) - set(EXECUTION))
        return [line for name in names for line in _differences(old.get(name), new.get(name), f"{prefix}.{name}")]
    return [] if old == new else [f"{prefix.removeprefix('.')}: {old} → {new}"]


def _check_space(path: epath.Path, bytes_needed: int) -> None:
    if "://" in str(path):
        return
    free = shutil.disk_usage(path).free
    if free < bytes_needed:
        raise UserError(
            f"{path} has {free / 1e6:.0f} MB free and this run may need {bytes_needed / 1e6:.0f} MB; "
            "free some space or choose another --workdir"
        )


def _agreed(flag: bool) -> bool:
    """The first process's answer, for all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))
