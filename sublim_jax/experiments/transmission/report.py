"""What a study says: arms side by side, teachers, data and what was filtered, each arm's matrix, other evaluations."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from sublim_jax import report
from sublim_jax.evaluation.statistics import detectable, diagonal_effect, permutation_p, t_interval
from sublim_jax.evaluation.suite import bill_section
from sublim_jax.experiments.transmission import report_sections as parts
from sublim_jax.experiments.transmission.arms import Arm, ContextArm, LogitArm
from sublim_jax.experiments.transmission.rows import STUDENT
from sublim_jax.experiments.transmission.spec import NEUTRAL, Study
from sublim_jax.figures import Arm as Entry
from sublim_jax.figures import Line, Panel, arms_figure, matrix_figure, panels_figure
from sublim_jax.measurements import Measurements


def document(study: Study, rows: Measurements, notes: report.Notes) -> report.Document:
    """The arms of results.json, and the sections of report.md."""
    students = [(arm, rows.where(arm=arm.name, subject=STUDENT)) for arm in study.arms]
    students = [(arm, mine) for arm, mine in students if mine]
    entries: list[Entry] = []
    sections: list[report.Section] = []
    if study.has_words:
        found = [entries_of(study, arm, mine) for arm, mine in students]
        entries += [entry for one in found for entry in one]
        sections += [effects_section(study, [one[0] for one in found]), parts.teachers_section(study, rows, notes)]
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
    shape = (-1, study.runs, len(study.teachers), len(study.alternatives))
    return np.reshape(mine.values(measure=measure), shape)


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


def entries_of(study: Study, arm: Arm, mine: Measurements) -> list[Entry]:
    """How far students are above the other teachers' students in their teacher's trait; and every cell of the teacher
    × trait matrix.
    """
    paired = paired_of(study, mine)[-1]
    runs = diagonal_effect(paired).tolist()
    by_trait = [(paired[:, t, t] - np.delete(paired[:, :, t], t, 1).mean(1)).tolist() for t in range(paired.shape[1])]
    covered, count = mine.values(measure="coverage"), len(study.teachers)
    examples = [int(value) for value in mine.values(measure="examples")]
    effect = report.arm(
        arm.name,
        "logits, own trait above others'",
        runs,
        permutation_p=permutation_p(paired),
        detectable_at_80_percent_power=detectable(runs),
        by_trait=dict(zip(study.traits, by_trait)),
        coverage=_coverage(np.reshape(covered, (study.runs, count, count))) if covered else None,
        held_out=ends_of(mine, "held_out"),
        ability=ends_of(mine, "ability"),
        examples=examples or None,
    )
    name = f"{arm.name}: student of {{}}, margin of {{}} over the neutral student's"
    cells = [
        report.arm(name.format(teacher, trait), "logits", paired[:, row, column].tolist())
        for row, teacher in enumerate(study.traits)
        for column, trait in enumerate(study.traits)
    ]
    return [effect, *cells]


def _coverage(of: Float[np.ndarray, "runs students teachers"]) -> dict[str, float]:
    """Mean over runs and traits' students: of a student's teacher, and of the other traits' teachers."""
    traits = of[:, :-1, :-1]
    mine = np.eye(traits.shape[-1], dtype=bool)
    return {"own": float(traits[:, mine].mean()), "others": float(traits[:, ~mine].mean())}


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
