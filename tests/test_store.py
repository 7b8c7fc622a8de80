"""Artefacts are named by their inputs: another value of any input gives another name, and nothing else does."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublim_jax.distillation.students import Training
from sublim_jax.evaluation.spec import JudgeSpec
from sublim_jax.sharding import named
from sublim_jax.store import Store, digest

arrays = st.lists(st.integers(-3, 3), min_size=1, max_size=4).flatmap(
    lambda numbers: st.sampled_from(["int32", "float32", "uint8"]).map(lambda kind: np.asarray(numbers).astype(kind))
)
plain = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=3)
values = st.recursive(
    plain | arrays,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


def content(value):
    """An independent key of a value: the types and bytes of its leaves."""
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return "dict", tuple(sorted((key, content(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return "list", tuple(content(item) for item in value)
    return type(value).__name__, repr(value)


@given(st.lists(values, max_size=3), st.lists(values, max_size=3))
def test_a_name_is_the_same_for_the_same_inputs_and_for_no_others(some, others):
    assert digest(*some) == digest(*some)
    assert (digest(*some) == digest(*others)) == (content(some) == content(others))


@given(st.lists(values, min_size=1, max_size=3), values, st.data())
def test_another_value_anywhere_is_another_name(some, other, data):
    place = data.draw(st.integers(0, len(some) - 1))
    changed = [*some[:place], other, *some[place + 1 :]]
    assert (digest(*changed) == digest(*some)) == (content(changed) == content(some))
    assert digest(*some, other) != digest(*some)


TRAINING = Training(1e-3, "constant", 1, 0.0, 4, 1, 6)
OTHERS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "schedule": "linear",
    "warmup": 0,
    "clip": 1.0,
    "batch": 2,
    "accumulate": 2,
    "steps": 7,
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Training)])
def test_every_value_of_a_spec_is_in_the_name(name):
    assert digest(dataclasses.replace(TRAINING, **{name: OTHERS[name]})) != digest(TRAINING)


def test_values_that_a_spec_does_not_compare_are_in_no_name():
    judge = JudgeSpec("local", "m", "float32", 0.25, 100, 8, 0, (0.0, 0.0))
    assert digest(dataclasses.replace(judge, max_concurrent=1, max_per_minute=3, prices=(1.0, 2.0))) == digest(judge)
    assert digest(dataclasses.replace(judge, min_mass=0.5)) != digest(judge)


def test_the_kind_of_a_spec_is_in_the_name():
    @dataclasses.dataclass
    class Other:
        learning_rate: float = 1e-3

    @dataclasses.dataclass
    class Another:
        learning_rate: float = 1e-3

    assert len({digest(Other()), digest(Another()), digest({"learning_rate": 1e-3})}) == 3


def test_what_has_a_digest_is_named_by_it_alone():
    class Thing(NamedTuple):
        digest: str
        label: str

    assert digest(Thing("a", "x")) == digest(Thing("a", "y")) != digest(Thing("b", "x"))


def test_arrays_are_named_by_content_wherever_they_are(mesh_of):
    mesh = mesh_of(4, replica=1, fsdp=4)
    numbers = np.arange(8, dtype=np.float32)
    placed = jax.device_put(numbers, named(mesh, "fsdp"))
    assert digest(placed) == digest(numbers) == digest(jnp.asarray(numbers)) != digest(numbers.reshape(2, 4))
    assert digest(numbers.astype(np.int32)) != digest(numbers) != digest(-numbers)
    assert digest(jax.random.key(1)) == digest(jax.random.key(1)) != digest(jax.random.key(2))


@pytest.mark.parametrize("value", [object(), len, {1, 2}])
def test_what_has_no_content_names_nothing(value):
    with pytest.raises(TypeError, match="an artefact cannot be named by a"):
        digest(value)


def test_how_it_is_computed_is_in_no_name(tmp_path, mesh_of):
    """Keyword arguments reach the function, but do not change the artefact's name."""
    store, calls = Store(tmp_path), []

    def make(scale, *, checkpoints=None, **how):
        calls.append(how)
        return {"x": scale * jnp.arange(3.0)}

    like = {"x": jnp.zeros(3)}
    single, several = ({"mesh": mesh_of(count, fsdp=-1, replica=1), "label": f"on {count}"} for count in (1, 4))
    first = store.tree("scaled", make, 2.0, like=like, **single)
    np.testing.assert_array_equal(store.tree("scaled", make, 2.0, like=like, **several)["x"], first["x"])
    assert calls == [single]
    np.testing.assert_array_equal(store.tree("scaled", make, 3.0, like=like, **several)["x"], [0, 3, 6])
    assert calls == [single, several]
    assert store.json("total", lambda x, **_: 2 * x, 4, label="a") == 8
    assert store.json("total", lambda x, **_: calls.append(x), 4, label="b") == 8 == store.known("total", 4)
    assert store.known("total", 5) is None and len(calls) == 2


def test_a_damaged_artefact_is_made_again(tmp_path, capsys):
    store = Store(tmp_path)
    made = {"x": jnp.arange(3.0)}
    for value in (made, {"x": 2 * made["x"]}):
        tree = store.tree("tree", lambda _, checkpoints, value=value: value, 0, like=made)
        np.testing.assert_array_equal(tree["x"], value["x"])
        assert store.json("values", lambda _, value=value: value["x"].tolist(), 0) == value["x"].tolist()
        for file in filter(lambda path: path.is_file(), tmp_path.rglob("*")):
            file.write_bytes(file.read_bytes()[:-2])
    assert capsys.readouterr().out.count("unreadable and is made again") == 2
