"""Checkpoints of a training run, and finished trees of arrays, through orbax: asynchronous and atomic."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from sublim_jax import cluster, signals, storage
from sublim_jax.errors import UserError, is_of_memory, one_line
from sublim_jax.progress import say
from sublim_jax.sharding import from_each, from_first

KEPT = 2  # the newest, and one to fall back to
UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of checkpoints that were being written
STATE = "state"  # orbax's name for a tree of arrays
COMMITTED = "commit_success.txt"  # in complete checkpoints of a bucket


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a tree of arrays: what a load needs to know."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Checkpoints:
    """The checkpoints of one training run: the state, and each process's data position.

    Use it while signals are deferred: its threads must not be interrupted.

    Orbax's own manager of checkpoints is not used, because it queries JAX's preemption service by the step that it
    saves. The service agrees on a place to stop by the number last queried, and `signals` has other numbers: a signal
    that came just after a save was never acted on.
    """

    def __init__(self, directory: epath.PathLike):
        self._folder = _absolute(epath.Path(directory))
        self._saving: tuple[int, ocp.AsyncResponse[None]] | None = None
        if jax.process_index() == 0 and self._folder.exists():
            for path in self._folder.iterdir():
                if UNFINISHED in path.name or (path.name.isdigit() and not saved(path)):
                    path.rmtree()

    def close(self) -> None:
        """Waits for a save in progress; then only the newest are kept."""
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        response.result()
        if jax.process_index() == 0:
            steps = self._steps()
            kept = [known for known in steps if known <= step][-KEPT:]
            for outdated in set(steps) - set(kept):  # later ones were unreadable, and passed over
                (self._folder / str(outdated)).rmtree()

    def save(self, step: int, state: PyTree, data_position: dict[str, object] | None) -> None:
        """Starts a save and returns once the arrays are copied; a half-written one is never seen."""
        self.close()
        metadata = {"data_positions": from_each(data_position)}
        with _context():
            response = ocp.save_checkpointables_async(
                self._folder / str(step), {STATE: state}, custom_metadata=metadata, overwrite=True
            )
        self._saving = step, response

    def _steps(self) -> list[int]:
        """The steps of complete checkpoints, rising."""
        if not self._folder.exists():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit() and saved(path))

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, object] | None] | None:
        """The newest state that all processes can read, and this process's data position, on the shardings of `like`.

        An unreadable checkpoint is reported and passed over for the one before it. None if there is none.

        Raises UserError where each process has a data position of its own and their number has changed.
        """
        for step in from_first(lambda: self._steps()[::-1]):
            state, positions, damage = self._read(step, like)
            if damage:
                say(f"the checkpoint of step {step} is unreadable, going back to the one before it ({damage})")
                continue
            if all(position is None for position in positions):  # batches that a key decides, on whatever processes
                return state, None
            if len(positions) != jax.process_count():
                raise UserError(
                    f"this run was saved by {len(positions)} process(es), each at its own place in the data, and now "
                    f"there are {jax.process_count()}; resume it on as many"
                )
            return state, positions[jax.process_index()]
        return None

    def _read(self, step: int, like: PyTree) -> tuple[PyTree | None, Any, str]:
        """(the state, every process's data position, ""), or (None, None, the damage) on all processes."""
        path = self._folder / str(step)
        positions, damage = _readable(lambda: ocp.checkpointables_metadata(path).custom_metadata["data_positions"])
        if damage:
            return None, None, damage
        state, damage = _load(path, like)
        return state, positions, damage


@contextmanager
def opened(directory: epath.PathLike | None) -> Iterator[Checkpoints | None]:
    """The checkpoints of a run, within a `with` block; None without a directory."""
    if directory is None:
        yield None
        return
    checkpoints = Checkpoints(directory)
    try:
        yield checkpoints
    except BaseException as error:
        # After a failure, unlike a signal, another process may be lost, and its part of a save never comes.
        if not (isinstance(error, Exception) and cluster.joined()):
            checkpoints.close()
        raise
    checkpoints.close()


def saved(path: epath.Path) -> bool:
    """Whether a complete tree of arrays is there. In a bucket, which cannot rename, a marker file is written last."""
    return (path / COMMITTED).exists() if storage.in_bucket(path) else path.exists()


def _absolute(path: epath.Path) -> epath.Path:
    return path if storage.in_bucket(path) else path.absolute()


def save_tree(path: epath.Path, tree: PyTree) -> None:
    """Writes a tree of arrays, whole or not at all."""
    with signals.whole(), _context():
        ocp.save(_absolute(path), tree, overwrite=True)


def load_tree(path: epath.Path, like: PyTree) -> tuple[PyTree | None, str]:
    """(a tree of arrays on the shapes, dtypes and shardings of `like`, ""), or (None, the damage) on all processes
    where one of them cannot read it.

    Raises the error where it says nothing about the file: the bucket or the memory was at fault.
    """
    path = _absolute(path)
    with signals.whole():
        _, damage = _readable(lambda: ocp.checkpointables_metadata(path))
        return (None, damage) if damage else _load(path, like)


def _context() -> ocp.Context:
    """How orbax writes: a folder that cannot be made is an error at once, and none of its threads waits for it; no
    process looks by itself whether a folder is there that another is replacing."""
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    context.file.skip_sync_file_validations = True
    return context


def _load(path: epath.Path, like: PyTree) -> tuple[PyTree | None, str]:
    """(a tree of arrays, ""), or (None, the damage) on all processes, which have agreed that its metadata is readable.

    Orbax counts its loads. A process that failed on the metadata would be one behind the others for good.
    """
    wanted = {STATE: abstract(like)}
    return _readable(lambda: ocp.load_checkpointables(path, wanted)[STATE])


def _readable(read: Callable[[], Any]) -> tuple[Any, str]:
    """(what `read` returns, ""), or (None, the damage) on all processes where one of them cannot read."""
    value, damage = None, None
    try:
        value = read()
    except Exception as error:  # whatever a damaged file makes the storage libraries raise
        if storage.explanation(error) or is_of_memory(error):
            raise
        damage = one_line(error)
    damages = [text for text in from_each(damage) if text is not None]
    return (None, damages[0]) if damages else (value, "")
