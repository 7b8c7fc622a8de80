"""The training loop on a tiny transformer, a least-squares fit with a closed form, and stacked replicas."""

import dataclasses
import gc
import os
import shutil
import signal
import weakref
from contextlib import closing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from sublim_jax import checkpoints
from sublim_jax.checkpoints import opened
from sublim_jax.errors import Interrupted, UserError
from sublim_jax.models.functional import functions
from sublim_jax.models.small import Transformer
from sublim_jax.objectives import cross_entropy
from sublim_jax.sharding import named
from sublim_jax.training import Program, fit

VOCAB, LENGTH, WIDTH = 11, 6, 16


NETWORK = functions(lambda rngs: Transformer(VOCAB, WIDTH, rngs=rngs))


def token_loss(params, frozen, batch, key):
    logits = NETWORK.apply(params, batch["tokens"][..., :-1])
    return cross_entropy(logits, batch["tokens"][..., 1:], weights=batch["weights"][..., 1:]), {}


class Rows:
    """An iterator of counting sequences whose position can be saved."""

    def __init__(self, batch=8, seed=0):
        self.batch, self.seed, self.position = batch, seed, 0

    def __next__(self):
        rng = np.random.default_rng((self.seed, self.position))
        self.position += 1
        start, step = rng.integers(0, VOCAB, (self.batch, 1)), rng.integers(1, 3, (self.batch, 1))
        tokens = ((start + step * np.arange(LENGTH)) % VOCAB).astype(np.int32)
        return {"tokens": tokens, "weights": np.asarray(rng.random(tokens.shape) < 0.8, np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def lm(mesh, **options):
    return Program(token_loss, optax.adam(1e-2), mesh, **{"steps_per_dispatch": 4, **options})


def start(program, seed=0):
    return program.init(NETWORK.init(jax.random.key(seed)))


def assert_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def assert_close(a, b, rtol=2e-4, atol=2e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), jax.device_get(a), jax.device_get(b))


def test_a_transformer_learns_to_count(mesh_of):
    program = lm(mesh_of(1))
    seen = []
    fit(
        program,
        start(program),
        steps=150,
        key=jax.random.key(0),
        iterator=Rows(32),
        log=lambda step, values: seen.append((step, values["loss"])),
    )
    losses = np.concatenate([values for _, values in seen])
    assert [step for step, _ in seen] == list(range(0, 150, 4))
    assert losses.shape == (150,)
    assert losses[:5].mean() > 2.0 and losses[-10:].mean() < 1.0


@pytest.mark.parametrize("axes", [dict(replica=8), dict(replica=1, fsdp=4, tensor=2), dict(replica=1, fsdp=8)])
def test_eight_devices_give_what_one_gives(mesh_of, axes):
    single, sharded = lm(mesh_of(1)), lm(mesh_of(8, **axes))
    a = fit(single, start(single), steps=10, key=jax.random.key(0), iterator=Rows())
    b = fit(sharded, start(sharded), steps=10, key=jax.random.key(0), iterator=Rows())
    assert_close(a.params, b.params)


def test_parameters_and_moments_are_split_over_the_mesh(mesh_of):
    program = lm(mesh_of(8, replica=1, fsdp=4, tensor=2))
    state = fit(program, start(program), steps=3, key=jax.random.key(0), iterator=Rows())
    adam = state.opt_state[0]
    for tree in (state.params, adam.mu, adam.nu):
        kernel = tree["up"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (WIDTH // 4, 2 * WIDTH // 2)


def test_accumulating_is_exactly_a_larger_batch(mesh_of):
    """With masked positions too: micro-batches add sums and counts, never means."""
    whole, parts = lm(mesh_of(1)), lm(mesh_of(1), accumulate=3)

    class Joined(Rows):
        def __next__(self):
            three = [super(Joined, self).__next__() for _ in range(3)]
            return jax.tree.map(lambda *leaves: np.concatenate(leaves), *three)

    a = fit(whole, start(whole), steps=5, key=jax.random.key(0), iterator=Joined())
    b = fit(parts, start(parts), steps=5, key=jax.random.key(0), iterator=Rows())
    assert_close(a.params, b.params)


def test_a_dispatch_of_any_size_gives_the_same_bits(mesh_of):
    results = []
    for size in (1, 3, 50):
        program = lm(mesh_of(1), steps_per_dispatch=size)
        results.append(fit(program, start(program), steps=7, key=jax.random.key(0), iterator=Rows()))
    assert_bits(results[0], results[1])
    assert_bits(results[0], results[2])


@pytest.mark.parametrize("axes", [dict(devices=1), dict(devices=8, replica=2, fsdp=2, tensor=2)])
def test_nothing_is_compiled_twice(mesh_of, axes):
    program = lm(mesh_of(**axes))
    fit(program, start(program), steps=11, key=jax.random.key(0), iterator=Rows())
    fit(program, start(program, 1), steps=6, key=jax.random.key(1), iterator=Rows(seed=1))
    shardings, structure = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, start(program)))
    assert program._compiled(structure, tuple(shardings))._cache_size() == 1


def test_what_a_loss_holds_is_let_go_of_with_its_program(mesh_of):
    """In a study, the loss holds a whole model; without this, three arms in one process keep three models."""

    class Held:
        base = jnp.ones((4, 4))

    def run():
        held = Held()

        def loss(params, frozen, batch, key):
            return (jnp.sum((params["w"] @ held.base) ** 2), jnp.float32(1)), {}

        program = Program(loss, optax.adam(0.1), mesh_of(1), lambda frozen, key, index: jnp.zeros(1))
        fit(program, program.init({"w": jnp.ones((2, 4))}), steps=2, key=jax.random.key(0))
        return weakref.ref(held), weakref.ref(program)

    references = run()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_hidden_host_sync_is_refused(mesh_of):
    """A host array in a dispatch raises an error, instead of a silent transfer at every step."""

    def loss(params, frozen, batch, key):
        (total, count), metrics = token_loss(params, frozen, batch, key)
        return (total * frozen, count), metrics

    program = dataclasses.replace(lm(mesh_of(1)), loss=loss)
    state = start(program)
    with pytest.raises(Exception, match="Disallowed host-to-device"):
        fit(program, state, steps=2, key=jax.random.key(0), iterator=Rows(), frozen=np.float32(1))


# ----------------------------------------------------------------------------------------- order, saving, stopping


def test_the_order_inside_the_loop(mesh_of, tmp_path, monkeypatch):
    """Evaluate the old state, save it, take the next batches, dispatch, read the previous dispatch."""
    events = []

    class Spy(Rows):
        def __next__(self):
            events.append(f"take {self.position}")
            return super().__next__()

    from sublim_jax.checkpoints import Checkpoints

    save = Checkpoints.save

    def spy_save(self, step, state, position):
        events.append(f"save {step} at {position['position']}")
        save(self, step, state, position)

    monkeypatch.setattr(Checkpoints, "save", spy_save)
    program = lm(mesh_of(1), steps_per_dispatch=2)
    dispatch = program.dispatch

    def noted(*args):
        events.append(f"dispatch to {int(args[-1])}")
        return dispatch(*args)

    object.__setattr__(program, "dispatch", noted)
    fit(
        program,
        start(program),
        steps=6,
        key=jax.random.key(0),
        iterator=Spy(),
        checkpoints=epath.Path(tmp_path),
        checkpoint_every=4,
        evaluate=lambda params, step: events.append(f"evaluate {step}"),
        evaluate_every=4,
        log=lambda first, values: events.append(f"read {first}"),
    )
    assert events == [
        *["evaluate 0", "take 0", "take 1", "dispatch to 2"],
        *["take 2", "take 3", "dispatch to 4", "read 0"],
        *["evaluate 4", "save 4 at 4", "take 4", "take 5", "dispatch to 6", "read 2"],
        *["evaluate 6", "read 4"],
    ]


def interrupted_after(dispatches, number=signal.SIGTERM):
    """A log function that sends this process a signal after `count` dispatches."""
    count = [0]

    def log(first, values):
        count[0] += 1
        if count[0] == dispatches:
            os.kill(os.getpid(), number)

    return log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_run_ends_with_the_same_bits(mesh_of, tmp_path, number):
    program = lm(mesh_of(1))
    run = partial(fit, program, steps=20, key=jax.random.key(0))
    whole = run(start(program), iterator=Rows())
    with pytest.raises(Interrupted, match=r"step 12 of"):
        run(start(program), iterator=Rows(), checkpoints=epath.Path(tmp_path), log=interrupted_after(2, number))
    steps = []
    resumed = run(
        start(program), iterator=Rows(), checkpoints=epath.Path(tmp_path), log=lambda step, _: steps.append(step)
    )
    assert steps[0] == 12
    assert_bits(whole, resumed)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_during_the_last_dispatch_loses_nothing(mesh_of, tmp_path):
    program, dispatches = lm(mesh_of(1)), []
    run = partial(fit, program, steps=20, key=jax.random.key(0), checkpoints=epath.Path(tmp_path))
    with pytest.raises(Interrupted, match="at the end of"):
        run(start(program), iterator=Rows(), log=interrupted_after(5))  # of five
    resumed = run(start(program), iterator=Rows(), log=lambda step, _: dispatches.append(step))
    assert int(resumed.step) == 20 and not dispatches


def test_a_state_saved_on_eight_devices_goes_on_with_one(mesh_of, tmp_path):
    sharded, single = lm(mesh_of(8, replica=1, fsdp=8)), lm(mesh_of(1))
    whole = fit(single, start(single), steps=12, key=jax.random.key(0), iterator=Rows())
    options = dict(key=jax.random.key(0), checkpoints=epath.Path(tmp_path), checkpoint_every=4)
    fit(sharded, start(sharded), steps=9, iterator=Rows(), **options)
    resumed = fit(single, start(single), steps=12, iterator=Rows(), **options)
    assert_close(whole.params, resumed.params)
    with pytest.raises(UserError, match="holds step 8 of a longer training"):
        fit(single, start(single), steps=5, iterator=Rows(), **options)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_a_damaged_checkpoint_is_passed_over_and_said(mesh_of, tmp_path, capsys, damage):
    program = lm(mesh_of(1))
    run = partial(fit, program, key=jax.random.key(0), checkpoints=epath.Path(tmp_path), checkpoint_every=4)
    whole = fit(program, start(program), steps=14, key=jax.random.key(0), iterator=Rows())
    run(start(program), steps=13, iterator=Rows())
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [8, 12]
    for file in sorted((tmp_path / "12").rglob("*")):
        if file.is_file() and "d" in file.parent.name and len(file.name) == 32:
            data = bytearray(file.read_bytes())
            if damage == "truncated":
                file.write_bytes(data[: len(data) // 2])
            elif damage == "deleted":
                file.unlink()
            else:
                for place in range(0, len(data), 97):
                    data[place] ^= 0xFF
                file.write_bytes(data)
    resumed = run(start(program), steps=14, iterator=Rows())
    assert "step 12 is unreadable" in capsys.readouterr().out
    assert_bits(whole, resumed)


def test_what_is_saved_after_unreadable_checkpoints_is_kept_in_their_place(tmp_path):
    """They have later steps, and would be the newest for good."""
    for step, shape in ((400, 3), (600, 3), (150, 2)):
        with closing(checkpoints.Checkpoints(tmp_path)) as kept:
            assert kept.restore({"x": jnp.zeros(2)}) is None
            kept.save(step, {"x": jnp.full(shape, step)}, None)
    with closing(checkpoints.Checkpoints(tmp_path)) as kept:
        found = kept.restore({"x": jnp.zeros(2)})
    assert found is not None and found[0]["x"].tolist() == [150, 150]
    assert [path.name for path in tmp_path.iterdir()] == ["150"]


def test_a_checkpoint_that_has_lost_its_data_position_is_passed_over(tmp_path, capsys):
    with closing(checkpoints.Checkpoints(tmp_path)) as kept:
        for step in (4, 8):
            kept.save(step, {"x": jnp.full(2, step)}, {"row": step})
    (tmp_path / "8" / "_CHECKPOINT_METADATA").unlink()
    with closing(checkpoints.Checkpoints(tmp_path)) as kept:
        found = kept.restore({"x": jnp.zeros(2)})
    assert found is not None and found[0]["x"].tolist() == [4, 4] and found[1] == {"row": 4}
    assert "step 8 is unreadable" in capsys.readouterr().out


def test_places_in_the_data_of_two_processes_are_not_taken_for_those_of_one(mesh_of, tmp_path, monkeypatch):
    program = lm(mesh_of(1))
    options = dict(key=jax.random.key(0), checkpoints=epath.Path(tmp_path), checkpoint_every=4)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "from_each", lambda value: [value] * 2)
        fit(program, start(program), steps=5, iterator=Rows(), **options)
    with pytest.raises(UserError, match=r"saved by 2 process\(es\).*now there are 1"):
        fit(program, start(program), steps=8, iterator=Rows(), **options)


def test_a_half_written_checkpoint_is_not_seen(mesh_of, tmp_path):
    program = lm(mesh_of(1))
    run = partial(fit, program, key=jax.random.key(0), checkpoints=epath.Path(tmp_path), checkpoint_every=4)
    whole = fit(program, start(program), steps=12, key=jax.random.key(0), iterator=Rows())
    run(start(program), steps=9, iterator=Rows())
    shutil.move(tmp_path / "8", tmp_path / "8.orbax-checkpoint-tmp")
    assert_bits(whole, run(start(program), steps=12, iterator=Rows()))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    """Before the checkpoints are open: a later thread would fail if the program ends first."""
    left = tmp_path / "run" / "4.orbax-checkpoint-tmp-17"
    left.mkdir(parents=True)
    with opened(epath.Path(tmp_path / "run")):
        assert not left.exists()


# ----------------------------------------------------------------------------------------- replicas


def replica_loss(params, frozen, batch, key):
    """Least squares; each replica has its own rows."""
    x, y = batch
    residual = x @ params["kernel"][:, 0] - y + 0.01 * jax.random.normal(key, y.shape)
    total, count = jnp.sum(residual**2), jnp.float32(len(y))
    return (total, count), {"twice": (2 * total, count)}


def replica_batch(frozen, key, index):
    def draw(key):
        x = jax.random.normal(jax.random.fold_in(key, index), (16, 3))
        return x, x @ jnp.array([1.0, -2.0, 0.5])

    return jax.vmap(draw)(key)


def replicas(mesh, optimizer=None):
    optimizer = optimizer or optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
    return Program(replica_loss, optimizer, mesh, replica_batch, replica_axes=1, steps_per_dispatch=5)


def stacked(numbers):
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(jnp.asarray(numbers))
    params = jax.vmap(lambda key: {"kernel": jax.random.normal(key, (3, 1))})(keys)
    return params, keys


@pytest.mark.parametrize("devices", [1, 8])
def test_replicas_equal_the_same_runs_alone(mesh_of, devices):
    """Clipping, Adam and random numbers are per replica."""
    program = replicas(mesh_of(devices))
    params, keys = stacked(range(8))
    logged = []
    together = fit(
        program, program.init(params), steps=20, key=keys, log=lambda step, values: logged.append(values)
    ).params
    assert logged[0]["loss"].shape == (5, 8)
    np.testing.assert_allclose(logged[0]["twice"], 2 * logged[0]["loss"], rtol=1e-6)
    alone = replicas(mesh_of(1))
    for number in (0, 5):
        params, keys = stacked([number])
        single = fit(alone, alone.init(params), steps=20, key=keys).params
        np.testing.assert_allclose(together["kernel"][number], single["kernel"][0], rtol=1e-5, atol=1e-6)


def test_replicas_of_a_transformer_on_all_three_axes_at_once(mesh_of):
    """Replicas, rows and widths split at once give the results of one device."""

    class Both(Rows):
        def __next__(self):
            return jax.tree.map(lambda *leaves: np.stack(leaves), *[super(Both, self).__next__() for _ in range(2)])

    params = jax.vmap(NETWORK.init)(jax.random.split(jax.random.key(0), 2))
    results = []
    for mesh in (mesh_of(1), mesh_of(8, replica=2, fsdp=2, tensor=2)):
        program = lm(mesh, replica_axes=1)
        keys = jax.random.split(jax.random.key(1), 2)
        results.append(fit(program, program.init(params), steps=10, key=keys, iterator=Both()).params)
    assert_close(*results)


def test_stochastic_gradient_descent_follows_the_closed_form(mesh_of):
    """One step of SGD on the mean of squares is w - 2 lr E[x (xᵀ w - y)]."""

    def loss(params, frozen, batch, key):
        residual = batch[0] @ params["kernel"] - batch[1]
        return (jnp.sum(residual**2), jnp.float32(residual.size)), {}

    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(8, 3)), rng.normal(size=8), rng.normal(size=3)
    frozen = jax.device_put((x.astype(np.float32), y.astype(np.float32)), named(mesh_of(1)))
    program = Program(loss, optax.sgd(0.1), mesh_of(1), lambda frozen, key, index: frozen)
    state = fit(
        program, program.init({"kernel": jnp.asarray(w, jnp.float32)}), steps=1, key=jax.random.key(0), frozen=frozen
    )
    expected = w - 0.1 * 2 * x.T @ (x @ w - y) / 8
    np.testing.assert_allclose(state.params["kernel"], expected, rtol=1e-5)


def test_an_iterator_that_ends_early_is_told(mesh_of):
    class Short(Rows):
        left = 3

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise StopIteration
            return super().__next__()

    program = lm(mesh_of(1))
    with pytest.raises(UserError, match=r"the iterator has ended at step \d of 9"):
        fit(program, start(program), steps=9, key=jax.random.key(0), iterator=Short())
