"""SIGTERM and Ctrl-C, turned into an orderly end.

Outside the training loop a signal raises `Interrupted` where the program stands: artefacts are written whole
or not at all, so nothing is lost. Inside it the loop calls `requested`, saves, and then raises. Several processes have
to stop at the same place: other long work calls `obey` between two parts of it.
"""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

from sublim_jax.errors import Interrupted


def install() -> None:
    """Makes SIGTERM and SIGINT raise `Interrupted`. With several hosts, JAX's preemption service receives SIGTERM."""
    if jax.process_count() > 1:
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


# The preemption service identifies a place to stop by a number that grows with every query of a process, and reports it
# at that place alone.
_QUESTIONS = itertools.count()


class _Cluster:
    heard = False
    deferred = 0  # blocks that will act on it


def _agreed() -> bool:
    """Whether one of several processes received a signal; all query at the same places and get the same answer."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_QUESTIONS)):
        _Cluster.heard = True
    return _Cluster.heard


def obey() -> None:
    """Stops between two parts of long work if one of several processes received a signal.

    Does nothing within a `deferred` block, which handles the signal itself. A single process stops where it arrives.

    Raises Interrupted, on all processes.
    """
    if _agreed() and not _Cluster.deferred:
        raise Interrupted("stopped by SIGTERM")


class Deferred:
    """Signals received but not yet acted upon. A second one stops at once."""

    def __init__(self) -> None:
        self.heard: str | None = None

    def requested(self) -> bool:
        """Whether to stop here; all processes of a cluster query at the same places and get the same answer."""
        if _agreed():
            self.heard = "SIGTERM"
        return self.heard is not None


@contextmanager
def deferred() -> Iterator[Deferred]:
    """Within the block, SIGTERM and SIGINT are recorded instead of raised.

    A single process has to be in its main thread, where Python handles signals; elsewhere they stay as they are.
    """
    state = Deferred()
    if jax.process_count() > 1:
        _Cluster.deferred += 1
        try:
            yield state
        finally:
            _Cluster.deferred -= 1
        return
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _: FrameType | None) -> None:
        state.heard = signal.Signals(number).name
        for signum, handler in before.items():
            signal.signal(signum, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def whole() -> Iterator[None]:
    """Defers signals to the end of the block: libraries with threads of their own must not be interrupted midway.

    Raises:
      Interrupted: after the block, if a signal came to a single process; several act on it where they next query.
    """
    with deferred() as signal:
        yield
    if signal.heard:
        raise Interrupted(f"stopped by {signal.heard}")
