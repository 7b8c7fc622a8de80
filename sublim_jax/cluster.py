"""The processes of one run: joined at the start, and ended together.

Where a process fails, the others would wait for it in a collective forever. It therefore publishes its error message;
each of the others looks for one every half second, prints it, and exits as well.
"""

import contextlib
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax._src import distributed  # the processes' key-value store, which has no public name in JAX

from sublim_jax.errors import UserError, one_line

FAILED = "sublim_jax/failed"
_PODS = "this pod belongs to an indexed job, and JAX does not find the other pods"
_BY_HAND = "or name them by --coordinator, --num_processes and --process_id"
LOOK = 0.5  # seconds between two looks for another process's failure
LONGEST = 7 * 86400  # seconds that one process may work while the others wait
SILENCE = 40  # seconds without a sign of life, after which JAX ends the processes that are left


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes of a TPU pod, SLURM, GKE or a coordinator; alone where there is none.

    Raises UserError for a coordinator that makes no sense, and for one of several pods that cannot find the others.
    """
    initialize = partial(
        jax.distributed.initialize, local_device_ids=_local_devices(), heartbeat_timeout_seconds=SILENCE
    )
    if coordinator:
        _check(coordinator, processes, process)
        initialize(coordinator, processes, process)
        return
    if processes is not None or process is not None:
        raise UserError("--num_processes and --process_id need --coordinator, without which each process runs alone")
    try:
        initialize()
    except ValueError as error:  # no cluster here
        if "KUBERNETES_SERVICE_HOST" in os.environ and os.environ.get("JOB_COMPLETION_INDEX", "0") != "0":
            raise UserError(f"{_PODS}; install jax[k8s], {_BY_HAND}") from error
        return
    except RuntimeError as error:
        if "before any JAX calls" in str(error):  # a notebook, or a test, which has used JAX alone before
            return
        if "KUBERNETES_SERVICE_HOST" not in os.environ:
            raise
        said = one_line(error)
        raise UserError(f"{_PODS} ({said}); let its account list pods and read jobs, {_BY_HAND}") from error


def _local_devices() -> list[int] | None:
    """[], which is all of the host's devices, where SLURM starts one process a node; None leaves the choice to JAX.

    JAX would take SLURM_LOCALID for the one GPU of each process.
    """
    nodes = os.environ.get("SLURM_STEP_NUM_NODES")
    alone = nodes is not None and nodes == os.environ.get("SLURM_NTASKS")
    return [] if alone and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None


def _check(coordinator: str, processes: int | None, process: int | None) -> None:
    if processes is None or process is None:
        raise UserError("--coordinator needs --num_processes and --process_id")
    if not 0 <= process < processes:
        raise UserError(f"--process_id={process} must be from 0 to {processes - 1}, below --num_processes")
    if not re.fullmatch(r".+:[0-9]{1,5}", coordinator):
        raise UserError(f"--coordinator={coordinator}: host:port is needed, such as 10.0.0.1:1234")


def joined() -> bool:
    """Whether this is one of several processes."""
    return distributed.global_state.client is not None and (distributed.global_state.num_processes or 1) > 1


_MEETINGS = itertools.count()


def meet() -> None:
    """Waits for the other processes, however long it takes: a collective of CPUs gives up after half a minute."""
    if joined():
        _keys().wait_at_barrier(f"sublim_jax/{next(_MEETINGS)}", timeout_in_ms=LONGEST * 1000)


def lost(error: Exception) -> bool:
    """Whether an error means that another process of this run cannot be reached any more, or did not come."""
    signs = r"gloo|nccl|connection|socket|unavailable|heartbeat|barrier"
    return joined() and bool(re.search(signs, str(error), re.IGNORECASE))


class Watch:
    """A thread that ends this process, with the same error message, when another one has failed.

    Args:
      fail: prints the message.
    """

    def __init__(self, fail: Callable[[str], None]):
        self._fail, self._over = fail, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        """To be called once the processes are joined."""
        if joined():
            self._thread.start()

    def stop(self) -> None:
        """To be called before this process ends by itself."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK):
            try:
                code, line = _keys().key_value_try_get(FAILED).split(" ", 1)
            except jax.errors.JaxRuntimeError:  # there is none
                continue
            self._fail(line)
            _exit(int(code))


def end_all(line: str, code: int) -> None:
    """Publishes an error message for the other processes and exits; returns where there are none."""
    if not joined():
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or the first process is gone
        _keys().key_value_set(FAILED, f"{code} {line}")
    time.sleep(4 * LOOK)  # the first process keeps the store, and the others read it
    _exit(code)  # not through JAX's own shutdown, which waits for processes that wait for this one


def _keys() -> Any:
    """The key-value store that the processes share, which JAX does not type."""
    return distributed.global_state.client


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
