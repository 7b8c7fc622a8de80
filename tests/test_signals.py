"""Signals at awkward moments."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1 as ocp

from sublim_jax import signals
from sublim_jax.errors import Interrupted
from sublim_jax.store import Store


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_obeyed_at_the_end_of_work_that_must_be_whole(number):
    before = signal.getsignal(number)
    done = []
    with pytest.raises(Interrupted, match=f"stopped by {number.name}"), signals.whole():
        os.kill(os.getpid(), number)
        done.append("the rest of the block")
    assert done and signal.getsignal(number) is before


def test_work_in_another_thread_leaves_signals_to_the_main_one(tmp_path):
    """Python lets only the main thread handle them; a server or a notebook may sample in another."""
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor() as pool:
        tree = pool.submit(lambda: Store(tmp_path).json("some", lambda: 3)).result()
        heard = pool.submit(whole_block).result()
    assert (tree, heard) == (3, None) and signal.getsignal(signal.SIGTERM) is before


def whole_block():
    with signals.deferred() as state:
        return state.heard


def test_a_second_signal_does_not_wait():
    signals_of = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signals.install()
        with pytest.raises(Interrupted), signals.whole():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it waited")
    finally:
        for number, handler in signals_of.items():
            signal.signal(number, handler)


def test_a_signal_while_a_file_is_read_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    """Readers catch every error of a damaged file; a signal must pass through."""
    store = Store(tmp_path)
    made = []

    def make(checkpoints):
        made.append(checkpoints)
        return {"x": jnp.ones(2)}

    store.tree("thing", make, like={"x": jnp.zeros(2)})

    def interrupted(*_):
        raise Interrupted("stopped by SIGTERM")

    monkeypatch.setattr(ocp, "load_checkpointables", interrupted)
    with pytest.raises(Interrupted):
        store.tree("thing", make, like={"x": jnp.zeros(2)})
    assert len(made) == 1
