"""Tests that need a GPU: `JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu`.

Products in float32, not TensorFloat32, agree with the CPU up to rounding, which a few steps of Adam amplify.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mnist_kit import distilled, some, tiny
from transformers import PreTrainedConfig

from sublim_jax import objectives, weights
from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.models import lora
from sublim_jax.models.decoder import decoder, on_mesh
from sublim_jax.models.language import Model
from sublim_jax.sampling.generate import generate
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.sharding import make_mesh
from sublim_jax.store import Store
from sublim_jax.training import Program, fit

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_both():
    """Calls a function of a mesh on the GPU and on the CPU; returns both results."""
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")

    def compute(function):
        results = []
        for platform in ("gpu", "cpu"):
            device = jax.devices(platform)[0]
            mesh = make_mesh({"replica": 1, "fsdp": 1, "tensor": 1}, [device])
            with jax.default_matmul_precision("float32"), jax.default_device(device):
                results.append(jax.device_get(function(mesh)))
        return results

    return compute


def test_students_on_a_gpu_are_those_of_the_cpu(on_both, mnist_data, tmp_path):
    data = some(mnist_data)

    def students(mesh):
        store = Store(tmp_path / mesh.devices.flat[0].platform)
        return distilled(tiny(), data, store, mesh, ("auxiliary", "all")).students

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *on_both(students))


def small():
    """SmolLM2's shape with two layers, and weights that are the same on every platform."""
    settings = weights.shape_of("smollm2-135m-instruct")
    settings = dataclasses.replace(settings, layers=2, windows=(), rotary_of=(0, 0), vocab=1024)
    return settings, jax.device_get(decoder(settings).init(jax.random.key(0)))


def test_lora_steps_on_a_gpu_are_those_of_the_cpu(on_both):
    settings, base = small()
    spec = lora.Lora(4, 8)
    network = decoder(dataclasses.replace(settings, lora=spec))
    start = jax.device_get(lora.init(jax.random.key(1), base, spec))

    def trained(mesh):
        where = on_mesh(settings, mesh)

        def loss(params, frozen, batch, key):
            module = network.bind(lora.join(frozen, params))
            output = module.features(batch[:, :-1], remat=True, **where).output
            return objectives.cross_entropy(module.unembed(output), batch[:, 1:]), {}

        def batch(frozen, key, index):
            return jax.random.randint(jax.random.fold_in(key, index), (4, 65), 0, settings.vocab)

        program = Program(loss, optax.adam(1e-3), mesh, batch)
        frozen = jax.device_put(base, mesh.devices.flat[0])
        return fit(program, program.init(start), steps=4, key=jax.random.key(2), frozen=frozen).params

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), *on_both(trained))


def test_decoding_on_a_gpu_gives_the_log_probabilities_of_the_cpu(on_both):
    """After prompts of several lengths, at temperatures 0 and 1."""
    settings, base = small()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, settings.vocab, size).tolist() for size in (5, 17, 40)]

    def sampled(mesh):
        tokenizer = cast(Tokenizer, SimpleNamespace(decode=lambda tokens, **options: ""))
        config, params = PreTrainedConfig(), jax.tree.map(jnp.asarray, base)
        model = Model(settings, decoder(settings), params, tokenizer, config, mesh)
        options: dict[str, Any] = {"max_new_tokens": 12, "stop_tokens": (), "slots": 8, "mesh": mesh}
        batches = [generate(model, prompts, jax.random.key(0), sampler=Sampler(t), **options) for t in (0.0, 1.0)]
        return [(sample.tokens, sample.logprobs) for samples in batches for sample in samples]

    for (tokens, logprobs), (expected, wanted) in zip(*on_both(sampled)):
        assert tokens == expected
        np.testing.assert_allclose(logprobs, wanted, atol=1e-3)
