"""The report of MNIST runs: intervals and tests against SciPy, on made-up accuracies."""

import numpy as np
import pytest
from scipy import stats

from configs import mnist as config_file
from sublim_jax.experiments.mnist.report import document
from sublim_jax.experiments.mnist.run import read
from sublim_jax.measurements import Measurements, from_array

RUNS = 6


@pytest.fixture
def accuracies():
    """Made-up test accuracies of every arm at three points."""
    rng = np.random.default_rng(0)
    arms = ("reference", "teacher", "auxiliary", "cross_auxiliary")
    return {(point, arm): rng.uniform(size=RUNS) for point in ("kl", "squared_error", "sampled") for arm in arms}


def rows_of(accuracies):
    return Measurements(
        row
        for (point, arm), values in accuracies.items()
        for row in from_array(values, arm=arm, measure="test_accuracy", item=point)
    )


def spec_of(preset, **changes):
    config = config_file.get_config(preset)
    config.update_from_flattened_dict({"runs": RUNS, **changes})
    return read(config)


def t_half_width(values):
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def test_a_sweep_compares_every_point_with_the_first_paired_by_run(accuracies):
    spec = spec_of("sweep", **{"sweep.axis": "student.objective", "sweep.points": ("kl", "squared_error", "sampled")})
    _, (levels, differences) = document(spec, rows_of(accuracies), {})
    assert len(levels.table) == 1 + len(accuracies)
    expected, ps = [], []
    for point in ("squared_error", "sampled"):
        for arm in ("auxiliary", "cross_auxiliary"):
            difference = accuracies[point, arm] - accuracies["kl", arm]
            expected.append(f"{difference.mean():.3f} ± {t_half_width(difference):.3f}")
            ps.append(stats.ttest_rel(accuracies[point, arm], accuracies["kl", arm]).pvalue)
    assert [row[2] for row in differences.table[1:]] == expected
    order = np.argsort(ps)
    holm = np.minimum(np.maximum.accumulate(np.sort(ps) * [4, 3, 2, 1]), 1)
    np.testing.assert_allclose([float(differences.table[1 + place][3]) for place in order], holm, rtol=0.05)


def test_an_arm_that_a_value_does_not_reach_is_not_tested(accuracies):
    """Its runs are equal, and the others are corrected as if it were not there."""
    for point in ("squared_error", "sampled"):
        accuracies[point, "cross_auxiliary"] = accuracies["kl", "cross_auxiliary"]
    spec = spec_of("sweep", **{"sweep.axis": "student.objective", "sweep.points": ("kl", "squared_error", "sampled")})
    _, (_, differences) = document(spec, rows_of(accuracies), {})
    shown = {(row[0], "another" in row[1]): row[3] for row in differences.table[1:]}
    assert shown["squared_error", True] == shown["sampled", True] == "none"
    ps = [
        stats.ttest_rel(accuracies[point, "auxiliary"], accuracies["kl", "auxiliary"]).pvalue
        for point in ("squared_error", "sampled")
    ]
    smallest = ("squared_error", "sampled")[int(np.argmin(ps))]
    assert float(shown[smallest, False]) == pytest.approx(min(1, 2 * min(ps)), rel=0.05)


@pytest.mark.parametrize(
    "axis, counts, runs",
    [
        ("seed", {"0": RUNS, "1": RUNS}, RUNS),
        ("runs", {"4": 4, "6": 6}, RUNS),
        ("student.objective", {"kl": 1, "squared_error": 1}, 1),
    ],
)
def test_points_without_pairs_have_no_differences(accuracies, axis, counts, runs):
    """Other seeds, other numbers of runs, and a single run, of which no interval is known."""
    arms = ("reference", "teacher", "auxiliary")
    given = {(point, arm): accuracies["kl", arm][:count] for point, count in counts.items() for arm in arms}
    spec = spec_of("sweep", **{"sweep.axis": axis, "sweep.points": tuple(counts), "runs": runs, "arms": arms[2:]})
    _, sections = document(spec, rows_of(given), {})
    assert [section.title for section in sections] == [f"Test accuracy over {axis}"]


def test_a_run_that_has_diverged_is_said_to_have(accuracies):
    given = {("", arm): accuracies["kl", arm] for arm in ("reference", "teacher", "auxiliary", "cross_auxiliary")}
    given["", "auxiliary"] = np.where(np.arange(RUNS) < 2, np.nan, given["", "auxiliary"])
    entries, (section,) = document(spec_of("nature"), rows_of(given), {})
    assert [row[1].startswith("diverged") for row in section.table[1:]] == [False, False, True, False]
    assert section.table[3][1] == "diverged in 2 of the runs" and np.isnan(entries[2]["mean"])


@pytest.mark.parametrize(
    "changes, compared",
    [
        ({"seed": 3, "arms": ("auxiliary",)}, True),
        ({"student.learning_rate": 1e-3}, False),
        ({"model.auxiliary": 50}, False),
        ({"inputs.kind": "gaussian"}, False),
        ({"sweep.axis": "seed", "sweep.points": (0, 1)}, False),
    ],
)
def test_the_papers_values_are_shown_for_the_papers_recipe_alone(accuracies, changes, compared):
    points = changes.get("sweep.points", ("",))
    given = {(str(point), arm): accuracies["kl", arm] for point in points for arm in ("teacher", "auxiliary")}
    entries, (section, *_) = document(spec_of("paper", **changes), rows_of(given), {})
    assert ("inside" in section.table[0]) == compared
    assert all((entry["published"] is not None) == compared for entry in entries)


def test_cloned_students_are_compared_with_uncloned_ones_of_the_same_run(accuracies):
    arms = {"reference": "kl", "teacher": "kl", "auxiliary": "kl", "cross_auxiliary": "kl"}
    given = {("", arm): accuracies[point, arm] for arm, point in arms.items()}
    given["", "clone 5 fresh_noise"] = accuracies["kl", "cross_auxiliary"] + np.linspace(0.1, 0.2, RUNS)
    given["", "clone 20 fresh_noise"] = accuracies["sampled", "auxiliary"]
    entries, (section,) = document(spec_of("nature"), rows_of(given), {})
    ps = [
        stats.ttest_rel(given["", f"clone {epochs} fresh_noise"], given["", "cross_auxiliary"]).pvalue
        for epochs in (5, 20)
    ]
    assert [entry["p"] for entry in entries if "p" in entry] == pytest.approx([2 * ps[0], max(2 * ps[0], ps[1])])
    assert "cloning" in section.figures and [row[0] for row in section.table[5:]] == [
        "cloned 5 epochs on fresh noise, then distilled (auxiliary logits)",
        "cloned 20 epochs on fresh noise, then distilled (auxiliary logits)",
    ]
