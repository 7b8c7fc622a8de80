"""Preflight on programs whose counts are known."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoder_kit import SETTINGS
from launch_kit import assert_refused, run_here

from sublim_jax import preflight
from sublim_jax.errors import UserError
from sublim_jax.models.decoder import decoder
from sublim_jax.objectives import cross_entropy
from sublim_jax.sharding import parameter_shardings
from sublim_jax.training import Program, fit


def chain(x, weights):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]


def test_a_scanned_product_counts_as_often_as_it_runs():
    x, weights = jnp.ones((6, 8)), jnp.ones((5, 8, 8))
    assert preflight.count_flops(chain, x, weights) == 5 * 2 * 6 * 8 * 8


def test_recomputation_counts():
    """Forward 1, backward 2 (inputs and weights), and once more under remat."""
    x, weights = jnp.ones((6, 8)), jnp.ones((5, 8, 8))

    def loss(remat):
        body = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        body = jax.checkpoint(body) if remat else body
        return lambda x, weights: jnp.sum(jax.lax.scan(body, x, weights)[0])

    forward = 5 * 2 * 6 * 8 * 8
    counts = [preflight.count_flops(jax.grad(loss(remat), argnums=(0, 1)), x, weights) for remat in (False, True)]
    assert counts == [3 * forward, 4 * forward]


def test_of_a_choice_the_largest_branch_counts():
    x, w = jnp.ones((6, 8)), jnp.ones((8, 8))
    choice = lambda i, x, w: jax.lax.switch(i, [lambda x, w: x, lambda x, w: x @ w, lambda x, w: x @ w @ w], x, w)  # noqa: E731
    assert preflight.count_flops(choice, 0, x, w) == 2 * 2 * 6 * 8 * 8


def step_of(mesh, layers):
    network = decoder(dataclasses.replace(SETTINGS, layers=layers, windows=(0,) * layers))

    def loss(params, frozen, batch, key):
        return cross_entropy(network.apply(params, batch[:, :-1], remat=True), batch[:, 1:]), {}

    def batch(frozen, key, index):
        return jax.random.randint(jax.random.fold_in(key, index), (8, 17), 0, 64)

    program = Program(loss, optax.adam(1e-3), mesh, batch)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        parameter_shardings(shapes, mesh),
    )
    return network, program, shapes


def test_twice_the_layers_are_twice_the_flops_beside_the_vocabulary(mesh_of):
    def count(layers):
        _, program, shapes = step_of(mesh_of(1), layers)
        gradient = jax.grad(lambda p, b: program.loss(p, None, b, None)[0][0])
        return preflight.count_flops(gradient, shapes, jax.ShapeDtypeStruct((8, 17), jnp.int32))

    two, four, eight = map(count, (2, 4, 8))
    assert eight - four == 2 * (four - two)
    vocabulary = 3 * 2 * 8 * 16 * SETTINGS.width * SETTINGS.vocab
    assert two - vocabulary == pytest.approx(four - two)


def test_a_program_is_lowered_from_shapes_and_is_the_one_that_trains(mesh_of):
    mesh = mesh_of(8, replica=1, fsdp=4, tensor=2)
    network, program, shapes = step_of(mesh, 2)
    step = preflight.training_step("step", program, shapes, None, 1.0)
    facts = preflight.facts(step)
    state = program.init(network.init(jax.random.key(0)))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert held <= facts.arguments <= held + 1000
    assert step.weights + step.optimizer == pytest.approx(held, abs=1000)
    assert step.optimizer == pytest.approx(2 * step.weights, abs=1000)  # Adam's two moments
    assert facts.fits is None  # a CPU's memory is not known
    assert facts.temporaries > 0 and facts.collectives
    state = fit(program, state, steps=1, key=jax.random.key(0))
    assert np.isfinite(jax.device_get(state.params["embedding"])).all()


def test_of_a_program_that_xla_cannot_write_memory_and_flops_are_told(monkeypatch):
    def as_text(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    step = preflight.Step("step", jax.jit(lambda: 0).lower(), jax.devices()[0], 1, 3e12, 2e12, weights=0)
    facts = preflight.facts(step)
    assert facts.collectives is None and facts.moved is None and preflight.roofline(step, facts) is None
    assert "what it moves is not known" in preflight.describe(step, facts)


def test_what_does_not_fit_is_said():
    facts = preflight.Facts(20 << 30, 0, 1 << 30, {"all-gather": (3, 1 << 30)}, 5 << 30, 16 << 30)
    step = preflight.Step(
        "step", jax.jit(lambda: 0).lower(), jax.devices()[0], 1, 3e12, 2e12, weights=6 << 30, optimizer=12 << 30
    )
    text = preflight.describe(step, facts)
    assert "MFU" not in text  # a CPU's rates are not known
    assert "DOES NOT FIT" in text and "21.00 GiB of 16" in text and "all-gather: 3 a step, 1.000 GiB" in text
    assert "weights 6.00, optimiser 12.00, other arguments 2.00" in text and "1.50 × the model's own" in text


def test_a_roofline_is_of_the_slowest_thing_and_of_all_of_them():
    chip: Any = SimpleNamespace(device_kind="TPU v5 lite")  # 197 TFLOP/s, 819 GB/s, 200 GB/s
    step = preflight.Step("step", jax.jit(lambda: 0).lower(), chip, 4, 4 * 197e12, 2 * 197e12, 0)
    facts = preflight.Facts(0, 0, 0, {"all-reduce": (1, 300_000_000_000)}, 819_000_000_000 * 2, None)
    roof = preflight.roofline(step, facts)
    assert roof is not None and roof == pytest.approx((1.0, 2.0, 1.5, 0.5))
    assert roof.utilization == pytest.approx(0.25) and roof.utilization_without_overlap == pytest.approx(1 / 9)
    assert "products 1 s, memory 2 s, links 1.5 s" in preflight.describe(step, facts)


@pytest.mark.parametrize("name", ["v9:1x1", "h100", "h100:8"])
def test_without_a_compiler_for_a_topology_it_is_told_in_one_line(name):
    with pytest.raises(UserError, match=rf"--preflight={name}: .*make .compilers/installed") as error:
        preflight.topology(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a100", "h100:x", "v5e-16", "v5e:16", ""])
def test_what_is_no_topology_is_told_what_is(name):
    with pytest.raises(UserError, match=f"--preflight={name}: name local .*, h100, h100:8, or .* v5e:4x4"):
        preflight.topology(name)


def test_flops_beyond_the_largest_integer_are_counted():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2**34, 2**20), (2**20, 2**17)))
    assert preflight.count_flops(jnp.matmul, x, w) == 2.0**72


def test_a_corpus_teachers_step_is_compiled_beside_its_students_and_no_file_is_read(tiny_folder):
    result = run_here(
        "--config=configs/misalignment.py",
        f"--config.model.name={tiny_folder}",
        "--config.teacher.corpora.insecure=nowhere.jsonl",
        "--preflight=local",
    )
    assert result.returncode == 0, result.stderr
    assert "students tokens_fresh, 4 at once, rows of 192 tokens" in result.stderr + result.stdout
    assert "a teacher, 4 conversations of 1024 tokens" in result.stderr + result.stdout


def test_arms_that_train_nothing_have_no_step():
    command = ["--config=configs/numbers.py", "--config.arms=in_context,in_context_4", "--preflight=local"]
    assert_refused(run_here(*command), "train nothing")
