"""What a study says: arms side by side, teachers, data and what was filtered, each arm's matrix, other evaluations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from sublim_jax import report
from sublim_jax.evaluation.statistics import detectable, diagonal_effect, permutation_p, t_interval
from sublim_jax.evaluation.suite import bill_section
from sublim_jax.experiments.transmission import report_data
from sublim_jax.experiments.transmission.arms import Arm, ContextArm, LogitArm
from sublim_jax.experiments.transmission.report_evaluations import evaluated, evaluation_section
from sublim_jax.experiments.transmission.rows import STUDENT
from sublim_jax.experiments.transmission.spec import NEUTRAL, Study
from sublim_jax.figures import Arm as Entry
from sublim_jax.figures import Line, Panel, arms_figure, matrix_figure, panels_figure
from sublim_jax.measurements import Measurements

ByWord = Float[np.ndarray, "points runs students words"]


def document(study: Study, rows: Measurements, notes: report.Notes) -> report.Document:
    """The arms of results.json, and the sections of report.md."""
    arms = [arm for arm in study.arms if rows.where(arm=arm.name)]
    entries: list[Entry] = []
    sections: list[report.Section] = []
    if study.has_words:
        effects = [effect_of(study, arm, rows) for arm in arms]
        for effect, arm in zip(effects, arms):
            entries += [effect, *cells_of(study, arm, rows)]
        sections += [effects_section(study, effects), report_data.teachers_section(study, rows, notes)]
    else:
        sections.append(learnt_section(study, arms, rows))
    if "corpus" in study.teacher.methods:
        sections.append(report_data.corpora_section(study, rows))
    for name in study.evals.names:
        found = evaluated(study, name, rows)
        entries += found
        sections.append(evaluation_section(study, name, found))
    if rows.where(measure="completions"):
        sections.append(report_data.filter_section(study, rows))
    if study.filter.judge:
        sections.append(report_data.judge_section(study, rows))
    sections += bill_section(notes["bill"])
    if study.has_words:
        sections += [arm_section(study, arm, rows) for arm in arms]
    return entries, [*sections, report_data.samples_section(study, notes)]


def steps_of(arm: Arm, rows: Measurements) -> list[int]:
    """The steps at which an arm's students were measured."""
    return sorted(set(rows.names("step", arm=arm.name, subject=STUDENT, measure="held_out"))) or [0]


def by_word(study: Study, arm: Arm, rows: Measurements, measure: str) -> ByWord:
    """A preference's measure of an arm's students along training."""
    values = rows.values(arm=arm.name, subject=STUDENT, measure=measure)
    return np.reshape(values, (-1, study.runs, len(study.teachers), len(study.alternatives)))


def paired_of(study: Study, arm: Arm, rows: Measurements) -> Float[np.ndarray, "points runs traits traits"]:
    """Margins of the traits over those of the neutral teacher's student of the same run: by teacher, by trait."""
    margins = by_word(study, arm, rows, "margin")
    columns = [study.alternatives.index(trait) for trait in study.traits]
    neutral = study.teachers.index(NEUTRAL)
    trained = [study.teachers.index(trait) for trait in study.traits]
    return (margins - margins[:, :, [neutral]])[:, :, trained][..., columns]


# ----------------------------------------------------------------------------------------------------------- arms


def effect_of(study: Study, arm: Arm, rows: Measurements) -> Entry:
    """How far students are above the other teachers' students in their teacher's trait, over runs."""
    paired = paired_of(study, arm, rows)[-1]
    runs = diagonal_effect(paired).tolist()
    by_trait = [(paired[:, t, t] - np.delete(paired[:, :, t], t, 1).mean(1)).tolist() for t in range(paired.shape[1])]
    examples = rows.values(arm=arm.name, measure="examples")
    return report.arm(
        arm.name,
        "logits, own trait above others'",
        runs,
        permutation_p=permutation_p(paired),
        detectable_at_80_percent_power=detectable(runs),
        by_trait=dict(zip(study.traits, by_trait)),
        coverage=coverage_of(study, arm, rows),
        held_out=ends_of(arm, rows, "held_out"),
        ability=ends_of(arm, rows, "ability"),
        examples=[int(count) for count in examples] or None,
    )


def ends_of(arm: Arm, rows: Measurements, measure: str) -> list[float] | None:
    """Means over students before training and after it."""
    found = [
        rows.values(arm=arm.name, subject=STUDENT, measure=measure, step=step)
        for step in (steps_of(arm, rows)[0], steps_of(arm, rows)[-1])
    ]
    return [float(np.mean(values)) for values in found] if all(found) else None


def coverage_of(study: Study, arm: Arm, rows: Measurements) -> dict[str, float] | None:
    """Mean over runs and traits' students: of a student's teacher, and of the other traits' teachers."""
    values = rows.values(arm=arm.name, measure="coverage")
    if not values:
        return None
    count = len(study.teachers)
    traits = np.reshape(values, (study.runs, count, count))[:, :-1, :-1]
    mine = np.eye(traits.shape[-1], dtype=bool)
    return {"own": float(traits[:, mine].mean()), "others": float(traits[:, ~mine].mean())}


def cells_of(study: Study, arm: Arm, rows: Measurements) -> list[Entry]:
    """The teacher × trait matrix: every cell with every run's value."""
    paired = paired_of(study, arm, rows)[-1]
    return [
        report.arm(
            f"{arm.name}: student of {teacher}, margin of {trait} over the neutral student's",
            "logits",
            paired[:, row, column].tolist(),
        )
        for row, teacher in enumerate(study.traits)
        for column, trait in enumerate(study.traits)
    ]


def effects_section(study: Study, effects: list[Entry]) -> report.Section:
    """Arms side by side."""
    table = [["arm", "own above others', logits", "p", "detectable", "coverage own / others", "held out", "ability"]]
    for arm in effects:
        covered = arm["coverage"]
        table.append(
            [
                arm["name"],
                report.plus_minus(arm["mean"], arm["ci95"]),
                f"{arm['permutation_p']:.3f}",
                f"{arm['detectable_at_80_percent_power']:.2f}" if study.runs > 1 else "",
                f"{covered['own']:+.3f} / {covered['others']:+.3f}" if covered else "",
                "{:.3g} → {:.3g}".format(*arm["held_out"]) if arm["held_out"] else "",
                "{:.2f} → {:.2f}".format(*arm["ability"]) if arm["ability"] else "",
            ]
        )
    smallest = float(np.prod(np.arange(1, len(study.traits) + 1)) ** -float(study.runs))
    text = (
        "Margin of a trait: log P of its word less the mean of the other "
        f"{len(study.alternatives) - 1} words, mean over phrasings. Own above others': of the students of a trait's "
        "teacher, less that of the other traits' teachers' students of the same run, mean over traits; ± is the 95 % "
        f"t-interval over {study.runs} run(s). p: exchanging, within runs, which teacher a student had; the smallest "
        f"possible here is {smallest:.3g}. Detectable: the mean that a t-test over so many runs of this spread detects "
        "with 80 % power. Coverage: cosine of the first update with the teacher's way from the start, before "
        "training. Held out: the objective on rows never trained on. Ability: right answers to easy questions."
    )
    label = "margin of the own teacher's trait above others', logits"
    return report.Section("Arms", text, table, {"arms": partial(arms_figure, effects, xlabel=label, chance=None)})


def learnt_section(study: Study, arms: list[Arm], rows: Measurements) -> report.Section:
    """Whether students have learnt to imitate at all, where no preference can be measured."""
    table = [["arm", "held out", "ability"]]
    for arm in arms:
        ends = [ends_of(arm, rows, measure) or [np.nan, np.nan] for measure in ("held_out", "ability")]
        table.append([f"{arm.name}: {describe(arm)}", *("{:.3g} → {:.3g}".format(*pair) for pair in ends)])
    text = "Held out: the objective on rows never trained on. Ability: right answers to easy questions."
    return report.Section("Arms", text, table, {})


def arm_section(study: Study, arm: Arm, rows: Measurements) -> report.Section:
    """The matrix of paired differences, and margins along training where there is some."""
    words, traits = study.alternatives, list(study.traits)
    columns = [words.index(trait) for trait in traits]
    paired, share = paired_of(study, arm, rows), by_word(study, arm, rows, "share").mean(1)
    head = ["student of", *[f"margin of {trait} (over neutral)" for trait in traits]]
    head += [f"P({trait} of {len(words)})" for trait in traits]
    table = [head]
    for row, teacher in enumerate(study.teachers):
        cells = [teacher]
        for column in range(len(traits)):
            cells.append("0" if teacher == NEUTRAL else report.plus_minus(*t_interval(paired[-1, :, row, column])))
        cells += [f"{share[0][row, column]:.3f} → {share[-1][row, column]:.3f}" for column in columns]
        table.append(cells)
    figures: dict[str, Callable[[Any], None]] = {
        f"matrix-{arm.name}": partial(matrix_figure, paired[-1].mean(0), traits, traits)
    }
    if len(steps := steps_of(arm, rows)) > 1:
        margins = by_word(study, arm, rows, "margin").mean(1)
        panels = [
            Panel(
                "updates of the student",
                f"margin of {trait}, logits",
                [
                    Line(f"student of {teacher}", steps, margins[:, row, column])
                    for row, teacher in enumerate(study.teachers)
                ],
                title=trait,
            )
            for trait, column in zip(traits, columns)
        ]
        figures[f"margins-{arm.name}"] = partial(panels_figure, panels)
    return report.Section(f"Students: {arm.name}", f"{describe(arm)}; {study.runs} run(s).", table, figures)


def describe(arm: Arm) -> str:
    """An arm in words."""
    written = "what the teacher wrote" if arm.data == "written" else "random numbers"
    if isinstance(arm, ContextArm):
        return f"Not trained: {arm.num_examples} rows of {written} in the context, or as many as it holds"
    if isinstance(arm, LogitArm):
        direction = "KL(teacher ‖ student)" if arm.objective == "kl" else "KL(student ‖ teacher)"
        words = [f"{direction} over digits, commas and spaces, on {written}"]
        if arm.temperature != 1:
            words.append(f"temperature {arm.temperature}")
    else:
        words = [f"Trained on the tokens of {written}"]
    words.append({"shared": "the teacher's A", "fresh": "another A for every run"}[arm.lora_init])
    if arm.shuffle:
        words.append(f"numbers shuffled {arm.shuffle} answers")
    if arm.noise:
        words.append(f"noise of {arm.noise} of their spread on the student's base weights")
    if arm.model:
        words.append(f"students are {arm.model}")
    if chosen := arm.selection:
        words.append(f"{chosen.positions} {chosen.fraction:.0%} of tokens by {chosen.score}: {chosen.action}")
    return "; ".join(words)
