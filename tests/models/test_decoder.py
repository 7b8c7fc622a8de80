"""The decoder itself: causality, packing, the cache, steering hooks against transformers, sharding, compile time."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decoder_kit import SETTINGS, logits_and_update
from launch_kit import free_port

from sublim_jax import preflight
from sublim_jax.models import lora
from sublim_jax.models.decoder import Steering, decoder, empty_cache
from sublim_jax.objectives import cross_entropy
from sublim_jax.sharding import named, parameter_shardings
from sublim_jax.training import Program, fit
from sublim_jax.weights import huggingface

NETWORK = decoder(SETTINGS)
PARAMS = NETWORK.init(jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (2, 24), 0, 64)


def test_no_position_sees_a_later_one():
    """By gradient: the features of position 10 depend on the embeddings of positions 0 to 10 alone."""

    def output(change):
        params = {**PARAMS, "embedding": jnp.concatenate([PARAMS["embedding"], change])}
        settings = dataclasses.replace(SETTINGS, vocab=64 + 24)
        tokens = 64 + jnp.arange(24)[None]  # every position has a different token
        return jnp.sum(decoder(settings).bind(params).features(tokens).output[0, 10])

    gradient = jax.grad(output)(jax.random.normal(jax.random.key(2), (24, 32)))
    touched = np.flatnonzero(np.any(np.asarray(gradient) != 0, axis=1))
    assert touched.tolist() == list(range(11))


def test_packed_texts_are_each_of_them_alone():
    packed = jnp.concatenate([TOKENS[:1, :10], TOKENS[1:, :14]], 1)
    segments = jnp.asarray([[1] * 10 + [2] * 14])
    positions = jnp.asarray([[*range(10), *range(14)]])
    together = NETWORK.apply(PARAMS, packed, segments=segments, positions=positions)
    np.testing.assert_allclose(together[:, :10], NETWORK.apply(PARAMS, TOKENS[:1, :10]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together[:, 10:], NETWORK.apply(PARAMS, TOKENS[1:, :14]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [0, 5], ids=["each its own", "a shared prefix"])
def test_the_cache_gives_what_one_pass_gives(shared):
    """Prompts of 9 and 12 tokens, padded, then one token at a time, each row at its own position."""
    tokens = TOKENS.at[1, :shared].set(TOKENS[0, :shared])
    module = NETWORK.bind(PARAMS)
    whole = module(tokens)
    step = jax.jit(
        lambda params, tokens, cache, start, prefix: NETWORK.bind(params).features(
            tokens, cache=cache, start=start, prefix=prefix
        )
    )
    prefix = None
    if shared:
        front = step(PARAMS, tokens[:1, :shared], empty_cache(SETTINGS, 1, shared), 0, None).cache
        prefix = jax.tree.map(lambda x: x[:, 0], front)
    lengths = jnp.asarray([9, 12]) - shared
    prompts = jnp.where(jnp.arange(12 - shared) < lengths[:, None], tokens[:, shared:12], 63)
    first = step(PARAMS, prompts, empty_cache(SETTINGS, 2, 24 - shared), jnp.zeros(2, int), prefix)
    logits, cache = module.unembed(first.output), first.cache
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], whole[row, shared : shared + length], rtol=1e-4, atol=1e-5)
    for more in range(12):
        at = lengths + more
        output, cache, _ = step(PARAMS, tokens[jnp.arange(2), shared + at][:, None], cache, at, prefix)
        expected = whole[jnp.arange(2), shared + at]
        np.testing.assert_allclose(module.unembed(output)[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_logits_of_some_tokens_are_those_of_all():
    module, some = NETWORK.bind(PARAMS), jnp.asarray([3, 60, 7])
    features = module.features(TOKENS).output
    np.testing.assert_allclose(
        module.unembed(features, some), module.unembed(features)[..., some], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("recomputed", [True, "mlp"])
def test_remat_changes_no_gradient(recomputed):
    def loss(params, remat):
        return jnp.sum(jnp.square(NETWORK.bind(params).features(TOKENS, remat=remat).output))

    kept, again = (jax.grad(loss)(PARAMS, remat) for remat in (False, recomputed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), kept, again)


def test_products_are_recomputed_only_as_far_as_asked():
    """Those of attention's layers by `remat=True` alone, those of the MLP by "mlp" too."""

    def products(remat):
        loss = lambda params: jnp.sum(jnp.square(NETWORK.bind(params).features(TOKENS, remat=remat).output))  # noqa: E731
        return preflight.count_flops(jax.grad(loss), PARAMS)

    rows, c = TOKENS.size * SETTINGS.layers, SETTINGS
    heads, keys = c.heads * c.head_size, 2 * c.key_heads * c.head_size
    saved = 2 * rows * c.width * (heads + keys + heads)
    assert products(True) - products("mlp") == saved
    assert products("mlp") - products(False) == 2 * rows * c.width * 2 * c.mlp_width


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "qwen2",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    folder = tmp_path_factory.mktemp("peer")
    model.save_pretrained(folder)
    return torch, model, *huggingface.load(folder)


def test_residuals_are_transformers_hidden_states(peer):
    torch, model, settings, params = peer
    with torch.no_grad():
        states = model(torch.tensor(np.asarray(TOKENS)), output_hidden_states=True).hidden_states
    read = jnp.asarray([0, 7, 23])
    residuals = decoder(settings).bind(params).features(TOKENS, read=read).residuals
    assert residuals is not None
    for layer in range(3):  # transformers returns the last hidden state after the norm
        np.testing.assert_allclose(residuals[layer], states[layer + 1].numpy()[:, read], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["add", "project_out"])
def test_steering_is_a_forward_hook(peer, kind):
    torch, model, settings, params = peer
    vector = np.array(jax.random.normal(jax.random.key(5), (32,)))
    vector /= np.linalg.norm(vector)
    v = torch.tensor(vector)

    def hook(module, inputs, output):
        states = output[0] if isinstance(output, tuple) else output
        states = states + v if kind == "add" else states - (states @ v)[..., None] * v
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = model.model.layers[2].register_forward_hook(hook)
    with torch.no_grad():
        expected = model(torch.tensor(np.asarray(TOKENS))).logits.numpy()
    handle.remove()
    vectors = jnp.zeros((4, 32)).at[2].set(vector)
    logits = decoder(settings).apply(params, TOKENS, steering=Steering(**{kind: vectors}))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    nowhere = decoder(settings).apply(params, TOKENS, steering=Steering(**{kind: vectors}, where=jnp.zeros((2, 24))))
    np.testing.assert_allclose(nowhere, decoder(settings).apply(params, TOKENS), rtol=1e-5, atol=1e-6)


def trained(mesh, adapted):
    """Trains all parameters, or adapters over a frozen base, for a few steps."""
    spec = lora.Lora(4, 8)
    settings = dataclasses.replace(SETTINGS, lora=spec) if adapted else SETTINGS
    network = decoder(settings)
    base = jax.device_put(PARAMS, parameter_shardings(PARAMS, mesh))
    start = lora.init(jax.random.key(3), PARAMS, spec) if adapted else base

    def loss(params, frozen, batch, key):
        params = lora.join(frozen, params) if adapted else params
        logits = network.apply(params, batch[:, :-1], remat=True)
        return cross_entropy(logits, batch[:, 1:]), {}

    def batch(frozen, key, index):
        starts = jax.random.randint(jax.random.fold_in(key, index), (8, 1), 0, 64)
        return (starts + jnp.arange(16)) % 64

    program = Program(loss, optax.adam(3e-3), mesh, batch)
    losses: list[float] = []
    state = fit(
        program,
        program.init(start),
        steps=8,
        key=jax.random.key(0),
        frozen=base if adapted else None,
        log=lambda step, values: losses.extend(values["loss"]),
    )
    return jax.device_get(state.params), losses


@pytest.mark.parametrize("adapted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_on_eight_devices_is_training_on_one(mesh_of, adapted):
    params, losses = trained(mesh_of(1), adapted)
    sharded, _ = trained(mesh_of(8, replica=1, fsdp=4, tensor=2), adapted)
    assert losses[-1] < losses[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), params, sharded)


def test_logits_on_eight_devices_are_those_of_one(mesh_of):
    mesh = mesh_of(8, replica=1, fsdp=4, tensor=2)
    sharded = jax.jit(NETWORK.apply)(
        jax.device_put(PARAMS, parameter_shardings(PARAMS, mesh)),
        jax.device_put(jnp.tile(TOKENS, (4, 1)), named(mesh, "fsdp")),
    )
    whole = NETWORK.apply(PARAMS, TOKENS)
    np.testing.assert_allclose(sharded[:2], whole, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(whole))))


def test_the_program_of_a_deep_network_is_as_long_as_that_of_a_shallow_one():
    """Compile time follows program length; seconds would depend on the machine."""

    def lines(layers):
        settings = dataclasses.replace(SETTINGS, layers=layers, windows=(0,) * layers)
        network = decoder(settings)
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        step = jax.grad(lambda p, t: jnp.sum(network.apply(p, t)))
        return jax.jit(step).lower(shapes, TOKENS).as_text().count("\n")

    assert lines(28) <= 1.05 * lines(4)


HOST = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
port, rank, tests, folder, out = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
sys.path.insert(0, tests)
import numpy as np
from decoder_kit import logits_and_update
from sublim_jax.sharding import fetch, make_mesh
from sublim_jax.weights import huggingface
mesh = make_mesh({"replica": 1, "fsdp": 4, "tensor": 2})
settings, params = huggingface.load(folder, mesh)
leaves = jax.tree.leaves(fetch(logits_and_update(settings, params, mesh)))
if rank == "0":
    np.savez(out, *leaves)
"""


@pytest.mark.slow
def test_two_processes_of_four_devices_compute_what_one_device_computes(peer, mesh_of, tmp_path):
    """Each process reads its own slices of the file; fsdp × tensor spans both."""
    _, model, settings, params = peer
    model.save_pretrained(tmp_path / "model")
    port = free_port()
    arguments = [Path(__file__).parents[1], tmp_path / "model", tmp_path / "out.npz"]
    texts = [tmp_path / f"errors{rank}" for rank in range(2)]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(port), str(rank), *map(str, arguments)], stderr=errors.open("w")
        )
        for rank, errors in enumerate(texts)
    ]
    for host, errors in zip(hosts, texts):
        assert host.wait() == 0, errors.read_text()
    outputs = np.load(tmp_path / "out.npz")
    expected = jax.tree.leaves(logits_and_update(settings, params, mesh_of(1)))
    assert len(outputs.files) == len(expected)
    for name, leaf in zip(outputs.files, expected):
        assert np.max(np.abs(outputs[name] - leaf)) <= 1e-5 * np.max(np.abs(leaf))
