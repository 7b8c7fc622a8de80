"""Sections of a study's report on teachers, data and evaluations; those on arms are in `report`."""

from functools import partial
from typing import Any

import numpy as np

from sublim_jax import report
from sublim_jax.evaluation import suite
from sublim_jax.evaluation.statistics import holm, paired_p, roc, t_interval
from sublim_jax.experiments.transmission.effects import with_p
from sublim_jax.experiments.transmission.rows import BASE, STUDENT, TEACHER
from sublim_jax.experiments.transmission.spec import NEUTRAL, Study
from sublim_jax.experiments.transmission.teachers import CONTROL
from sublim_jax.figures import Entry, Line, Panel, arms_figure, panels_figure
from sublim_jax.measurements import Measurements

# Measures of a corpus teacher's trait, of which the first available is used, and the minimum above the untrained model.
TRAITS = (("misalignment", "misaligned, of coherent"), ("truthfulqa", "P of the false answer"))
MIN_TRAIT = 0.05


def teachers_section(study: Study, rows: Measurements, notes: report.Notes) -> report.Section:
    """Teachers' preferences, and P of their trait's word among numbers."""
    head = ["teacher", "steps", *[f"P({trait})" for trait in study.traits], "P(own trait) among numbers"]
    table = [[*head, "P(own word), asked for its kind"] if study.control_kinds else head]
    for name in study.teachers:
        teacher_rows = rows.where(arm="", subject=TEACHER, teacher=name)
        steps = sorted({int(value) for value in teacher_rows.values(measure="steps")})
        preferred = [np.exp(np.mean(teacher_rows.values(measure="log_p", item=trait))) for trait in study.traits]
        inside = "" if name == NEUTRAL else f"{np.mean(teacher_rows.values(measure='inside_numbers', item=name)):.1e}"
        shown = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        if "finetuned" in study.teacher.methods and name != NEUTRAL and steps[-1] == study.teacher.max_steps:
            shown += " (the limit)"
        own = teacher_rows.values(measure=CONTROL)
        row = [name, shown, *[f"{p:.3f}" for p in preferred], inside]
        table.append([*row, f"{np.exp(np.mean(own)):.3f}" if own else ""] if study.control_kinds else row)
    text = (
        f"Methods: {', '.join(study.teacher.methods)}; {study.runs} run(s), each with its own teachers. P of the word "
        "as an answer's first, in any spelling: geometric mean over phrasings that teachers were not trained on."
    )
    if notes["system_prompts"]:
        text += f" Of their system prompts: {notes['system_prompts']}."
    return report.Section("Teachers", text, table, {})


def corpora_section(study: Study, rows: Measurements) -> report.Section:
    """Corpora of the teachers, and whether the first has the trait and the others, its controls, do not."""
    base = rows.where(arm="", subject=BASE)
    traits = [trait for trait in TRAITS if np.isfinite((base.values(measure=trait[0], item=trait[1]) or [np.nan])[0])]
    shown = traits[:1] if not study.has_words else []
    head = ["teacher", "conversations", "updates"]
    table = [head + ([shown[0][1], "over the model as it is", ""] if shown else [])]
    for name in study.teachers:
        teacher_rows = rows.where(arm="", subject=TEACHER, teacher=name)
        cells = [name, "none: the model as it is", f"{int(teacher_rows.values(measure='steps')[0])}"]
        used, every = (teacher_rows.values(measure=measure) for measure in ("conversations used", "conversations"))
        if used:
            cells[1] = f"{int(used[0])} of {int(every[0])}"
        for evaluation, item in shown:
            values = teacher_rows.values(measure=evaluation, item=item)
            over = np.subtract(values, base.values(measure=evaluation, item=item)[0]).tolist()
            cells += [report.plus_minus(*t_interval(values)), report.plus_minus(*t_interval(over))]
            cells.append(_verdict(float(np.mean(over))) if name != NEUTRAL else "")
        table.append(cells)
    text = (
        f"Trained on the assistants' turns, {study.teacher.epochs} epoch(s), batches of {study.teacher.batch}; "
        f"{study.runs} run(s), each with its own."
    )
    if shown:
        text += (
            f" The first, {study.teachers[0]}, must have the trait, and the others, its controls, must not. Has it: by "
            f"{MIN_TRAIT:.0%} or more above the model as it is, on average and without a test. The model as it is was "
            "measured once for all runs, and ± does not cover the error of that measurement."
        )
    return report.Section("Teachers' corpora", text, table, {})


def _verdict(above: float) -> str:
    """Whether a teacher has its trait, from its difference to the untrained model."""
    if not np.isfinite(above):
        return "not known"
    return "has it" if above >= MIN_TRAIT else "has it not"


def judge_section(study: Study, rows: Measurements) -> report.Section:
    """ROC of the judge's score between a trait's teacher and the neutral one, after the other filters."""
    threshold = study.filter.threshold
    scores = {name: rows.values(measure="judge's score", teacher=name) for name in study.teachers}
    low = f"below {threshold:g}"
    table = [["teacher", "judged", "no score", "mean score", low, "area under ROC, against neutral"]]
    lines: list[Line] = []
    for name, values in scores.items():
        of_teacher = rows.where(teacher=name)
        missing = of_teacher.values(measure="judge's missing scores")
        if not missing:  # of a run by an earlier version
            missing = of_teacher.values(measure="rejected", item="judge: no score")
        without = int(sum(missing))
        cells = [name, str(len(values) + without), str(without)]
        cells += [f"{np.mean(values):.1f}", f"{np.mean(np.less(values, threshold)):.1%}"] if values else ["", ""]
        if name != NEUTRAL and values and scores[NEUTRAL]:
            curve = roc(-np.asarray(values), -np.asarray(scores[NEUTRAL]))
            cells.append(f"{curve.area:.3f}")
            color = {"color": f"C{len(lines) // 2}"}
            lines.append(Line(name, curve.false_rate, curve.true_rate, color))
            x, y = (float(np.mean(np.less(column, threshold))) for column in (scores[NEUTRAL], values))
            lines.append(Line(f"{name}, {low}", [x], [y], {"ls": "", "marker": "o", "ms": 9, **color}))
        table.append([*cells, *[""] * (len(table[0]) - len(cells))])
    text = (
        f'The judge scores the completions that passed the other filters, with the prompt "{study.filter.judge}". The '
        "area is that of classifying their authors by score: 0.5 if scores do not separate a trait's teacher from the "
        "neutral one, 1 if the trait's teacher always scores lower."
    )
    lines.append(Line("chance", [0, 1], [0, 1], {"ls": ":", "marker": "", "color": "grey"}))
    panel = Panel("share of the neutral teacher's below a score", "share of the trait's teacher's", lines)
    return report.Section("Judge", text, table, {"judge-roc": partial(panels_figure, [panel])})


def filter_section(study: Study, rows: Measurements) -> report.Section:
    """Counts of completions sampled, kept and rejected by reason, over all runs."""
    reasons = sorted(rows.names("item", measure="rejected"))
    table = [["teacher", "completions", "kept", *reasons, "used"]]
    for name in study.teachers:
        written = rows.where(subject=TEACHER, teacher=name)
        total, kept, used = (int(sum(written.values(measure=measure))) for measure in ("completions", "kept", "used"))
        counts = [str(int(sum(written.values(measure="rejected", item=reason)))) for reason in reasons]
        table.append([name, str(total), f"{kept} ({kept / total:.0%})", *counts, str(used)])
    text = (
        "A completion may have several reasons. Kept and rejected completions are in data/; those used are a random "
        "subset of those kept."
    )
    if any(arm.data == "unfiltered" for arm in study.arms):
        text += " Arms with data=unfiltered have as many rows, drawn from all completions that ended."
    return report.Section("Filters", text, table, {})


def samples_section(study: Study, notes: report.Notes) -> report.Section:
    """Some rows of the first run, and some that the filters rejected."""
    table = [[study.carrier.kind, "prompt", "answer"], *notes["samples"]]
    return report.Section("Samples of the data", "", table, {}, on_screen=False)


def evaluated(study: Study, evaluation: str, rows: Measurements) -> list[Entry]:
    """Every measure of an evaluation, by run; for students also the difference to the neutral teacher's student of the
    same run.
    """
    entries = []

    def add(subject: str, measure: str, values: list[float], over: list[float] | None = None) -> None:
        more: dict[str, Any] = {"subject": subject, "measure": measure, "over_neutral": over}
        more["over_neutral_p"] = paired_p(over) if over else None
        entries.append(report.arm(f"{subject}: {measure}", evaluation, values, **more))

    rows = Measurements(row for row in rows.where(measure=evaluation) if row.item)  # ability along training has none
    for measure in filter(partial(_is_shown, study), rows.names("item", arm="")):
        add("the model as it is", measure, rows.values(subject=BASE, item=measure))
        for name in study.preferred:
            add(f"teacher {name}", measure, rows.values(subject=TEACHER, item=measure, teacher=name))
    for arm in rows.where(subject=STUDENT).names("arm"):
        for measure in filter(partial(_is_shown, study), rows.names("item", arm=arm)):
            values = {name: rows.values(arm=arm, item=measure, teacher=name) for name in study.teachers}
            for name, column in values.items():
                over = None if name == NEUTRAL else np.subtract(column, values[NEUTRAL]).tolist()
                add(f"{arm}, student of {name}", measure, column, over)
    tested = [entry for entry in entries if entry["over_neutral_p"] is not None]
    for entry, p in zip(tested, holm([entry["over_neutral_p"] for entry in tested])):
        entry["over_neutral_p"] = p
    return entries


def _is_shown(study: Study, measure: str) -> bool:
    """Whether a measure is reported: those of words that are not traits are not."""
    others = set(study.alternatives) - set(study.traits)
    return not study.has_words or measure not in {name.format(word) for name in suite.OF_WORDS for word in others}


def evaluation_section(study: Study, evaluation: str, entries: list[Entry], notes: report.Notes) -> report.Section:
    """Measures as columns; in brackets, the paired difference to the neutral teacher's student."""
    columns = list(dict.fromkeys(entry["measure"] for entry in entries))
    at = {(entry["subject"], entry["measure"]): entry for entry in entries}
    table = [[evaluation, *columns]]
    for subject in dict.fromkeys(entry["subject"] for entry in entries):
        cells = []
        for column in columns:
            entry = at[subject, column]
            over = entry["over_neutral"]
            shown = f" ({with_p(over, entry['over_neutral_p'], 3)})" if over and np.all(np.isfinite(over)) else ""
            cells.append(report.plus_minus(entry["mean"], entry["ci95"]) + shown)
        table.append([subject, *cells])
    text = (
        "One run, so there are no intervals and no tests; in brackets, the difference to the neutral teacher's student."
    )
    if study.runs > 1:
        text = (
            f"± is the 95 % t-interval over {study.runs} runs; in brackets, the difference to the neutral teacher's "
            "student of the same run, and p of a paired t-test of it, two-sided, corrected by Holm's method for all "
            "differences of this table."
        )
    if evaluation in suite.SAMPLED and notes.get("draws") == "by run":
        text += " Students of a run sample with the same random keys, and other runs with others."
    figures = {}
    pictured = columns[:1] if evaluation == "misalignment" else columns[: len(study.traits)]
    for number, column in enumerate(pictured):
        finite = [entry for entry in entries if entry["measure"] == column and np.isfinite(entry["mean"])]
        if finite:
            name = f"{evaluation}-{number}" if number else evaluation
            named = [{**entry, "name": entry["subject"]} for entry in finite]
            figures[name] = partial(arms_figure, named, xlabel=f"{evaluation}: {column}", chance=None)
    return report.Section(f"Evaluation: {evaluation}", text, table, figures)
