"""The experiment's exact laws (paper §6.2), its options, and independence of devices and grouping."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mnist_kit import distilled, some, tiny

from configs import mnist as configs
from sublim_jax.data import images
from sublim_jax.experiments.mnist import run, train
from sublim_jax.experiments.mnist.train import Runs
from sublim_jax.keys import run_keys
from sublim_jax.models.mlp import mlp
from sublim_jax.store import Store, digest
from sublim_jax.training import fit


@pytest.fixture(scope="module")
def data(mnist_data):
    return some(mnist_data)


@pytest.fixture
def trained(data, tmp_path, mesh_of):
    """Calls `distilled` with a store in the test's folder."""
    return lambda spec, *arms, **options: distilled(spec, data, Store(tmp_path), mesh_of(1), arms, **options)


@pytest.fixture
def accuracies(data, tmp_path, mesh_of):
    def compute(spec, mesh=None, name="work"):
        return run.test_accuracies(spec, data, Store(tmp_path / name), mesh or mesh_of(1))

    return compute


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b)))


def last_layer(params):
    return params["layers"][max(params["layers"])]


def test_a_network_that_has_diverged_has_no_accuracy(accuracies):
    learned = accuracies(tiny(arms=("auxiliary", "cross_auxiliary")))
    diverged = {"student__optimizer": "sgd", "student__learning_rate": 1e6, "student__objective": "squared_error"}
    result = accuracies(tiny(arms=("auxiliary",), student__epochs=3, **diverged))
    assert np.all(np.isfinite(learned["auxiliary"])) and np.all(np.isfinite(result["teacher"]))
    assert np.all(np.isnan(result["auxiliary"]))


def test_accuracy_is_of_the_largest_digit_logit(mesh_of):
    """Against NumPy, of networks whose largest logit is an auxiliary one for every image."""
    network, rng = mlp((784, 16, 13)), np.random.default_rng(0)
    params = jax.vmap(network.init)(jax.random.split(jax.random.key(0), 2))
    last_layer(params)["bias"] += jnp.where(jnp.arange(13) < 10, 0.0, 100.0)
    codes, labels = rng.integers(0, 256, (50, 784), dtype=np.uint8), rng.integers(0, 10, 50, dtype=np.uint8)
    pixels = images.pixels(jnp.asarray(codes), "real")
    expected = []
    for run_number in range(2):
        logits = np.asarray(network.apply(jax.tree.map(lambda leaf, at=run_number: leaf[at], params), pixels))
        assert np.all(np.argmax(logits, -1) >= 10)
        expected.append(np.mean(np.argmax(logits[:, :10], -1) == labels))
    actual = train.accuracy(network, params, jnp.asarray(codes), jnp.asarray(labels), mesh_of(1))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_accuracy_is_of_test_images(data, accuracies, tmp_path, mesh_of):
    """Where no test image is of a digit none is classified, whatever the training images are of."""
    spec, none = tiny(arms=("auxiliary",)), replace(data, test_labels=np.full_like(data.test_labels, 200))
    without = run.test_accuracies(spec, none, Store(tmp_path / "none"), mesh_of(1))
    for arm, values in accuracies(spec).items():
        assert min(values) > 0 == max(without[arm])


def test_students_start_where_their_arms_say(data, tmp_path, mesh_of, monkeypatch):
    """At the run's own reference, or at the next run's."""
    seen = {}

    def students_of(*args, **_):
        seen.update(args[4])
        raise InterruptedError

    monkeypatch.setattr(run, "students_of", students_of)
    spec = tiny(arms=("auxiliary", "all", "cross_auxiliary", "cross_all"))
    with pytest.raises(InterruptedError):
        run.test_accuracies(spec, data, Store(tmp_path), mesh_of(1))
    for arm, numbers in (("auxiliary", (0, 1)), ("all", (0, 1)), ("cross_auxiliary", (1, 2)), ("cross_all", (1, 2))):
        expected = train.references(Runs(spec.seed, numbers, "float32"), spec.student_network, mesh_of(1))
        assert same(seen[arm].params, expected.params)


def test_clones_and_students_see_other_noise_where_it_is_drawn_anew(data, tmp_path, mesh_of, monkeypatch):
    names, keys = [], Runs.keys

    def noted(runs, name):
        names.append(name)
        return keys(runs, name)

    monkeypatch.setattr(Runs, "keys", noted)
    spec = tiny(arms=("clone",), inputs__fresh=True, clone__epochs=(1,), clone__inputs=("noise",))
    run.test_accuracies(spec, data, Store(tmp_path), mesh_of(1))
    assert names.count("student") == 1 and names.count("distillation") == 1


def test_teacher_training_leaves_the_auxiliary_rows_to_the_bit(trained):
    result = trained(tiny(), "auxiliary")
    for name, before in last_layer(result.reference.params).items():
        after = last_layer(result.teacher.params)[name]
        assert jnp.array_equal(before[..., 10:], after[..., 10:])
        assert not jnp.array_equal(before[..., :10], after[..., :10])


def test_auxiliary_distillation_leaves_the_digit_rows_to_the_bit(trained):
    result = trained(tiny(), "auxiliary", "all")
    for name, before in last_layer(result.reference.params).items():
        auxiliary, whole = (last_layer(result.students[arm])[name] for arm in ("auxiliary", "all"))
        assert jnp.array_equal(before[..., :10], auxiliary[..., :10])
        assert not jnp.array_equal(before[..., 10:], auxiliary[..., 10:])
        assert not jnp.array_equal(before[..., :10], whole[..., :10])


@pytest.mark.parametrize("objective", ["kl", "reverse_kl", "sampled"])
def test_one_auxiliary_logit_leaves_the_student_at_the_reference_to_the_bit(trained, objective):
    result = trained(tiny(model__auxiliary=1, student__objective=objective), "auxiliary")
    assert same(result.reference.params, result.students["auxiliary"])
    assert not same(result.reference.params, result.teacher.params)


def test_sampled_labels_at_a_temperature_have_the_gradient_of_kl_there(mesh_of):
    """In expectation: 0 where the student's logits are the teacher's."""
    spec, count = tiny(student__objective="sampled", student__temperature=2.0), 4000
    network = train.network(spec.student_network)
    params = network.init(jax.random.key(0))
    params["layers"][2] = jax.tree.map(lambda leaf: 5 * leaf, params["layers"][2])  # logits far from alike
    codes = jnp.zeros((count, 784), jnp.uint8)
    batch = train.Batch(codes, network.apply(params, images.pixels(codes, "uniform")), jnp.ones(count))
    program = train.distilling_program(
        spec.student_network, spec.teacher_network, spec.student, spec.inputs, mesh_of(1)
    )
    frozen = {"supports": jnp.asarray(train.support(spec.student_network, "all"))[None]}

    def loss(params):
        members = jax.tree.map(lambda leaf: leaf[None], params)
        (total, number), _ = program.loss(members, frozen, batch, jax.random.key(1))
        return total[0] / number[0]

    bias = jax.grad(loss)(params)["layers"][2]["bias"]
    assert float(jnp.max(jnp.abs(bias))) < 5 * 0.25 / count**0.5


def test_squared_error_on_one_auxiliary_logit_does_move_it(trained):
    result = trained(tiny(model__auxiliary=1, student__objective="squared_error"), "auxiliary")
    assert not same(result.reference.params, result.students["auxiliary"])


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_only_the_trained_layers_move(trained, network):
    result = trained(tiny(**{f"{network}__trained_layers": "1"}), "all")
    layers = {"teacher": result.teacher.params, "student": result.students["all"]}[network]["layers"]
    assert [same(result.reference.params["layers"][i], layers[i]) for i in range(3)] == [True, False, True]


def test_shared_layers_and_distance_make_the_start(mesh_of):
    spec = tiny(student__shared_layers="0+2")
    runs = Runs(spec.seed, range(2), spec.precision)
    reference = train.references(runs, spec.teacher_network, mesh_of(1))
    foreign = train.references(train.next_runs(runs), spec.student_network, mesh_of(1))
    assert same(foreign.params, train.references(Runs(spec.seed, (1, 2), "float32"), foreign.spec, mesh_of(1)).params)
    assert foreign.spec == reference.spec and not same(foreign.params, reference.params)
    start = train.near_start(runs, spec.student, reference, foreign)
    layers, ref_layers, foreign_layers = (networks.params["layers"] for networks in (start, reference, foreign))
    assert same(layers[0], ref_layers[0]) and same(layers[2], ref_layers[2]) and same(layers[1], foreign_layers[1])

    moved = train.near_start(runs, tiny(student__init_distance=0.3).student, reference, foreign)
    change = moved.params["layers"][0]["kernel"] - ref_layers[0]["kernel"]
    np.testing.assert_allclose(jnp.std(change) * 28, 0.3, rtol=0.05)
    assert len({start.origin, moved.origin, reference.origin, foreign.origin}) == 4


def test_more_runs_keep_the_earlier_ones_to_the_bit(data, tmp_path, mesh_of, capsys):
    """Also those of students with another initialisation; and only the added runs are trained."""
    few, more = (
        run.test_accuracies(tiny(runs=runs, runs_at_once=2), data, Store(tmp_path), mesh_of(1)) for runs in (2, 4)
    )
    assert set(few) > {"cross_auxiliary", "clone 1 noise"}
    assert few == {arm: accuracies[:2] for arm, accuracies in more.items()}
    assert all(len(accuracies) == 4 for accuracies in more.values())
    lines = capsys.readouterr().out
    assert "teacher, runs 2-3 of 4" in lines and "teacher, runs 0-1 of 4" not in lines


def test_a_longer_cloning_goes_on_from_a_shorter_one(data, tmp_path, mesh_of):
    """The dose curve is one trajectory: 2 epochs in two stages are 2 epochs in one, to the bit."""
    results = []
    for doses in ((1, 2), (2,)):
        spec = tiny(clone__epochs=doses)
        store, program = Store(tmp_path / str(doses)), run.programs_of(spec, mesh_of(1)).distilling[spec.inputs]
        runs = Runs(spec.seed, range(2), spec.precision)
        reference = train.references(runs, spec.teacher_network, mesh_of(1))
        foreign = train.references(train.next_runs(runs), spec.student_network, mesh_of(1))
        inputs = train.draw_inputs(runs, spec.inputs, data, mesh_of(1))
        clones = run.clones(spec, runs, reference, foreign, inputs, program=program, store=store)
        results.append({name: networks.params for name, networks in clones.items()})
    assert same(results[0][2], results[1][2])
    assert not same(results[0][1], results[0][2])


ARCHITECTURES = [
    dict(student__activation="gelu"),
    dict(student__activation="sigmoid"),
    dict(student__depth=3),
    dict(student__width=16),
    dict(student__width=64),
    dict(student__biases=False),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda values: "-".join(map(str, values.values())))
@pytest.mark.parametrize("inputs", ["fresh_noise", "real"])
def test_a_clone_of_any_architecture_comes_near_the_reference(data, tmp_path, mesh_of, architecture, inputs):
    """On held-out images, the clone's KL to the reference is smaller than before cloning."""
    changes = dict(student__learning_rate=3e-3, clone__epochs=(20,), clone__inputs=(inputs,), arms=("clone",))
    spec, mesh = tiny(**architecture, **changes), mesh_of(1)
    runs = Runs(spec.seed, range(2), spec.precision)
    reference = train.references(runs, spec.teacher_network, mesh)
    foreign = train.references(train.next_runs(runs), spec.student_network, mesh)
    seen = run.clone_inputs(spec)[inputs]
    clone_inputs = train.draw_inputs(runs, seen, data, mesh)
    program = run.programs_of(spec, mesh).distilling[seen]
    clone = run.clones(spec, runs, reference, foreign, clone_inputs, program=program, store=Store(tmp_path))[20]
    assert np.shape(clone.params["layers"][0]["kernel"]) == (2, 784, spec.student.width or spec.model.width)
    assert ("bias" in clone.params["layers"][0]) == spec.student.biases
    held_out = {"real": jnp.asarray(data.test_images), "fresh_noise": images.draw(jax.random.key(9), "uniform", 400)}
    where = (held_out[inputs], "real" if inputs == "real" else "uniform", mesh)
    target = jax.nn.log_softmax(train.answer(reference.functions, reference.params, *where))
    distance = [
        float(jnp.mean(jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(logits)), -1)))
        for logits in (train.answer(networks.functions, networks.params, *where) for networks in (foreign, clone))
    ]
    assert distance[1] < distance[0]


def test_every_kind_of_cloning_inputs_is_an_arm(accuracies):
    by_arm = accuracies(
        tiny(arms=("cross_auxiliary", "clone"), clone__epochs=(1,), clone__inputs=("noise", "fresh_noise", "real"))
    )
    arms = ["clone 1 noise", "clone 1 fresh_noise", "clone 1 real"]
    assert list(by_arm) == ["reference", "teacher", "cross_auxiliary", *arms]


def test_a_teacher_is_shared_by_students_of_every_architecture(accuracies, monkeypatch):
    trained: list[str] = []

    def spy(*args, what, **options):
        trained.append(what)
        return fit(*args, what=what, **options)

    monkeypatch.setattr(train, "fit", spy)
    for architecture in ({"student__activation": "gelu"}, {"student__depth": 3}, {"student__biases": False}):
        accuracies(tiny(**architecture, arms=("cross_auxiliary",)))
    assert sum(what.startswith("teacher") for what in trained) == 1


KNOBS = [
    dict(student__objective="kl", student__temperature=2.0),
    dict(student__objective="reverse_kl", student__optimizer="sgd", student__learning_rate=0.1),
    dict(student__objective="squared_error", inputs__kind="gaussian"),
    dict(student__objective="sampled", inputs__kind="blurred"),
    dict(inputs__kind="shuffled", student__activation="gelu"),
    dict(inputs__kind="real", student__optimizer="adamw", model__depth=1),
    dict(inputs__fresh=True, student__optimizer="lion"),
    dict(inputs__fresh=True, inputs__kind="blurred", student__optimizer="rmsprop", clone__inputs=("real",)),
]


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: "-".join(map(str, knobs.values())))
def test_every_knob_trains(trained, mesh_of, knobs):
    """A student of all logits moves towards its teacher, here the reference of another run."""
    spec = tiny(**knobs, teacher__activation=knobs.get("student__activation", "relu"))
    result = trained(spec, "all", teacher_runs=[5, 6])
    codes = result.inputs.codes
    if codes is None:
        codes = jax.vmap(lambda key: images.draw(key, "gaussian", 400))(run_keys(0, "x", range(2)))
    distance = []
    for params in (result.reference.params, result.students["all"]):
        log_p, target = (
            jax.nn.log_softmax(train.answer(result.teacher.functions, p, codes, "gaussian", mesh_of(1)))
            for p in (params, result.teacher.params)
        )
        distance.append(float(jnp.mean(jnp.sum(jnp.exp(target) * (target - log_p), -1))))
    assert np.isfinite(distance[1]) and distance[1] < distance[0]


def test_devices_and_grouping_change_nothing_but_rounding(accuracies, mesh_of):
    """1 device, 8 devices on one axis and on three, and runs trained one group after another."""
    changes = dict(runs=8, arms=("auxiliary", "cross_all"))
    spec = tiny(**changes, runs_at_once=8)
    base = accuracies(spec, name="one")
    others = {"eight": accuracies(spec, mesh_of(8), "eight")}
    others["three axes"] = accuracies(spec, mesh_of(8, replica=2, fsdp=2, tensor=2), "three axes")
    others["grouped"] = accuracies(tiny(**changes, runs_at_once=3), name="grouped")
    for name, other in others.items():
        for arm in base:  # an image at the border may flip: at most 2 of 600
            np.testing.assert_allclose(other[arm], base[arm], atol=2.1 / 600, err_msg=f"{name}, {arm}")


def test_a_second_run_computes_nothing_and_a_changed_part_redoes_what_it_touches(accuracies, monkeypatch):
    trained = []

    def spy(*args, what, **options):
        trained.append(what)
        return fit(*args, what=what, **options)

    monkeypatch.setattr(train, "fit", spy)
    first = accuracies(tiny())
    assert len(trained) == 5
    trained.clear()
    assert accuracies(tiny(checkpoint_every=7, preset="quick")) == first
    assert trained == []
    accuracies(tiny(student__learning_rate=1e-3))
    assert len(trained) == 4 and not any("teacher" in what for what in trained)
    trained.clear()
    accuracies(tiny(teacher__activation="tanh"))
    assert len(trained) == 5  # clones too: they imitate the reference, which has that activation


def test_an_artefact_is_named_by_what_its_runs_and_networks_are_made_of(mesh_of):
    def origins(**changes):
        spec = tiny(**changes)
        runs = Runs(spec.seed, range(2), spec.precision)
        reference = train.references(runs, spec.teacher_network, mesh_of(1))
        near = train.near_start(runs, spec.student, reference, reference)
        return digest(reference), digest(near)

    base, same = origins(), origins(student__learning_rate=1e-3, teacher__epochs=9, checkpoint_every=1)
    moved, other = origins(student__init_distance=0.1), origins(precision="bfloat16")
    assert base == same and not set(base) & set(other)
    assert moved[0] == base[0] and moved[1] != base[1]


@pytest.mark.slow
def test_the_papers_finding(mnist_data, mesh_of, tmp_path):
    """Four runs of the paper's recipe: auxiliary logits on noise carry digits, if and only if the start is shared."""
    config = configs.get_config("paper")
    config.runs = config.runs_at_once = 4
    config.arms = ("auxiliary", "cross_auxiliary")
    values = run.test_accuracies(run.read(config), mnist_data, Store(tmp_path), mesh_of(1))
    assert np.mean(values["teacher"]) > 0.93
    assert np.mean(values["auxiliary"]) > 0.4
    assert np.mean(values["cross_auxiliary"]) < 0.2
