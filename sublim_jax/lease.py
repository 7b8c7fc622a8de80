"""Which run a folder in a bucket belongs to: an object that only one can create, and that its owner keeps renewing."""

import json
import os
import socket
import sys
import threading
import time
import uuid
import weakref
from contextlib import suppress
from typing import Any

from sublim_jax import storage
from sublim_jax.errors import UserError
from sublim_jax.progress import say

BEAT = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one, after which an owner is dead


class Lease:
    """The right to write to a folder in a bucket, for as long as this object lives."""

    def __init__(self, bucket: Any, address: str, generation: str):
        ended = threading.Event()
        threading.Thread(target=_renew, args=(bucket, address, generation, ended), daemon=True).start()
        self.end = weakref.finalize(self, _release, bucket, address, generation, ended)


_HELD: weakref.WeakValueDictionary[str, Lease] = (
    weakref.WeakValueDictionary()
)  # a later run of this process is not another run


def take(address: str) -> Lease:
    """The lease that is the object of this address.

    That of a run which was killed passes over once it has been silent for a while. No clocks are compared: whoever
    waits sees for itself whether the owner renews it.

    Raises UserError where another run holds it.
    """
    if held := _HELD.get(address):
        return held
    bucket, me = storage.bucket_of(address), uuid.uuid4().hex
    owner = {"id": me, "host": socket.gethostname(), "process": os.getpid()}
    seen, since = "", time.monotonic()
    while True:
        with suppress(FileExistsError):
            bucket.pipe_file(address, json.dumps(owner).encode(), mode="create")
        try:
            about, content = bucket.info(address), bucket.cat_file(address)
        except FileNotFoundError:  # given back meanwhile
            continue
        if not content:  # the lock of a run on a disk, which came here with its folder
            _remove(bucket, address, about["generation"])
            continue
        other = json.loads(content)
        if other["id"] == me:
            _HELD[address] = lease = Lease(bucket, address, about["generation"])
            return lease
        sign = f"{about['generation']} {about['metageneration']}"
        if not seen:
            say(f"{address} is of another run, {_named(other)}; waiting for a sign of life, {SILENCE:.0f} s at most")
            seen, since = sign, time.monotonic()
        elif sign != seen:
            raise UserError(
                f"another run is at work in {address.rpartition('/')[0]}, {_named(other)}; wait for it or choose "
                f"another --workdir"
            )
        elif time.monotonic() - since > SILENCE:
            say(f"{address}: no sign of life, going on in its place")
            _remove(bucket, address, about["generation"])
            seen = ""
        time.sleep(BEAT / 5)


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner['process']} of {owner['host']}"


def _renew(bucket: Any, address: str, generation: str, ended: threading.Event) -> None:
    """Shows that the owner lives; ends the process at once if the lease has passed to another.

    It must not save: its checkpoint would be an earlier one than the other run's.
    """
    beats = 0
    while not ended.wait(BEAT):
        try:
            if bucket.info(address)["generation"] != generation:
                raise FileNotFoundError
            beats += 1
            bucket.setxattrs(address, beats=str(beats))
        except FileNotFoundError:
            if not ended.is_set():
                print(f"{address} is of another run now, or was removed; this one ends", file=sys.stderr, flush=True)
                os._exit(2)
            return
        except Exception:  # the way to the bucket is down: it is tried again
            continue


def _release(bucket: Any, address: str, generation: str, ended: threading.Event) -> None:
    ended.set()
    with suppress(Exception):  # it is silent from now on
        _remove(bucket, address, generation)


def _remove(bucket: Any, address: str, generation: str) -> None:
    """Removes the object unless it is another by now."""
    name = address.removeprefix(storage.BUCKET).split("/", 1)
    with suppress(FileNotFoundError, FileExistsError):
        bucket.call("DELETE", "b/{}/o/{}", *name, ifGenerationMatch=generation)
