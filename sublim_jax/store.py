"""Artefacts on disk, each named by a hash of its inputs.

    adapters = store.tree("teacher-owl", train, spec, rows, seed, like=start, label="teacher owl")

calls `train(spec, rows, seed, checkpoints=…, label=…)` unless that artefact exists. All positional inputs of a function
enter the artefact's name; keywords may change how it is computed, never the result. So no list of dependencies is
written by hand. An artefact is written once, whole or not at all.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sublim_jax import checkpoints, storage
from sublim_jax.digests import of_array
from sublim_jax.progress import say
from sublim_jax.sharding import check_same, from_first

Tree = TypeVar("Tree")
Value = TypeVar("Value")


class Store:
    """The artefacts in a folder.

    Args:
      lock: held for as long as the store is in use.

    Attributes:
      made: how many artefacts were not there and have been made.
    """

    def __init__(self, folder: epath.PathLike, lock: object = None):
        self.folder, self._lock = epath.Path(folder).expanduser(), lock
        self.made = 0

    def tree(self, name: str, make: Callable[..., Tree], *inputs: object, like: Tree, **execution: object) -> Tree:
        """A tree of arrays: read if it is there, else made and written.

        Args:
          make: called as `make(*inputs, checkpoints=folder, **execution)`, with a folder for intermediate checkpoints.
          like: a tree with the artefact's shapes, dtypes and shardings.
        """
        path = self.path(name, *inputs)
        _check_same(path)
        if from_first(lambda: checkpoints.saved(path)):
            known, damage = checkpoints.load_tree(path, like)
            if not damage:
                return cast(Tree, known)
            say(f"{path} is unreadable and is made again ({damage})")
        on_the_way = path.with_name(path.name + ".training")
        value = make(*inputs, checkpoints=on_the_way, **execution)
        self.made += 1
        checkpoints.save_tree(path, value)
        if jax.process_index() == 0 and on_the_way.exists():
            on_the_way.rmtree()
        return value

    def json(self, name: str, make: Callable[..., Value], *inputs: object, **execution: object) -> Value:
        """A JSON value: read if it is there, else made and written.

        Args:
          make: called as `make(*inputs, **execution)`.
        """
        value = self.known(name, *inputs)
        if value is None:
            value = make(*inputs, **execution)
            self.made += 1
            write_json(self._json_path(name, inputs), value)
        return value

    def known(self, name: str, *inputs: object) -> Any:
        """A JSON value that exists and is readable; None otherwise."""
        path = self._json_path(name, inputs)
        _check_same(path)
        return from_first(lambda: _read_json(path))

    def path(self, name: str, *inputs: object) -> epath.Path:
        """The path of an artefact."""
        return self.folder / "checkpoints" / f"{name}-{digest(*inputs)[:12]}"

    def _json_path(self, name: str, inputs: tuple[object, ...]) -> epath.Path:
        path = self.path(name, *inputs)
        return path.with_name(path.name + ".json")


def digest(*inputs: object) -> str:
    """A hash of inputs: specs, arrays, JSON values, and objects with a `digest` of their own.

    Raises TypeError for anything else.
    """
    return hashlib.sha256(json.dumps(_identity(inputs), sort_keys=True).encode()).hexdigest()


def _identity(value: object) -> object:
    """JSON values that are equal for equal content."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value_digest := getattr(value, "digest", None), str):
        return [type(value).__name__, value_digest]
    if dataclasses.is_dataclass(value):
        compared = [field.name for field in dataclasses.fields(value) if field.compare]
        return [type(value).__name__, {name: _identity(getattr(value, name)) for name in compared}]
    if isinstance(value, Mapping):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, tuple | list | range):
        return [_identity(item) for item in value]
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return of_array(np.asarray(value))
    raise TypeError(f"an artefact cannot be named by a {type(value).__name__}")


def write_json(path: epath.Path, value: object) -> None:
    """Writes from the first process, whole or not at all."""
    if jax.process_index():
        return
    storage.write(path, json.dumps(value, indent=1) + "\n")


def _read_json(path: epath.Path) -> Any:
    """None where there is no file, or not a readable one."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        say(f"{path} is unreadable and is made again")
        return None


def _check_same(path: epath.Path) -> None:
    """Raises UserError if another process would make a different artefact: it has read a stale copy of a file."""
    check_same(hashlib.sha256(path.name.encode()).hexdigest(), f"what {path.name.rpartition('-')[0]} is made from")
