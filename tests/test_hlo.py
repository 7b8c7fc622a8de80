"""Bytes that compiled programs move: the compiler's count without loops, multiplied by trip counts with loops."""

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

    one_layer = moved(lambda w, x: jnp.tanh(x @ w), (64, 64), (8, 64))
    three, nine, fifteen = (moved(layers, (count, 64, 64), (8, 64)) for count in (3, 9, 15))
    assert fifteen - nine == nine - three
    # A slice of the weights may be copied as well.
    assert 6 * one_layer <= nine - three <= 6 * (one_layer + 3 * 4 * 64 * 64)


def test_of_a_conditional_the_largest_branch_counts():
    """Whichever place it has among the branches."""
    small, large = (lambda x: x + 1), (lambda x: jnp.tanh(x @ x) @ x)

    def chosen(*branches):
        return moved(lambda which, x: jax.lax.switch(which[0].astype(jnp.int32), branches, x), (1,), (64, 64))

    first, last = chosen(large, small, small), chosen(small, small, large)
    assert first == pytest.approx(last, rel=0.05) and last > 1.5 * chosen(small, small, small)


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


# An asynchronous gather in libtpu's form, beside two products: its pieces share a channel.
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
    collectives = hlo.collectives(hlo.parse(PIECES))
    assert collectives == {"all-gather": (1, 4 * 32 * 2), "all-reduce": (1, 40)}


def test_what_lies_in_a_chips_own_memory_moves_nothing():
    assert hlo.sizes("(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, f32[10]{0})") == [40]
    assert hlo.sizes("bf16[4,8]{1,0:T(8,128)(2,1)S(1)}", everywhere=True) == [64]


# On TPUs, a fusion slices its layer from the stack and multiplies; on GPUs, a cache is updated in place.
NESTED = """HloModule nested

%layer (p.0: bf16[28,64,32], p.1: s32[]) -> bf16[64,32] {
  %p.0 = bf16[28,64,32]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice.1 = bf16[1,64,32]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %bitcast.1 = bf16[64,32]{1,0} bitcast(%slice.1)
}

%name (p.8: bf16[8,64]) -> bf16[8,64] {
  %p.8 = bf16[8,64]{1,0} parameter(0)
  ROOT %bitcast.2 = bf16[8,64]{1,0} bitcast(%p.8)
}

%product (p.2: bf16[8,64], p.3: bf16[28,64,32], p.4: s32[]) -> bf16[8,32] {
  %p.2 = bf16[8,64]{1,0} parameter(0)
  %p.3 = bf16[28,64,32]{2,1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  %fusion.1 = bf16[64,32]{1,0} fusion(%p.3, %p.4), kind=kLoop, calls=%layer
  %fusion.4 = bf16[8,64]{1,0} fusion(%p.2), kind=kLoop, calls=%name
  ROOT %dot.1 = bf16[8,32]{1,0} convolution(%fusion.4, %fusion.1), dim_labels=bf_io->bf
}

%write (p.5: bf16[28,8,32], p.6: s32[8,2], p.7: bf16[8,32]) -> bf16[28,8,32] {
  %p.5 = bf16[28,8,32]{2,1,0} parameter(0)
  %p.6 = s32[8,2]{1,0} parameter(1)
  %p.7 = bf16[8,32]{1,0} parameter(2)
  ROOT %scatter.1 = bf16[28,8,32]{2,1,0} scatter(%p.5, %p.6, %p.7), update_window_dims={1}, to_apply=%last
}

ENTRY %main (x: bf16[8,64], w: bf16[28,64,32], i: s32[], c: bf16[28,8,32], at: s32[8,2]) -> bf16[28,8,32] {
  %x = bf16[8,64]{1,0} parameter(0)
  %w = bf16[28,64,32]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = bf16[28,8,32]{2,1,0} parameter(3)
  %at = s32[8,2]{1,0} parameter(4)
  %fusion.2 = bf16[8,32]{1,0} fusion(%x, %w, %i), kind=kOutput, calls=%product
  ROOT %fusion.3 = bf16[28,8,32]{2,1,0} fusion(%c, %at, %fusion.2), kind=kInput, calls=%write
}
"""


def test_a_layer_of_a_stack_and_what_is_written_in_place_count_alone():
    product = 2 * (8 * 64 + 64 * 32 + 8 * 32) + 4  # and the layer's number
    written = 2 * (8 * 32 + 8 * 32) + 4 * 8 * 2
    assert hlo.memory_bytes(hlo.parse(NESTED)) == product + written
