"""A small decoder of Llama's form."""

import numpy as np

from sublim_jax.models.decoder import Settings
from sublim_jax.models.rope import Rotary

SETTINGS = Settings(
    vocab=64,
    width=32,
    layers=4,
    heads=4,
    key_heads=2,
    head_size=8,
    mlp_width=48,
    activation="silu",
    rotaries=(Rotary(tuple(10_000.0 ** -(np.arange(4) / 4))),),
    windows=(0, 5, 0, 5),
)
