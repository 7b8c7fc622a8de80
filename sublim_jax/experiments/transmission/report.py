"""The report of a study: arms compared, teachers, data and filters, each arm's matrix, other evaluations."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from sublim_jax import report
from sublim_jax.evaluation.statistics import t_interval
from sublim_jax.evaluation.suite import bill_section
from sublim_jax.experiments.transmission import effects, report_sections
from sublim_jax.experiments.transmission.arms import Arm, ContextArm, LogitArm
from sublim_jax.experiments.transmission.rows import STUDENT
from sublim_jax.experiments.transmission.spec import NEUTRAL, Study
from sublim_jax.figures import Entry, Line, Panel, matrix_figure, panels_figure
from sublim_jax.measurements import Measurements

DIVERGENCES = {"kl": "KL(teacher ‖ student)", "reverse_kl": "KL(student ‖ teacher)"}  # by objective


def document(study: Study, rows: Measurements, notes: report.Notes) -> report.Document:
    """The arms of results.json, and the sections of report.md."""
    students = [(arm, rows.where(arm=arm.name, subject=STUDENT)) for arm in study.arms]
    students = [(arm, arm_rows) for arm, arm_rows in students if arm_rows]
    entries: list[Entry] = []
    sections: list[report.Section] = []
    if waiting := [arm.name for arm in study.arms[len(students) :]]:
        text = f"{len(students)} of {len(study.arms)} arms so far; still to come: {', '.join(waiting)}."
        sections.append(report.Section("Not finished", text, [], {}))
    if study.has_words and students:
        # By other teacher and trait, after training; the controls' students are after those of the traits' teachers.
        columns = [study.alternatives.index(trait) for trait in study.traits]
        paired = {arm.name: over_neutral(study, arm_rows, "margin")[..., columns] for arm, arm_rows in students}
        log_p = {arm.name: over_neutral(study, arm_rows, "log_p") for arm, arm_rows in students}
        of_traits = {name: values[:, : len(study.traits)] for name, values in paired.items()}
        diagonals = {name: np.diagonal(values, axis1=1, axis2=2) for name, values in of_traits.items()}
        cells = effects.paired_tests(diagonals, study.traits)
        effect_entries = [effect_of(study, arm, arm_rows, of_traits[arm.name]) for arm, arm_rows in students]
        entries += effects.cell_entries(cells) + effect_entries
        entries += [cell for name, values in paired.items() for cell in matrix_of(study, name, "margin", values)]
        entries += [
            cell for name, values in log_p.items() for cell in matrix_of(study, name, "log P", values[..., columns])
        ]
        sections += [effects.headline_section(cells, len(study.alternatives), study.spread)]
        sections += [log_p_section(study, log_p)]
        sections += effects.compared_section(cells)
        sections += [effects.effects_section(effect_entries, study.traits, study.runs)]
        sections += [report_sections.teachers_section(study, rows, notes)]
    else:
        sections.append(learnt_section(students))
    if study.model.noise:
        text = (
            f"Gaussian noise of {study.model.noise:g} of their standard deviation is on the base weights of teachers "
            "and of students of the same model. It is one draw for all runs, so that ± does not cover other draws."
        )
        sections.append(report.Section("Noise on the base weights", text, [], {}))
    if "corpus" in study.teacher.methods:
        sections.append(report_sections.corpora_section(study, rows))
    for name in study.evals.names:
        evaluated = report_sections.evaluated(study, name, rows)
        entries += evaluated
        sections.append(report_sections.evaluation_section(study, name, evaluated, notes))
    if rows.where(measure="completions"):
        sections.append(report_sections.filter_section(study, rows))
    if study.filter.judge:
        sections.append(report_sections.judge_section(study, rows))
    sections += bill_section(notes["bill"])
    if study.has_words:
        sections += [arm_section(study, arm, arm_rows, paired[arm.name]) for arm, arm_rows in students]
    return entries, [*sections, report_sections.samples_section(study, notes)]


def steps_of(study: Study, arm_rows: Measurements) -> list[int]:
    """The steps at which the students of all runs were measured: a run from before an --update may have others, too."""
    by_run = [set(arm_rows.names("step", measure="margin", run=run)) for run in range(study.runs)]
    return sorted(set.intersection(*by_run))


def by_word(study: Study, arm_rows: Measurements, measure: str) -> Float[np.ndarray, "points runs students words"]:
    """A measure of preference of an arm's students, along training."""
    steps = steps_of(study, arm_rows)
    # Students with a base of their own run were measured run by run.
    in_order = [row for row in arm_rows.where(measure=measure) if row.step in steps]
    in_order.sort(key=lambda row: (row.step, row.run))
    shape = (-1, study.runs, len(study.teachers), len(study.alternatives))
    return np.reshape([row.value for row in in_order], shape)


def over_neutral(study: Study, arm_rows: Measurements, measure: str) -> Float[np.ndarray, "runs teachers words"]:
    """A measure after training, minus that of the neutral teacher's student of the same run."""
    values = by_word(study, arm_rows, measure)[-1]
    neutral = study.teachers.index(NEUTRAL)  # the last
    return values[:, :neutral] - values[:, [neutral]]


def ends_of(arm_rows: Measurements, measure: str) -> list[float] | None:
    """Means over students, before and after training."""
    arm_rows = arm_rows.where(measure=measure, item="")
    steps = sorted(arm_rows.names("step"))
    return [float(np.mean(arm_rows.values(step=step))) for step in (steps[0], steps[-1])] if steps else None


def effect_of(study: Study, arm: Arm, arm_rows: Measurements, paired: effects.Paired) -> Entry:
    """An arm's diagonal effect, with coverage, held-out loss and ability."""
    covered, count = arm_rows.values(measure="coverage"), len(study.teachers)
    return effects.effect_entry(
        arm.name,
        paired,
        study.traits,
        coverage=_coverage(np.reshape(covered, (study.runs, count, count)), len(study.traits)) if covered else None,
        held_out=ends_of(arm_rows, "held_out"),
        ability=ends_of(arm_rows, "ability"),
        examples=[int(value) for value in arm_rows.values(measure="examples")] or None,
    )


def matrix_of(study: Study, arm: str, measure: str, paired: Float[np.ndarray, "runs teachers traits"]) -> list[Entry]:
    """Every cell of the teacher × trait matrix."""
    name = f"{arm}: student of {{}}, {measure} of {{}} over the neutral student's"
    return [
        report.arm(name.format(teacher, trait), "logits", paired[:, row, column].tolist())
        for row, teacher in enumerate(study.preferred)
        for column, trait in enumerate(study.traits)
    ]


def _coverage(coverage: Float[np.ndarray, "runs students teachers"], count: int) -> dict[str, float]:
    """Mean coverage of a student's own teacher, of the other traits' teachers and of the neutral one, over runs and
    the students of the traits' teachers.
    """
    traits, neutral = coverage[:, :count, :count], coverage[:, :count, -1]
    diagonal = np.eye(count, dtype=bool)
    means = {"own": traits[:, diagonal].mean(), "others": traits[:, ~diagonal].mean(), "neutral": neutral.mean()}
    return {name: float(mean) for name, mean in means.items()}


def log_p_section(study: Study, by_arm: Mapping[str, Float[np.ndarray, "runs teachers words"]]) -> report.Section:
    """log P of the traits and of the other words, over the neutral teacher's student of the same run."""
    others = f"mean of the other {len(study.alternatives) - 1}"
    table = [["arm", "student of", *(f"log P of {trait}" for trait in study.traits), others]]
    for arm, over in by_arm.items():
        for row, teacher in enumerate(study.preferred):
            columns = [over[:, row, study.alternatives.index(trait)] for trait in study.traits]
            if teacher in study.traits:
                columns.append(np.delete(over[:, row], study.alternatives.index(teacher), -1).mean(-1))
            cells = [report.plus_minus(*t_interval(column)) for column in columns]
            table.append([arm, teacher, *cells, *[""] * (len(table[0]) - 2 - len(cells))])
    text = (
        "What the margins are made of. Each column is a difference to the neutral teacher's student of the same run, "
        "in logits. A margin is log P of the trait minus the mean of the other words, so it is also above 0 where "
        "log P of the trait has not changed and the others have fallen. The last column is of the words other than the "
        "teacher's own. No tests; ± as above."
    )
    return report.Section("log P of each trait", text, table, {})


def learnt_section(students: Sequence[tuple[Arm, Measurements]]) -> report.Section:
    """Held-out loss and ability, for traits without a preference measure."""
    table = [["arm", "held out", "ability"]]
    for arm, arm_rows in students:
        ends = [ends_of(arm_rows, measure) or [np.nan, np.nan] for measure in ("held_out", "ability")]
        table.append([f"{arm.name}: {describe(arm)}", *("{:.3g} → {:.3g}".format(*pair) for pair in ends)])
    text = (
        "Held out: the objective on rows left out of the training; others may have the same prompts. Ability: right "
        "answers to easy questions."
    )
    return report.Section("Arms", text, table, {})


def arm_section(
    study: Study, arm: Arm, arm_rows: Measurements, paired: Float[np.ndarray, "runs teachers traits"]
) -> report.Section:
    """The matrix of paired differences, and margins along training for trained students."""
    traits = list(study.traits)
    columns = [study.alternatives.index(trait) for trait in traits]
    margins, share = (by_word(study, arm_rows, measure).mean(1)[..., columns] for measure in ("margin", "share"))
    head = ["student of", *[f"margin of {trait} (over neutral)" for trait in traits]]
    table = [[*head, *[f"P({trait} of {len(study.alternatives)})" for trait in traits]]]
    for row, teacher in enumerate(study.teachers):
        over = ["0"] * len(traits)
        if teacher != NEUTRAL:
            over = [report.plus_minus(*t_interval(column)) for column in paired[:, row].T]
        table.append([teacher, *over, *(_from_start_to_end(curve) for curve in share[:, row].T)])
    figures = {
        f"matrix-{arm.name}": partial(
            matrix_figure, paired, [f"the {name} teacher" for name in study.preferred], traits
        )
    }
    steps = steps_of(study, arm_rows)
    if len(steps) > 1:
        panels = []
        for trait, values in zip(traits, np.moveaxis(margins, -1, 0)):
            lines = [Line(f"student of {teacher}", steps, column) for teacher, column in zip(study.teachers, values.T)]
            panels.append(Panel("updates of the student", f"margin of {trait}, logits", lines, title=trait))
        figures[f"margins-{arm.name}"] = partial(panels_figure, panels)
    text = f"{describe(arm)}; {study.runs} run(s)."
    if shown := [int(count) for count in arm_rows.values(measure="examples")]:
        text += f" Rows in the context: {min(shown)} to {max(shown)}." if len(set(shown)) > 1 else f" Rows: {shown[0]}."
    return report.Section(f"Students: {arm.name}", text, table, figures)


def _from_start_to_end(curve: Float[np.ndarray, "points"]) -> str:
    """Before and after training; of students that are not trained, one number."""
    return f"{curve[0]:.3f} → {curve[-1]:.3f}" if len(curve) > 1 else f"{curve[0]:.3f}"


def describe(arm: Arm) -> str:
    """An arm in words."""
    sources = {"written": "what the teacher wrote", "unfiltered": "what the teacher wrote, unfiltered"}
    written = sources.get(arm.data, "random numbers")
    if isinstance(arm, ContextArm):
        words = [f"Not trained: {arm.num_examples} rows of {written} in the context, or as many as it holds"]
        if arm.shuffle:
            words.append(f"numbers shuffled {arm.shuffle} answers")
        if arm.model:
            words.append(f"read by {arm.model}")
        return "; ".join(words)
    if isinstance(arm, LogitArm):
        words = [f"{DIVERGENCES[arm.objective]} over digits, commas and spaces, on {written}"]
        if arm.temperature != 1:
            words.append(f"temperature {arm.temperature}")
    else:
        words = [f"Trained on the tokens of {written}"]
    if arm.lora.adapters:
        words.append({"shared": "the teacher's A", "fresh": "another A for every run"}[arm.lora_init])
    if arm.shuffle:
        words.append(f"numbers shuffled {arm.shuffle} answers")
    if arm.noise:
        words.append(f"noise of {arm.noise} of their spread on the student's base weights")
    if arm.model:
        words.append(f"students are {arm.model}")
    if chosen := arm.selection:
        by = "" if chosen.positions == "random" else f" by {chosen.score}"
        words.append(f"{chosen.positions} {chosen.fraction:.0%} of tokens{by}: {chosen.action}")
    words += arm.changes
    return "; ".join(words)
