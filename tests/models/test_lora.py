"""Adapters against PEFT and against merged weights, and many adapters over one base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoder_kit import SETTINGS

from sublim_jax.models import lora
from sublim_jax.models.decoder import decoder
from sublim_jax.models.lora import Lora
from sublim_jax.weights import huggingface, peft

SPEC = Lora(rank=4, alpha=8)
TOKENS = jnp.arange(24).reshape(2, 12)


def adapted(key=0, spec=SPEC):
    """(base, adapters with B ≠ 0, network with adapters)."""
    base = decoder(SETTINGS).init(jax.random.key(0))
    adapters = lora.init(jax.random.key(key), base, spec)
    noisy = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), adapters)
    return base, noisy, decoder(dataclasses.replace(SETTINGS, lora=spec))


@pytest.mark.parametrize("spec", [SPEC, Lora(2, 3, rslora=True), Lora(4, 8, modules=("query", "down"))])
def test_an_adapter_is_its_merged_weights(spec):
    base, adapters, network = adapted(spec=spec)
    logits = network.apply(lora.join(base, adapters), TOKENS)
    merged = decoder(SETTINGS).apply(lora.merge(base, adapters, spec.scale), TOKENS)
    np.testing.assert_allclose(logits, merged, rtol=1e-4, atol=1e-5)
    assert not np.allclose(logits, decoder(SETTINGS).apply(base, TOKENS), atol=1e-2)


def test_fresh_adapters_change_nothing_and_split_undoes_join():
    base, _, network = adapted()
    fresh = lora.init(jax.random.key(3), base, SPEC)
    np.testing.assert_array_equal(network.apply(lora.join(base, fresh), TOKENS), decoder(SETTINGS).apply(base, TOKENS))
    again, parts = lora.split(lora.join(base, fresh))
    jax.tree.map(np.testing.assert_array_equal, (again, parts), (base, fresh))
    structure: object = jax.tree.structure(jax.eval_shape(network.init, jax.random.key(0)))
    assert structure == jax.tree.structure(lora.join(base, fresh))


def test_gradients_are_those_of_the_merged_weights_and_forward_mode_may_be_had():
    """For the product with a custom backward pass, and for the plain one, which supports jvp."""
    base, adapters, network = adapted()
    plain = decoder(dataclasses.replace(SETTINGS, lora=dataclasses.replace(SPEC, forward_mode=True)))

    def loss(network):
        return lambda a: jnp.sum(jnp.sin(network.apply(lora.join(base, a), TOKENS)))

    def merged(a):
        return jnp.sum(jnp.sin(decoder(SETTINGS).apply(lora.merge(base, a, SPEC.scale), TOKENS)))

    expected = jax.grad(merged)(adapters)
    for function in (loss(network), loss(plain)):
        gradient = jax.grad(function)(adapters)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradient, expected)
    _, slope = jax.jvp(loss(plain), (adapters,), (expected,))
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(expected))
    np.testing.assert_allclose(slope, squares, rtol=1e-3)


def test_many_adapters_over_one_base_are_each_of_them_alone():
    base, _, network = adapted()
    trees = [adapted(key)[1] for key in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    together = jax.vmap(lambda a: network.apply(lora.join(base, a), TOKENS))(stacked)
    for logits, alone in zip(together, trees):
        np.testing.assert_allclose(logits, network.apply(lora.join(base, alone), TOKENS), rtol=1e-5, atol=1e-5)


def test_adapters_in_bfloat16_are_multiplied_in_the_bases_type():
    base, adapters, network = adapted()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapters)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    expected = network.apply(lora.join(base, wide), TOKENS)
    np.testing.assert_allclose(network.apply(lora.join(base, half), TOKENS), expected, rtol=1e-6, atol=1e-6)
    merged = decoder(SETTINGS).apply(lora.merge(base, half, SPEC.scale), TOKENS)
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)


def test_a_merged_kernel_in_bfloat16_is_rounded_once():
    base, adapters, _ = adapted()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    merged = lora.merge(half, adapters, SPEC.scale)["layers"]["mlp"]["up"]["kernel"]
    pair = jax.tree.map(np.float64, adapters["layers"]["mlp"]["up"])
    exact = np.float64(half["layers"]["mlp"]["up"]["kernel"]) + SPEC.scale * pair["a"] @ pair["b"]
    assert merged.dtype == jnp.bfloat16
    assert np.mean(np.asarray(merged) == exact.astype(jnp.bfloat16)) > 0.999


def test_the_base_may_be_bfloat16_under_float32_adapters():
    base, adapters, network = adapted()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    gradient = jax.grad(lambda a: jnp.sum(network.apply(lora.join(half, a), TOKENS).astype(jnp.float32)))(adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient))


def test_layers_that_were_not_chosen_stay_as_they_are():
    """After a few steps of Adam with weight decay."""
    base, _, network = adapted()
    adapters = lora.init(jax.random.key(0), base, dataclasses.replace(SPEC, layers=(1, 3)))
    optimizer = optax.adamw(1e-2)
    state = optimizer.init(adapters)
    loss = lambda a: jnp.sum(jnp.sin(network.apply(lora.join(base, a), TOKENS)))  # noqa: E731
    for _ in range(3):
        updates, state = optimizer.update(jax.grad(loss)(adapters), state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    for leaf in jax.tree.leaves(adapters):
        assert [bool(jnp.any(leaf[layer] != 0)) for layer in range(4)] == [False, True, False, True]


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")

    def make(kind, **changes):
        config = transformers.AutoConfig.for_model(
            kind,
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            **changes,
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        return model, config, folder

    return make


SPECS = [Lora(4, 8), Lora(4, 8, rslora=True, modules=("query", "value", "up")), Lora(4, 8, layers=(2,))]


@pytest.mark.parametrize("spec", SPECS)
def test_peft_loads_our_adapters_and_we_load_them_back(peer, tmp_path, spec):
    import torch
    from peft import PeftModel

    model, config, folder = peer("qwen2")
    settings, base = huggingface.load(folder)
    adapters = lora.init(jax.random.key(0), base, spec)
    for layer in spec.layers or range(3):
        move = lambda leaf, i=layer: leaf.at[i].add(0.1 * jax.random.normal(jax.random.key(i), leaf.shape[1:]))  # noqa: E731
        adapters = jax.tree.map(move, adapters)
    peft.save(tmp_path, adapters, spec, settings, config)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, tmp_path)(torch.tensor(np.asarray(TOKENS))).logits.numpy()
    network = decoder(dataclasses.replace(settings, lora=spec))
    logits = network.apply(lora.join(base, adapters), TOKENS)
    assert np.max(np.abs(logits - expected)) <= 1e-4 * np.max(np.abs(expected))
    again, loaded = peft.load(tmp_path, settings, config)
    assert (again.rank, again.scale, set(again.modules)) == (spec.rank, spec.scale, set(spec.modules))
    assert again.layers == spec.layers
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
