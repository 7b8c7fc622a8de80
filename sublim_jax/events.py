"""TensorBoard's events in a bucket. Curves are optional: a failure to write them does not end a run."""

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
        with suppress(Exception):  # the bucket may be unreachable; the next flush writes everything
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
    """A writer for a local folder or one in a bucket; it flushes every two minutes."""
    return SummaryWriter(str(folder))
