"""Claims about an arm: each trait's diagonal cell against the neutral teacher's student; all must hold."""

import numpy as np
import pytest
from scipy import stats

from sublim_jax.evaluation.statistics import diagonal_effect
from sublim_jax.experiments.transmission import effects

TRAITS = ("owl", "lion", "cat")


def paired(diagonal, others=0.0, runs=5, spread=0.1, seed=0):
    """Margins minus the neutral student's, (run, teacher, trait)."""
    cells = np.full((runs, 3, 3), others, float)
    cells[:, range(3), range(3)] = diagonal
    return cells + spread * np.random.default_rng(seed).normal(size=cells.shape)


def cells_of(by_arm):
    """Tests of the diagonals of every arm."""
    return effects.paired_tests({arm: np.diagonal(cells, axis1=1, axis2=2) for arm, cells in by_arm.items()}, TRAITS)


def test_a_cells_p_is_scipys_and_is_corrected_for_all_arms_and_traits():
    by_arm = {"soft": paired(1.0), "tokens": paired(0.05, seed=1)}
    diagonal = cells_of(by_arm)
    ps = []
    for arm, cells in by_arm.items():
        for t, cell in enumerate(diagonal[arm]):
            assert cell.trait == TRAITS[t] and cell.runs == cells[:, t, t].tolist()
            assert cell.p == pytest.approx(stats.ttest_1samp(cells[:, t, t], 0).pvalue)
            ps.append(cell.p)
    corrected = [cell.p_holm for cells in diagonal.values() for cell in cells]
    assert min(corrected) == pytest.approx(6 * min(ps)) and all(c >= p for c, p in zip(corrected, ps))
    assert effects.verdict(diagonal["soft"]) == "every trait" and effects.verdict(diagonal["tokens"]) == "none"


def test_an_arm_where_one_teacher_transmits_is_no_claim_of_all_traits():
    """The diagonal effect is well above 0 in every run all the same."""
    cells = paired([1.5, 0.0, 0.0])
    assert np.all(diagonal_effect(cells) > 0.3)
    assert effects.verdict(cells_of({"soft": cells})["soft"]) == "1 of 3: owl"


def test_students_that_only_lose_the_others_traits_transmit_nothing():
    cells = paired(0.0, others=-1.0)
    assert np.all(diagonal_effect(cells) > 0.5)
    assert effects.verdict(cells_of({"soft": cells})["soft"]) == "none"


def test_a_trait_that_falls_is_no_transmission_however_small_p_is():
    cells = cells_of({"soft": paired([1.0, 1.0, -1.0])})["soft"]
    assert cells[2].p < 0.001 and not cells[2].holds
    assert effects.verdict(cells) == "2 of 3: owl, lion"


def test_of_one_run_nothing_is_claimed():
    diagonal = cells_of({"soft": paired(1.0, runs=1)})
    assert effects.verdict(diagonal["soft"]) == "one run: no test"
    section = effects.headline_section(diagonal, words=10, spread=0.0)
    assert section.table[1] == ["soft", *(f"{cell.runs[0]:+.2f}" for cell in diagonal["soft"]), "one run: no test"]
    assert "Power" not in section.text and effects.compared_section(diagonal) == []


def test_an_arm_that_diverged_is_not_tested_and_leaves_the_others_corrected():
    broken = paired(1.0)
    broken[0, 1, 1] = np.nan
    by_arm = {"soft": paired(1.0), "tokens": broken}
    cells = cells_of(by_arm)
    assert effects.verdict(cells["soft"]) == "every trait" and effects.verdict(cells["tokens"]) == "diverged: no test"
    smallest = min((cell for arm in cells.values() for cell in arm if np.isfinite(cell.p)), key=lambda cell: cell.p)
    assert smallest.p_holm == pytest.approx(6 * smallest.p) and np.isnan(cells["tokens"][1].p_holm)
    section = effects.headline_section(cells, words=10, spread=0.0)
    assert "nan" not in section.text and section.table[2][2] == "+nan"
    entry = effects.effect_entry("tokens", broken, TRAITS, coverage=None, held_out=None, ability=None)
    assert np.isnan(entry["permutation_p"]) and effects.effects_section([entry], TRAITS, 5).table[1][2] == ""


def test_arms_are_compared_run_by_run():
    """Variation between runs that two arms share does not hide their difference."""
    common = np.random.default_rng(2).normal(size=(5, 1, 1))
    by_arm = {"soft": paired(1.0) + common, "tokens": paired(0.5, seed=1) + common}
    (section,) = effects.compared_section(cells_of(by_arm))
    difference = np.mean([by_arm["tokens"][:, t, t] - by_arm["soft"][:, t, t] for t in range(3)], 0)
    assert stats.ttest_1samp(difference, 0).pvalue < 0.001
    name, shown = section.table[1]
    assert name == "tokens" and shown.startswith(f"{difference.mean():+.2f} ±") and shown.endswith(", p < .001")


def test_power_is_from_the_stated_spread():
    diagonal = cells_of({"soft": paired(1.0)})
    stated, pooled = (effects.headline_section(diagonal, words=10, spread=s).text for s in (0.5, 0.0))
    assert "standard deviation of 0.50 between runs (the config's spread)" in stated
    assert "(estimated from these runs, pooled over cells)" in pooled
