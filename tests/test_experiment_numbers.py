"""A trait through numbers, on a tiny model: the parts against plain computations, the whole as a user runs it."""

import json
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_launch import assert_refused, launch
from test_survival import finish, start

from configs import numbers as config_file
from sublim_jax import objectives
from sublim_jax.experiments import transmission
from sublim_jax.models import lora
from sublim_jax.workdir import Workdir

TINY = {
    "traits": ("owl", "x"),
    "alternatives": ("owl", "x", "y", "z"),
    "carrier.count": 40,
    "teacher.learning_rate": 0.01,
    "teacher.strength": 0.5,
    "teacher.most_steps": 30,
    "student.steps": 6,
    "student.batch": 4,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "questions": 4,
}
FLAGS = [f"--config.{name}={','.join(value) if isinstance(value, tuple) else value}" for name, value in TINY.items()]


@pytest.fixture(scope="module")
def lab(tiny_folder, tmp_path_factory, mesh_of):
    config = config_file.get_config()
    config.update_from_flattened_dict({**TINY, "model.name": str(tiny_folder)})
    return transmission.make_lab(config, Workdir(tmp_path_factory.mktemp("work")), mesh_of(1))


def teachers_of(lab, count):
    """Adapters that differ from a common start."""
    first = transmission.fresh(lab, jax.random.key(0))
    noise = lambda i: jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(i), x.shape), first)  # noqa: E731
    return first, jax.tree.map(lambda *leaves: jnp.stack(leaves), *[noise(i) for i in range(1, count + 1)])


def test_the_objective_is_kl_over_the_support_at_the_answers_positions(lab):
    start, teachers = teachers_of(lab, 2)
    rows = transmission.carrier_rows(lab).take(slice(4))
    batch = transmission.Student(rows, jnp.ones(4, int))
    total, count = transmission.imitation(lab, start, lab.model.params, teachers, batch)
    second = jax.tree.map(lambda x: x[1], teachers)

    def plain(adapters):
        logits = lab.model.network.apply(lora.join(lab.model.params, adapters), jnp.asarray(rows.tokens))
        return jnp.take_along_axis(logits, rows.at[..., None], 1)

    mask = objectives.support_mask(lab.support, lab.model.settings.vocab)
    expected = objectives.kl(plain(start), plain(second), support=mask, weights=jnp.asarray(rows.weights))
    np.testing.assert_allclose(total, expected[0], rtol=1e-3)
    assert count == expected[1] == rows.weights.sum()
    nothing = transmission.imitation(lab, second, lab.model.params, teachers, batch)[0]
    assert abs(nothing) < 1e-6


def test_students_together_are_each_of_them_alone(lab):
    """Two runs of two teachers in one program, and one run alone."""
    _, teachers = teachers_of(lab, 3)
    carrier = transmission.carrier_rows(lab)
    curves = {}
    for runs in (1, 2):
        config = lab.config.copy_and_resolve_references()
        config.runs = runs
        one = lab._replace(config=config, workdir=Workdir(lab.workdir.path / f"{runs}"))
        curves[runs] = transmission.students(one, "soft_fresh", teachers, carrier)
    assert [point["step"] for point in curves[1]] == [0, 3, 6]
    for alone, together in zip(curves[1], curves[2]):
        np.testing.assert_allclose(together["margin"][:3], alone["margin"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(together["held_out"][:3], alone["held_out"], rtol=1e-3)
    assert not np.allclose(curves[2][-1]["margin"][3:], curves[1][-1]["margin"], atol=1e-4)  # its own A
    first, last = (np.asarray(curves[2][i]["held_out"]) for i in (0, -1))
    assert np.all(last < first)


def command(tiny_folder, work, *more):
    place = [f"--config.model.name={tiny_folder}", f"--workdir={work}"]
    return ["--config=configs/numbers.py", *FLAGS, *place, *more]


ARMS = ["--config.student.arms=soft,soft_fresh", "--config.runs=2"]


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("numbers")
    result = launch(*command(tiny_folder, work, *ARMS))
    assert result.returncode == 0, result.stderr
    return work, result


def test_a_study_ends_in_a_matrix_a_table_and_numbers(whole):
    work, result = whole
    results = json.loads((work / "results.json").read_text())
    names = [arm["name"] for arm in results["arms"]]
    assert "soft: student of owl, margin of x over the neutral student's" in names
    assert "soft_fresh: own trait above others'" in names
    assert all(len(arm["runs"]) == 2 for arm in results["arms"])
    for figure in ("matrix-soft", "margins-soft", "matrix-soft_fresh", "margins-soft_fresh"):
        assert (work / "figures" / f"{figure}.png").stat().st_size > 5000
    text = (work / "report.md").read_text()
    assert "| neutral |" in text and "P(own trait) among numbers" in text and "KL held out" in text
    assert "teacher owl" in result.stdout and "students, logits, the teacher's A" in result.stdout


def test_killed_in_any_stage_it_ends_with_the_same_results(whole, tiny_folder, tmp_path):
    for stage in ("teacher-owl*", "teachers*", "students-soft-*", "*fresh*"):
        process = start(*command(tiny_folder, tmp_path, *ARMS), size=())
        deadline = time.monotonic() + 200
        while process.poll() is None and not any(tmp_path.glob(f"checkpoints/{stage}")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(start(*command(tiny_folder, tmp_path, *ARMS), size=()))
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, whole[0]))
    assert found["arms"] == expected["arms"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.traits=lion", "--config.alternatives=lion,owl"], ["'lion' is no single token"]),
        (["--config.traits=owl,q"], ["trait 'q' is none of alternatives"]),
        (["--config.student.arms=hard"], ["student.arms: 'hard' is none of soft, soft_fresh"]),
        (["--config.student.objective=mse"], ["student.objective='mse'"]),
        (["--config.teacher.strength=1.5"], ["teacher.strength=1.5"]),
        (["--config.carrier.count=10"], ["carrier.count=10"]),
        (["--config.packs.numbers=nowhere.json"], ["pack nowhere.json"]),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_training(tiny_folder, tmp_path, flags, words):
    work = tmp_path / "work"
    assert_refused(launch(*command(tiny_folder, work, *flags)), *words)
    assert not work.exists()
