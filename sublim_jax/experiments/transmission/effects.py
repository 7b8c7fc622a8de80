"""Which arms transmit which traits: tests of each trait's own cell against the neutral student of the same run.

With two traits that are each other's alternatives, the mean of the diagonal less the mean of the rest is one log-odds
difference: the neutral student and all other words cancel. So each trait's own cell is tested, and an arm transmits
only if all of its cells hold, with p corrected for the number of traits and arms.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sublim_jax import report
from sublim_jax.evaluation.statistics import (
    detectable,
    diagonal_effect,
    holm,
    paired_p,
    permutation_p,
    pooled_spread,
    smallest_permutation_p,
    t_interval,
)
from sublim_jax.figures import Entry, arms_figure

LEVEL = 0.05
CELL, EFFECT = "logits over the neutral teacher's student", "diagonal effect, logits"

Paired = Float[np.ndarray, "runs traits traits"]  # margins over the neutral student's: by teacher, by trait
Diagonal = Float[np.ndarray, "runs traits"]  # of these: every trait in the students of its teacher


class Cell(NamedTuple):
    """A trait in the students of its own teacher."""

    trait: str
    runs: list[float]  # margin of the trait over that of the neutral teacher's student of the same run, logits
    p: float  # two-sided paired t-test; nan where there is none (`paired_p`)
    p_holm: float  # the same, corrected for all cells that are tested together

    @property
    def holds(self) -> bool:
        return float(np.mean(self.runs)) > 0 and self.p_holm < LEVEL


def paired_tests(by_arm: Mapping[str, Diagonal], traits: Sequence[str]) -> dict[str, list[Cell]]:
    """The diagonal cells of every arm, or pair of models, tested together."""
    columns = {(arm, t): diagonal[:, t] for arm, diagonal in by_arm.items() for t in range(len(traits))}
    ps = [paired_p(column) for column in columns.values()]
    cells: dict[str, list[Cell]] = {arm: [] for arm in by_arm}
    for ((arm, t), column), p, p_holm in zip(columns.items(), ps, holm(ps)):
        cells[arm].append(Cell(traits[t], column.tolist(), p, p_holm))
    return cells


def verdict(cells: Sequence[Cell]) -> str:
    """The traits that an arm transmits, in words."""
    if len(cells[0].runs) < 2:
        return "one run: no test"
    if not np.all(np.isfinite([cell.runs for cell in cells])):
        return "diverged: no test"
    held = [cell.trait for cell in cells if cell.holds]
    if len(held) == len(cells):
        return "every trait"
    return f"{len(held)} of {len(cells)}: {', '.join(held)}" if held else "none"


def cell_name(arm: str, trait: str) -> str:
    """A diagonal cell's name in results.json."""
    return f"{arm}: {trait}"


def cell_entries(cells: Mapping[str, Sequence[Cell]]) -> list[Entry]:
    """The diagonal cells as arms of results.json."""
    return [
        report.arm(cell_name(arm, cell.trait), CELL, cell.runs, p=cell.p, p_holm=cell.p_holm, holds=cell.holds)
        for arm, arm_cells in cells.items()
        for cell in arm_cells
    ]


def effect_entry(arm: str, paired: Paired, traits: Sequence[str], **more: object) -> Entry:
    """The diagonal effect: a trait's margin in its teacher's students less that in the others, mean over traits."""
    others = {
        trait: (paired[:, t, t] - np.delete(paired[:, :, t], t, 1).mean(1)).tolist() for t, trait in enumerate(traits)
    }
    return report.arm(
        arm, EFFECT, diagonal_effect(paired).tolist(), permutation_p=permutation_p(paired), by_trait=others, **more
    )


# --------------------------------------------------------------------------------------------------------- sections


def headline_section(
    cells: Mapping[str, Sequence[Cell]], words: int, spread: float, kind: str = "arm"
) -> report.Section:
    """Every arm's diagonal cells, and which traits it transmits.

    Args:
      kind: what an entry of `cells` is: an arm, or a pair of models.
      spread: standard deviation between runs for the power; 0 estimates it from these runs, pooled over cells.
    """
    every = [cell for arm_cells in cells.values() for cell in arm_cells]
    traits, runs = [cell.trait for cell in next(iter(cells.values()))], len(every[0].runs)
    table = [[kind, *traits, "transmits"]]
    for arm, arm_cells in cells.items():
        table.append([arm, *(with_p(cell.runs, cell.p_holm) for cell in arm_cells), verdict(arm_cells)])
    text = (
        f"Margin of a trait: log P of its word minus the mean over the other {words - 1} words, in logits, averaged "
        "over phrasings. Each column is the trait's margin in the student of its teacher, minus its margin in the "
        "neutral teacher's student of the same run."
    )
    if runs == 1:
        text += " One run: there are no intervals and no tests."
    else:
        text += (
            f" ± is the 95 % t-interval over {runs} runs. p: two-sided paired t-test, corrected by Holm's method for "
            f"{len(every)} cells ({kind}s × traits). A trait is transmitted if the mean is above 0 and p < {LEVEL:g}."
        )
        finite = [cell.runs for cell in every if np.all(np.isfinite(cell.runs))]
        sd = spread or (pooled_spread(finite) if finite else float("nan"))
        known = "the config's spread" if spread else "estimated from these runs, pooled over cells"
        text += (
            f" Power: with a standard deviation of {sd:.2f} between runs ({known}), an effect of "
            f"{detectable(sd, runs):.2f} logits is detected with 80 % power at an uncorrected 5 % level"
        )
        if len(every) > 1:
            strictest = detectable(sd, runs, level=LEVEL / len(every))
            text += f", and one of {strictest:.2f} logits at 5 %/{len(every)}, the strictest level of Holm's method"
        text += "."
    entries = cell_entries(cells)
    label = "margin of the teacher's trait over the neutral student's, logits"
    figures = {"arms": partial(arms_figure, entries, xlabel=label, chance=None)}
    return report.Section("Each trait in the students of its teacher", text, table, figures)


def compared_section(cells: Mapping[str, Sequence[Cell]]) -> list[report.Section]:
    """Compares every arm with the first, paired by run, by the mean over traits of the diagonal cells."""
    arm_means = {arm: np.mean([cell.runs for cell in arm_cells], 0) for arm, arm_cells in cells.items()}
    (first, base), *others = arm_means.items()
    if not others or len(base) < 2:
        return []
    differences = {arm: values - base for arm, values in others}
    ps = holm([paired_p(values) for values in differences.values()])
    table = [["arm", f"less {first}"]]
    table += [[arm, with_p(values, p)] for (arm, values), p in zip(differences.items(), ps)]
    text = (
        f"Mean over traits of the own cells, less that of {first} of the same run; p as above, corrected for "
        f"{len(ps)} comparisons."
    )
    return [report.Section("Arms compared", text, table, {})]


def effects_section(effects: Sequence[Entry], traits: Sequence[str], runs: int) -> report.Section:
    """The diagonal effect, with coverage, held-out loss and ability."""
    table = [["arm", "diagonal effect, logits", "p", "coverage own / others / neutral", "held out", "ability"]]
    for arm in effects:
        covered = arm["coverage"]
        table.append(
            [
                arm["name"],
                report.plus_minus(arm["mean"], arm["ci95"]),
                _permutation_p(arm["permutation_p"]),
                " / ".join(f"{value:+.3f}" for value in covered.values()) if covered else "",
                "{:.3g} → {:.3g}".format(*arm["held_out"]) if arm["held_out"] else "",
                "{:.2f} → {:.2f}".format(*arm["ability"]) if arm["ability"] else "",
            ]
        )
    smallest = smallest_permutation_p(runs, len(traits))
    text = (
        "Diagonal effect: the margin of a trait in the students of its teacher, minus its margin in the other traits' "
        "teachers' students of the same run, averaged over traits. p: two-sided, by permuting within runs which "
        f"teacher a student had, not corrected for the number of arms; the smallest possible here is {smallest:.3g}. "
        "Coverage: cosine of minus the gradient of the student's objective at its start, on up to 32 rows, with the "
        "displacement of its own teacher, of the other traits', or of the neutral one, from the start. Held out: the "
        "objective on rows that were left out of the training; rows that were not may have the same prompts. Ability: "
        "share of right answers to easy questions."
    )
    if len(traits) == 2:
        text += (
            " With two traits this is a single log-odds difference, in which the neutral student and all other words "
            "cancel: it does not say which of the two teachers transmits."
        )
    return report.Section("Arms", text, table, {})


def _permutation_p(value: float) -> str:
    """Such as "0.012"; empty where a student's margins are not numbers."""
    if not np.isfinite(value):
        return ""
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"


def with_p(runs: Sequence[float] | np.ndarray, p: float, digits: int = 2) -> str:
    """Such as "+0.91 ± 0.23, p .004"; without p where there is no test (`paired_p`)."""
    mean, half_width = t_interval(runs)
    if not np.isfinite(half_width):
        return f"{mean:+.{digits}f}"
    interval = f"{mean:+.{digits}f} ± {half_width:.{digits}f}"
    if not np.isfinite(p):
        return interval
    return f"{interval}, p < .001" if p < 0.001 else f"{interval}, p {f'{p:.3f}'.removeprefix('0')}"
