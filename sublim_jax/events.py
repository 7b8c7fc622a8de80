"""TensorBoard's events in a bucket: curves, which a run can do without, so that no failure to write them ends it."""

from contextlib import suppress

from etils import epath
from tensorboardX import SummaryWriter, record_writer

from sublim_jax import storage


class Events:
    """A file of events, written anew at each flush; `tensorboardX` calls the methods."""

    def __init__(self, path: str):
        self._path, self._content = epath.Path(path), bytearray()

    def write(self, data: bytes) -> None:
        self._content += data

    def flush(self) -> None:
        with suppress(Exception):  # of a way to the bucket that is down; the next flush has it all
            storage.write(self._path, bytes(self._content))

    def close(self) -> None:
        self.flush()


class _InBucket:
    open = Events

    @staticmethod
    def directory_check(path: str) -> None:
        """A bucket needs no folders."""


record_writer.register_writer_factory("gs", _InBucket)


def writer(folder: epath.Path) -> SummaryWriter:
    """Of a folder here or in a bucket. By itself it flushes every two minutes."""
    return SummaryWriter(str(folder))
