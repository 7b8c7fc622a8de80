"""Unstacked layers, as on GPUs, give the results of scanned layers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_kit import SETTINGS

from sublim_jax import preflight
from sublim_jax.models import lora
from sublim_jax.models.decoder import Steering, decoder, empty_cache, unstack
from sublim_jax.models.rope import Rotary
from sublim_jax.sampling import capacity, engine, generate
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.sharding import bytes_of

KEY = jax.random.key(2)
SPEC = lora.Lora(4, 8)
LLAMA = dataclasses.replace(SETTINGS, layers=2, windows=(0, 5))
FAMILIES = {
    "qwen2, with biases": dataclasses.replace(LLAMA, qkv_bias=True, tied=False),
    "qwen3, with norms of heads": dataclasses.replace(LLAMA, head_norm="head"),
    "gemma 3, with norms on both sides and two tables": dataclasses.replace(
        LLAMA,
        head_norm="head",
        norm_offset=1.0,
        post_norm=True,
        embed_scale=32**0.5,
        activation="gelu_pytorch_tanh",
        rotaries=(*LLAMA.rotaries, Rotary(tuple(1_000.0 ** -(np.arange(4) / 4)))),
        rotary_of=(0, 1),
    ),
}

ADAPTED = pytest.mark.parametrize(
    "adapted", [pytest.param(False, marks=pytest.mark.slow, id="as it is"), pytest.param(True, id="adapted")]
)


def perturbed(params):
    """Adds noise to every parameter, biases and norms too."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    return jax.tree.unflatten(
        structure, [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    )


@ADAPTED
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_one_by_one_give_what_the_scanned_ones_give(family, adapted):
    settings = dataclasses.replace(FAMILIES[family], lora=SPEC if adapted else None)
    stacked, apart = decoder(settings), decoder(settings, unstacked=True)
    params = perturbed(stacked.init(KEY))
    tokens = jax.random.randint(KEY, (3, 9), 0, 64)
    start, vectors = jnp.asarray([0, 2, 5]), jax.random.normal(KEY, (2, 32))

    def run(network, params, front, kv_cache):
        """A prefix, then tokens after it, with steering."""
        prefix = jax.tree.map(lambda x: x[:, 0], network.bind(params).features(tokens[:1], cache=front).cache)
        steering = Steering(add=vectors)
        return network.bind(params).features(
            tokens, cache=kv_cache, start=start, prefix=prefix, steering=steering, read=jnp.asarray([1, 4])
        )

    def caches(rows, settings=settings):
        return empty_cache(settings, rows, 9 if rows == 1 else 16)

    def layer_caches(rows):
        return tuple(caches(rows, dataclasses.replace(settings, layers=1)) for _ in range(settings.layers))

    expected = jax.jit(lambda params: run(stacked, params, caches(1), caches(3)))(params)
    output = jax.jit(lambda params: run(apart, params, layer_caches(1), layer_caches(3)))(unstack(params))
    cache = jax.tree.map(lambda *layers: jnp.concatenate(layers), *output.cache)
    for leaf, expected_leaf in zip(jax.tree.leaves(output._replace(cache=cache)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=1e-6 * np.abs(expected_leaf).max())


@ADAPTED
def test_samples_on_two_devices_are_those_of_the_scanned_layers(tiny, mesh_of, monkeypatch, adapted):
    mesh = mesh_of(2, replica=1, fsdp=1, tensor=2)
    prompts = [list(range(5, 5 + length)) for length in (3, 20, 7, 11)]
    model, adapters = tiny, None
    if adapted:
        model, keys = tiny.adapted(SPEC), jax.random.split(KEY, 2)
        adapters = jax.vmap(lambda key: perturbed(lora.init(key, tiny.params, SPEC)))(keys)
    run = partial(
        generate.generate, model, prompts, KEY, adapters=adapters, prefix=[3, 4, 5], max_new_tokens=8, slots=2
    )
    samples = [run(mesh=where) for where in (mesh_of(1), mesh)]
    monkeypatch.setattr(generate, "suited", lambda scanned: scanned)
    expected = run(mesh=mesh_of(1))
    for unstacked in samples:
        assert [(a.row, a.tokens, a.finish) for a in unstacked] == [(o.row, o.tokens, o.finish) for o in expected]
        for a, b in zip(unstacked, expected):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-5)


def test_each_layers_weights_lie_as_the_stack_lay(tiny, mesh_of):
    """Sharded over `tensor`, and replicated where rows are split."""
    mesh = mesh_of(4, replica=1, fsdp=2, tensor=2)
    placed = engine.place(engine.Fixed(tiny.params), mesh, unstacked=True).base
    rules = engine.row_weights(placed, mesh)
    jax.tree.map(lambda leaf, rule: np.testing.assert_(leaf.sharding.is_equivalent_to(rule, leaf.ndim)), placed, rules)
    assert placed["layers"][1]["mlp"]["down"]["kernel"].sharding.spec[1] == "tensor"
    stack = jax.tree.map(lambda *layers: jnp.concatenate(layers), *placed["layers"].values())
    jax.tree.map(np.testing.assert_array_equal, stack, tiny.params["layers"])


@pytest.mark.parametrize("split", [1, 2])
def test_layers_are_unstacked_where_there_is_room_for_them_twice(mesh_of, monkeypatch, split):
    """On a GPU the stack is kept as well; of a model that is sharded over rows, its shard is kept in any case."""
    mesh = mesh_of(2, replica=2 // split, fsdp=split)
    network = decoder(LLAMA)
    scanned = engine.Engine(network, LLAMA, mesh, Sampler(), slots=2, lanes=1, chunk=16, length=64, steps=4)
    shapes = jax.eval_shape(network.init, KEY)
    layers, whole = (4 * sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (shapes["layers"], shapes))
    apart = capacity.unstacked_engine(scanned)
    assert capacity.suited(scanned) == apart  # on a CPU, where the model counts as small
    monkeypatch.setattr(capacity, "SMALL", whole)
    assert capacity.suited(scanned) == scanned
    need = whole + capacity.beside(apart) + scanned.cache_bytes
    if split == 1:
        assert (capacity.beside(scanned), capacity.beside(apart)) == (0, layers)
    else:
        assert 0.45 * whole <= capacity.beside(scanned) <= capacity.beside(apart) <= 0.55 * whole
    assert [capacity.has_room(apart, memory) for memory in (None, int(need * 1.5), int(need * 1.4))] == [
        True,
        True,
        False,
    ]


def test_slots_of_nought_are_64_on_a_cpu_and_elsewhere_what_fits(tiny, mesh_of, monkeypatch):
    base = engine.Engine(tiny.network, tiny.settings, mesh_of(1), Sampler(), 1, lanes=1, chunk=16, length=64, steps=4)
    assert (capacity.fitted(base).slots, capacity.fitted(base).lanes) == (64, 8)
    run = partial(generate.generate, tiny, [[5, 6, 7], [8, 9]], KEY, max_new_tokens=6, samples=3)
    given, chosen, few = (run(slots=slots) for slots in (64, 0, 3))
    assert given == chosen
    assert [sample.tokens for sample in few] == [sample.tokens for sample in given]  # each sample has its own key
    need = bytes_of(capacity.weights(base)) + capacity.beside(base)
    for slots, adapters, expected in ((1000, 1, 256), (1000, 3, 128), (40, 1, 32), (1, 1, 8)):
        wide = dataclasses.replace(base, adapters=adapters)
        memory = int((need + slots * wide.cache_bytes) / capacity.ROOM) + 1
        assert capacity.chosen_slots(wide, memory) == expected


def test_a_decode_step_one_by_one_is_as_many_flops_and_counts_the_stack_beside_it(mesh_of):
    made = engine.Engine(decoder(LLAMA), LLAMA, mesh_of(1), Sampler(), 2, lanes=1, chunk=16, length=64, steps=4)
    scanned, apart = (preflight.decode_step("decoding", variant) for variant in (made, capacity.unstacked_engine(made)))
    assert apart.flops == scanned.flops > 0
    facts, scanned_facts = preflight.facts(apart), preflight.facts(scanned)
    held = scanned_facts.peak - scanned_facts.temporaries + apart.beside
    assert facts.peak - facts.temporaries == pytest.approx(held, rel=0.02)  # up to the tables for more arrays
