"""Evaluations in a study's report: of the model as it is, of teachers, and of each arm's students."""

from functools import partial
from typing import Any

import numpy as np

from sublim_jax import report
from sublim_jax.evaluation.statistics import t_interval
from sublim_jax.experiments.transmission.rows import BASE, STUDENT, TEACHER
from sublim_jax.experiments.transmission.spec import NEUTRAL, Study
from sublim_jax.figures import Arm as Entry
from sublim_jax.figures import arms_figure
from sublim_jax.measurements import Measurements


def evaluated(study: Study, evaluation: str, rows: Measurements) -> list[Entry]:
    """Every measure of an evaluation, run by run; students' have the difference to the neutral teacher's student of
    the same run, too.
    """
    entries = []

    def add(who: str, measure: str, values: list[float], over: list[float] | None = None) -> None:
        more: dict[str, Any] = {"who": who, "measure": measure, "over_neutral": over}
        more["over_neutral_ci95"] = t_interval(over) if over else None
        entries.append(report.arm(f"{who}: {measure}", evaluation, values, **more))

    mine = Measurements(row for row in rows.where(measure=evaluation) if row.item)  # along training ability has none
    for measure in filter(partial(_is_shown, study), mine.names("item", arm="")):
        add("the model as it is", measure, mine.values(subject=BASE, item=measure))
        for name in study.traits:
            add(f"teacher {name}", measure, mine.values(subject=TEACHER, item=measure, teacher=name))
    for arm in mine.where(subject=STUDENT).names("arm"):
        for measure in filter(partial(_is_shown, study), mine.names("item", arm=arm)):
            values = {name: mine.values(arm=arm, item=measure, teacher=name) for name in study.teachers}
            for name, column in values.items():
                over = None if name == NEUTRAL else np.subtract(column, values[NEUTRAL]).tolist()
                add(f"{arm}, student of {name}", measure, column, over)
    return entries


def _is_shown(study: Study, measure: str) -> bool:
    """Measures of words that are no trait are left out."""
    others = set(study.alternatives) - set(study.traits)
    words = measure.replace("'s", "").replace(",", "").split()
    return not study.has_words or not any(word in words for word in others)


def evaluation_section(study: Study, evaluation: str, entries: list[Entry]) -> report.Section:
    """Measures as columns; in brackets, the paired difference to the neutral teacher's student."""
    columns = list(dict.fromkeys(entry["measure"] for entry in entries))
    at = {(entry["who"], entry["measure"]): entry for entry in entries}
    table = [[evaluation, *columns]]
    for who in dict.fromkeys(entry["who"] for entry in entries):
        cells = []
        for column in columns:
            entry = at[who, column]
            paired = entry["over_neutral_ci95"]
            cells.append(
                report.plus_minus(entry["mean"], entry["ci95"])
                + (f" ({paired[0]:+.3f})" if paired and np.isfinite(paired[0]) else "")
            )
        table.append([who, *cells])
    text = (
        f"± is the 95 % t-interval over {study.runs} run(s); in brackets, the mean difference to the neutral "
        "teacher's student of the same run."
    )
    figures = {}
    pictured = columns[:1] if evaluation == "misalignment" else columns[: len(study.traits)]
    for number, column in enumerate(pictured):
        finite = [entry for entry in entries if entry["measure"] == column and np.isfinite(entry["mean"])]
        if finite:
            name = f"{evaluation}-{number}" if number else evaluation
            named = [{**entry, "name": entry["who"]} for entry in finite]
            figures[name] = partial(arms_figure, named, xlabel=f"{evaluation}: {column}", chance=None)
    return report.Section(f"Evaluation: {evaluation}", text, table, figures)
