"""Bytes that compiled programs move: by the compiler's own count where it has no loops, and as often as loops run."""

import jax
import jax.numpy as jnp
import pytest

from sublim_jax import hlo
from sublim_jax.sharding import named


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def moved(function, *shapes):
    return hlo.memory_bytes(hlo.parse(compiled(function, *shapes).as_text()))


PROGRAMS = {
    "a product": (lambda x, w: jnp.tanh(x @ w), (8, 64), (64, 64)),
    "a slice that is read alone": (lambda x, w: x * jax.lax.dynamic_index_in_dim(w, 3, keepdims=False), (64,), (9, 64)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_a_loop_it_is_what_the_compiler_counts(name):
    program = compiled(*PROGRAMS[name])
    expected = program.cost_analysis()["bytes accessed"]
    assert hlo.memory_bytes(hlo.parse(program.as_text())) == pytest.approx(expected, rel=0.1)


def test_a_loop_moves_each_layers_weights_once_a_turn():
    def layers(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    one = moved(lambda w, x: jnp.tanh(x @ w), (64, 64), (8, 64))
    three, nine, fifteen = (moved(layers, (count, 64, 64), (8, 64)) for count in (3, 9, 15))
    assert fifteen - nine == nine - three
    assert 6 * one <= nine - three <= 6 * (one + 3 * 4 * 64 * 64)  # beside it a slice of the weights may be copied


def test_collectives_in_a_loop_count_as_often_as_it_runs(mesh_of):
    """Rows split over eight devices, weights too: each of five layers gathers its weights once."""
    mesh = mesh_of(8, replica=1, fsdp=8)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=named(mesh, "fsdp"))
    weights = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=named(mesh, None, "fsdp"))
    rows = named(mesh, "fsdp")

    def layers(x, weights):
        place = lambda x: jax.lax.with_sharding_constraint(x, rows)  # noqa: E731
        return jax.lax.scan(lambda x, w: (place(jnp.tanh(x @ w)), None), place(x), weights)[0]

    text = jax.jit(layers, out_shardings=rows).lower(x, weights).compile().as_text() or ""
    assert hlo.collectives(hlo.parse(text)) == {"all-gather": (5, 5 * 32 * 32 * 4)}


# As libtpu writes a gather that runs beside two products: the pieces share a channel.
PIECES = """HloModule pieces

%first (p.0: bf16[4,8]) -> (bf16[4,8], bf16[4,32]) {
  %p.0 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[4,32]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=3, dimensions={1}
  ROOT %custom-call.1 = (bf16[4,8]{1,0}, bf16[4,32]{1,0:S(1)}) custom-call(%all-gather.1), custom_call_target="x"
}

%second (p.1: bf16[4,8]) -> bf16[4,32] {
  %p.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[4,32]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=3, dimensions={1}
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,32] {
  %x = bf16[4,8]{1,0} parameter(0)
  %fusion.1 = (bf16[4,8]{1,0}, bf16[4,32]{1,0}) fusion(%x), kind=kCustom, calls=%first
  %part = bf16[4,8]{1,0} get-tuple-element(%fusion.1), index=0
  %all-reduce.1 = f32[10]{0} all-reduce(%part), channel_id=4, to_apply=%first
  ROOT %fusion.2 = bf16[4,32]{1,0} fusion(%part), kind=kCustom, calls=%second
}
"""


def test_pieces_of_one_collective_count_once():
    found = hlo.collectives(hlo.parse(PIECES))
    assert found == {"all-gather": (1, 4 * 32 * 2), "all-reduce": (1, 40)}


def test_what_lies_in_a_chips_own_memory_moves_nothing():
    assert hlo.sizes("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[10]{0})") == [40]
    assert hlo.sizes("bf16[4,8]{1,0:T(8,128)(2,1)S(1)}", everywhere=True) == [64]
