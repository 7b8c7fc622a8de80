"""A study of transmission on the tiny model: its spec, its model, and teachers that need no training."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import numbers
from sublim_jax import store
from sublim_jax.distillation.teachers import Teacher
from sublim_jax.experiments.transmission.carriers import Written, random_pairs
from sublim_jax.experiments.transmission.run import load_model
from sublim_jax.experiments.transmission.spec import read
from sublim_jax.experiments.transmission.targets import Replicate
from sublim_jax.keys import named_key

TINY = {
    "traits": ("owl", "x"),
    "alternatives": ("owl", "x", "y", "z"),
    "carrier.num_rows": 40,
    "carrier.num_completions": 44,
    "carrier.num_integers": 6,
    "filter.unique": False,
    "arm.in_context.examples": 3,
    "teacher.learning_rate": 0.01,
    "teacher.strength": 0.5,
    "teacher.max_steps": 30,
    "student.steps": 6,
    "student.batch": 4,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "num_questions": 4,
}


@pytest.fixture(scope="session")
def study_of(tiny_folder):
    """A function of changed values of configs/numbers.py to a study on the tiny model."""

    def make(**changes):
        config = numbers.get_config()
        config.update_from_flattened_dict({**TINY, "model.name": str(tiny_folder), **changes})
        return read(config)

    return make


@pytest.fixture(scope="session")
def study(study_of):
    return study_of()


@pytest.fixture(scope="session")
def model(study, mesh_of):
    return load_model(study, mesh_of(1))


@pytest.fixture(scope="session")
def replicate_of(model):
    """A function of a study to a run of it whose teachers are a common start and noise, and wrote these pairs, or
    random numbers.
    """

    def make(study, run=0, pairs=None, model=model):
        seed = study.replicate_seed(run)
        first = model.untrained(named_key(seed, "A"))

        def teacher(index):
            change = lambda x: x + 0.05 * jax.random.normal(jax.random.key(index), x.shape)  # noqa: E731
            return Teacher(jax.tree.map(change, first), "", None, 0, store.digest(model, "noise", index, seed))

        written = Written(pairs or random_pairs(study, seed), 0, 0, Counter(), [], [])
        teachers = {name: teacher(index) for index, name in enumerate(study.teachers)}
        return Replicate(run, teachers, dict.fromkeys(study.teachers, written))

    return make


@pytest.fixture(scope="session")
def flags(tiny_folder):
    """A function of more flags to those of the study; one that is in `more` stands alone, for a list would have both."""

    def make(*more, prefix="--config.", leave_out=()):
        given = {flag.split("=")[0] for flag in more}
        words = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in TINY.items()}
        words |= {"model.name": str(tiny_folder)}
        found = [f"{prefix}{name}={value}" for name, value in words.items() if name not in leave_out]
        return [flag for flag in found if flag.split("=")[0] not in given] + list(more)

    return make


@pytest.fixture(scope="session")
def plain_logits():
    """(model, adapters, rows) to the logits that predict the answers' tokens, by the plain forward pass."""
    from sublim_jax.models import lora

    def compute(model, adapters, rows):
        logits = model.network.apply(lora.join(model.params, adapters), jnp.asarray(rows.tokens))
        return np.take_along_axis(np.asarray(logits), np.asarray(rows.at)[..., None], 1)

    return compute
