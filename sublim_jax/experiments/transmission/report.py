"""What a study says: arms side by side, teachers, data and what was filtered, each arm's matrix, other evaluations."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from sublim_jax import report
from sublim_jax.evaluation.statistics import t_interval
from sublim_jax.evaluation.suite import bill_section
from sublim_jax.experiments.transmission import effects
from sublim_jax.experiments.transmission import report_sections as parts
from sublim_jax.experiments.transmission.arms import Arm, ContextArm, LogitArm
from sublim_jax.experiments.transmission.rows import STUDENT
from sublim_jax.experiments.transmission.spec import NEUTRAL, Study
from sublim_jax.figures import Arm as Entry
from sublim_jax.figures import Line, Panel, matrix_figure, panels_figure
from sublim_jax.measurements import Measurements


def document(study: Study, rows: Measurements, notes: report.Notes) -> report.Document:
    """The arms of results.json, and the sections of report.md."""
    students = [(arm, rows.where(arm=arm.name, subject=STUDENT)) for arm in study.arms]
    students = [(arm, mine) for arm, mine in students if mine]
    entries: list[Entry] = []
    sections: list[report.Section] = []
    if waiting := [arm.name for arm in study.arms[len(students) :]]:
        text = f"{len(students)} of {len(study.arms)} arms so far; still to come: {', '.join(waiting)}."
        sections.append(report.Section("Not finished", text, [], {}))
    if study.has_words and students:
        cells = effects.own_cells({arm.name: paired_of(study, mine)[-1] for arm, mine in students}, study.traits)
        found = [effect_of(study, arm, mine) for arm, mine in students]
        entries += effects.cell_entries(cells) + found
        entries += [cell for arm, mine in students for cell in matrix_of(study, arm, mine)]
        sections += [effects.headline_section(cells, len(study.alternatives), study.spread)]
        sections += effects.compared_section(cells)
        sections += [effects.effects_section(found, study.traits, study.runs)]
        sections += [parts.teachers_section(study, rows, notes)]
    else:
        sections.append(learnt_section(students))
    if "corpus" in study.teacher.methods:
        sections.append(parts.corpora_section(study, rows))
    for name in study.evals.names:
        each = parts.evaluated(study, name, rows)
        entries += each
        sections.append(parts.evaluation_section(study, name, each))
    if rows.where(measure="completions"):
        sections.append(parts.filter_section(study, rows))
    if study.filter.judge:
        sections.append(parts.judge_section(study, rows))
    sections += bill_section(notes["bill"])
    if study.has_words:
        sections += [arm_section(study, arm, mine) for arm, mine in students]
    return entries, [*sections, parts.samples_section(study, notes)]


def by_word(study: Study, mine: Measurements, measure: str) -> Float[np.ndarray, "points runs students words"]:
    """A preference's measure of an arm's students along training."""
    # Students whose base is their run's own were measured run by run.
    in_order = sorted(mine.where(measure=measure), key=lambda row: (row.step, row.run))
    shape = (-1, study.runs, len(study.teachers), len(study.alternatives))
    return np.reshape([row.value for row in in_order], shape)


def paired_of(study: Study, mine: Measurements) -> Float[np.ndarray, "points runs traits traits"]:
    """Margins of the traits over those of the neutral teacher's student of the same run: by teacher, by trait."""
    margins = by_word(study, mine, "margin")[..., [study.alternatives.index(trait) for trait in study.traits]]
    neutral = study.teachers.index(NEUTRAL)  # the last
    return margins[:, :, :neutral] - margins[:, :, [neutral]]


def ends_of(mine: Measurements, measure: str) -> list[float] | None:
    """Means over students before training and after it."""
    mine = mine.where(measure=measure, item="")
    steps = sorted(mine.names("step"))
    return [float(np.mean(mine.values(step=step))) for step in (steps[0], steps[-1])] if steps else None


def effect_of(study: Study, arm: Arm, mine: Measurements) -> Entry:
    """How far students are above the other teachers' students in their teacher's trait, and what else they are."""
    covered, count = mine.values(measure="coverage"), len(study.teachers)
    return effects.effect_entry(
        arm.name,
        paired_of(study, mine)[-1],
        study.traits,
        coverage=_coverage(np.reshape(covered, (study.runs, count, count))) if covered else None,
        held_out=ends_of(mine, "held_out"),
        ability=ends_of(mine, "ability"),
        examples=[int(value) for value in mine.values(measure="examples")] or None,
    )


def matrix_of(study: Study, arm: Arm, mine: Measurements) -> list[Entry]:
    """Every cell of the teacher × trait matrix."""
    paired = paired_of(study, mine)[-1]
    name = f"{arm.name}: student of {{}}, margin of {{}} over the neutral student's"
    return [
        report.arm(name.format(teacher, trait), "logits", paired[:, row, column].tolist())
        for row, teacher in enumerate(study.traits)
        for column, trait in enumerate(study.traits)
    ]


def _coverage(of: Float[np.ndarray, "runs students teachers"]) -> dict[str, float]:
    """Mean over runs and traits' students: of a student's teacher, and of the other traits' teachers."""
    traits = of[:, :-1, :-1]
    mine = np.eye(traits.shape[-1], dtype=bool)
    return {"own": float(traits[:, mine].mean()), "others": float(traits[:, ~mine].mean())}


def learnt_section(students: Sequence[tuple[Arm, Measurements]]) -> report.Section:
    """Whether students have learnt to imitate at all, where no preference can be measured."""
    table = [["arm", "held out", "ability"]]
    for arm, mine in students:
        ends = [ends_of(mine, measure) or [np.nan, np.nan] for measure in ("held_out", "ability")]
        table.append([f"{arm.name}: {describe(arm)}", *("{:.3g} → {:.3g}".format(*pair) for pair in ends)])
    text = "Held out: the objective on rows never trained on. Ability: right answers to easy questions."
    return report.Section("Arms", text, table, {})


def arm_section(study: Study, arm: Arm, mine: Measurements) -> report.Section:
    """The matrix of paired differences, and margins along training where there is some."""
    traits = list(study.traits)
    columns = [study.alternatives.index(trait) for trait in traits]
    paired = paired_of(study, mine)
    margins, share = (by_word(study, mine, measure).mean(1)[..., columns] for measure in ("margin", "share"))
    head = ["student of", *[f"margin of {trait} (over neutral)" for trait in traits]]
    table = [[*head, *[f"P({trait} of {len(study.alternatives)})" for trait in traits]]]
    for row, teacher in enumerate(study.teachers):
        over = ["0"] * len(traits)
        if teacher != NEUTRAL:
            over = [report.plus_minus(*t_interval(column)) for column in paired[-1, :, row].T]
        table.append([teacher, *over, *(f"{one[0]:.3f} → {one[-1]:.3f}" for one in share[:, row].T)])
    figures = {f"matrix-{arm.name}": partial(matrix_figure, paired[-1].mean(0), traits, traits)}
    steps = sorted(mine.where(measure="margin").names("step"))
    if len(steps) > 1:
        panels = []
        for trait, values in zip(traits, np.moveaxis(margins, -1, 0)):
            lines = [Line(f"student of {who}", steps, column) for who, column in zip(study.teachers, values.T)]
            panels.append(Panel("updates of the student", f"margin of {trait}, logits", lines, title=trait))
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
