"""Each attention implementation against the plain one, which the families' tests compare with transformers."""

import itertools
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sublim_jax.errors import UserError
from sublim_jax.models import attention
from sublim_jax.models.attention import AttentionMask, Scoring
from sublim_jax.models.decoder import on_mesh
from sublim_jax.models.settings import Settings

ROWS, LENGTH, HEADS, GROUPS, SIZE = 4, 256, 4, 2, 64


def mask_of(window, segments):
    back = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)
    allowed = jnp.broadcast_to((back >= 0) & ((back < window) | (window == 0)), (ROWS, LENGTH, LENGTH))
    if segments is not None:
        allowed = allowed & (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
    return AttentionMask(allowed, jnp.asarray(window), segments)


def packed():
    """Segments: two texts and padding, and a row with one token and padding."""
    row = jnp.asarray([1] * 100 + [2] * 90 + [0] * 66)
    return jnp.stack([row, row[::-1], jnp.ones_like(row), jnp.zeros_like(row).at[0].set(1)])


def tensors(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(ROWS, LENGTH, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def value_and_gradient(attend, mask, scoring, qkv, kept):
    """Value and gradient over text positions; padding is ignored."""

    def total(qkv):
        mixed = jnp.where(kept[..., None, None], attend(*qkv, mask, scoring).astype(jnp.float32), 0)
        return jnp.sum(jnp.sin(mixed)), mixed

    return jax.jit(jax.value_and_grad(total, has_aux=True))(qkv)


@pytest.mark.parametrize("split", [False, True], ids=["one device", "rows and heads split"])
@pytest.mark.parametrize("window, cap, texts", [(0, 0.0, False), (0, 0.0, True), (50, 0.0, True), (50, 3.0, False)])
def test_the_flash_kernel_gives_what_plain_attention_gives(window, cap, texts, split, mesh_of):
    mesh = mesh_of(8, replica=1, fsdp=4, tensor=2) if split else mesh_of(1)
    segments = packed() if texts else None
    kept = jnp.ones((ROWS, LENGTH), bool) if segments is None else segments != 0
    scoring, mask = Scoring(0.2, cap, (0, window) if window else ()), mask_of(window, segments)
    flash = attention.flash(mesh, interpret=True, shortest=LENGTH)
    (_, output), gradient = value_and_gradient(flash, mask, scoring, tensors(), kept)
    (_, plain), expected = value_and_gradient(attention.xla, mask, scoring, tensors(), kept)
    np.testing.assert_allclose(output, plain, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient, expected)


@pytest.mark.parametrize("dtype, exact", [(jnp.float32, 1e-4), (jnp.bfloat16, 3e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window, cap, texts", [(0, 0.0, False), (0, 0.0, True), (50, 0.0, True), (50, 3.0, False)])
def test_attention_for_cpus_gives_what_plain_attention_gives(window, cap, texts, dtype, exact):
    segments = packed() if texts else None
    scoring, mask = Scoring(0.2, cap, (0, window) if window else ()), mask_of(window, segments)
    everywhere = jnp.ones((ROWS, LENGTH), bool)  # padding too, whose queries see no key
    (_, output), gradient = value_and_gradient(attention.cpu, mask, scoring, tensors(dtype), everywhere)
    (_, plain), expected = value_and_gradient(attention.xla, mask, scoring, tensors(dtype), everywhere)
    np.testing.assert_allclose(output, plain, rtol=exact, atol=exact)
    for ours, theirs in zip(gradient, expected):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=10 * exact, atol=exact * np.abs(theirs).max())


def test_plain_attention_is_the_sum_over_keys_written_out():
    q, k, v = (np.asarray(x[:1, :12]) for x in tensors())
    allowed = np.tril(np.ones((12, 12), bool))[None]
    mask = AttentionMask(jnp.asarray(allowed), jnp.asarray(0), None)
    output = attention.xla(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), mask, Scoring(0.2, 0.0, ()))
    for t, head in itertools.product(range(12), range(HEADS)):
        group = head // (HEADS // GROUPS)
        scores = np.exp([0.2 * q[0, t, head] @ k[0, s, group] for s in range(t + 1)])
        mixed = sum(score * v[0, s, group] for s, score in enumerate(scores)) / scores.sum()
        np.testing.assert_allclose(output[0, t, head], mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case, reason",
    [
        ({"dtype": jnp.float32}, "numbers are float32"),
        ({"cap": 3.0}, "scores are capped"),
        ({"odd": 1}, "not both even"),
    ],
)
def test_what_cudnn_cannot_do_is_done_plainly_and_said(case, reason):
    q, k, v = (x[:, : LENGTH - case.get("odd", 0)] for x in tensors(case.get("dtype", jnp.bfloat16)))
    mask, scoring = mask_of(0, None), Scoring(0.2, case.get("cap", 0.0), ())
    mask = mask._replace(allowed=mask.allowed[:, : q.shape[1], : k.shape[1]])
    with pytest.warns(UserWarning, match=reason):
        output = attention.cudnn(q, k, v, mask, scoring)
    np.testing.assert_array_equal(output, attention.xla(q, k, v, mask, scoring))


@pytest.mark.parametrize("capabilities, widest", [(["8.0"], 128), (["9.0", "10.3"], 256), (["9.0", "8.9"], 128)])
def test_wide_heads_are_fused_where_every_card_can(capabilities, widest, monkeypatch):
    cards = [SimpleNamespace(compute_capability=capability) for capability in capabilities]
    monkeypatch.setattr(jax, "devices", lambda *_: cards)
    assert attention._widest_heads() == widest


@pytest.mark.gpu
@pytest.mark.parametrize("window, texts", [(0, False), (0, True), (50, True)])
def test_cudnn_gives_what_plain_attention_gives(window, texts):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    segments = packed() if texts else None
    kept = jnp.ones((ROWS, LENGTH), bool) if segments is None else segments != 0
    mask, scoring = mask_of(window, segments), Scoring(0.2, 0.0, ())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "attention without cuDNN")  # fail where it falls back to plain attention
        (_, output), gradient = value_and_gradient(attention.cudnn, mask, scoring, tensors(jnp.bfloat16), kept)
    (_, plain), expected = value_and_gradient(attention.xla, mask, scoring, tensors(jnp.bfloat16), kept)
    np.testing.assert_allclose(output, plain, rtol=0.05, atol=0.02)
    as_float = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)  # noqa: E731
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.1, atol=0.05), as_float(gradient), as_float(expected)
    )


def test_heads_that_the_mesh_does_not_divide_are_refused(mesh_of):
    settings = Settings(64, 48, 2, 9, 3, 16, 32, "silu")
    assert on_mesh(settings, mesh_of(8, replica=1, fsdp=8))
    with pytest.raises(UserError, match=r"tensor=2 of the mesh does not divide the model's 3 heads of keys \(9 of"):
        on_mesh(settings, mesh_of(8, replica=1, fsdp=4, tensor=2))
