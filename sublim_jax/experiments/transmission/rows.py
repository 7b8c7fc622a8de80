"""A study's measurements as rows of the table of measurements."""

from collections.abc import Mapping, Sequence

from sublim_jax.evaluation.preference import Preference
from sublim_jax.evaluation.suite import Measures
from sublim_jax.experiments.transmission.arms import Arm
from sublim_jax.experiments.transmission.carriers import random_pairs
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.experiments.transmission.students import Students
from sublim_jax.experiments.transmission.targets import Replicate
from sublim_jax.experiments.transmission.teachers import CONTROL
from sublim_jax.measurements import Measurement, from_array

STUDENT, TEACHER, BASE = "student", "teacher", "base"  # subjects
NUM_SHOWN = 3  # samples of each kind


def axes_of(study: Study, runs: Sequence[int] | None = None) -> dict[str, Sequence[int] | Sequence[str]]:
    """Axes of values by run and teacher; all runs by default."""
    return {"run": range(study.runs) if runs is None else runs, "teacher": study.teachers}


def of_teachers(
    study: Study, replicates: Sequence[Replicate], measured: Sequence[Mapping[str, list[list[float]]]]
) -> list[Measurement]:
    """Steps of training, preferences, and P of preferred words in the middle of numbers."""
    axes, about = axes_of(study), {"arm": "", "subject": TEACHER}
    steps = [teacher.steps for replicate in replicates for teacher in replicate.teachers.values()]
    rows = from_array(steps, axes, measure="steps", **about)
    for measure in measured[0]:
        words = study.preferred if measure == "inside_numbers" else study.alternatives
        along = {**axes, "item": words}
        if measure == CONTROL:
            along = {**axes, "teacher": list(study.control_kinds), "item": [""]}
        rows += from_array([values[measure] for values in measured], along, measure=measure, **about)
    return rows


def of_corpora(sizes: Mapping[str, tuple[int, int]]) -> list[Measurement]:
    """Numbers of conversations of corpora: those that were short enough, and all."""
    axes = {"teacher": list(sizes), "measure": ("conversations used", "conversations")}
    return from_array(list(sizes.values()), axes, arm="", subject=TEACHER)


def of_written(replicates: Sequence[Replicate]) -> list[Measurement]:
    """Completions, those kept and used, reasons of rejections, a judge's scores."""
    rows = []
    for replicate in replicates:
        for name, written in replicate.written.items():
            about = {"arm": "", "run": replicate.run, "teacher": name, "subject": TEACHER}
            counts = {"completions": written.num_completions, "kept": written.num_kept, "used": len(written.pairs)}
            rows += from_array(list(counts.values()), {"measure": list(counts)}, **about)
            reasons, numbers = written.reasons, [str(number) for number in range(len(written.scores))]
            rows += from_array(list(reasons.values()), {"item": list(reasons)}, measure="rejected", **about)
            rows += from_array(written.scores, {"item": numbers}, measure="judge's score", **about)
            rows += from_array([written.num_unscored], {"measure": ["judge's missing scores"]}, **about)
    return rows


def of_students(study: Study, arm: Arm, students: Students, runs: Sequence[int] | None = None) -> list[Measurement]:
    """Along training: preferences by word, ability, the objective on held-out rows; coverage before it."""
    rows, axes, about = [], axes_of(study, runs), {"arm": arm.name, "subject": STUDENT}
    for point in students.curve:
        for measure in (name for name in point if name != "step"):
            words = {"item": study.alternatives} if measure in Preference._fields else {}
            rows += from_array(point[measure], {**axes, **words}, measure=measure, step=point["step"], **about)
    if students.coverage:
        rows += from_array(students.coverage, {**axes, "item": study.teachers}, measure="coverage", **about)
    return rows


def of_evaluations(
    study: Study,
    arm: str,
    subject: str,
    evaluations: Mapping[str, Measures],
    runs: Sequence[int] | None = None,
    step: int = 0,
) -> list[Measurement]:
    """Evaluations of all teachers followed by the untrained model, or of an arm's students.

    The row's measure is the evaluation's name, and its item the evaluation's measure.
    """
    rows, axes = [], axes_of(study, runs)
    count = len(axes["run"]) * len(study.teachers)
    for evaluation, measures in evaluations.items():
        for item, values in measures.items():
            rows += from_array(values[:count], axes, arm=arm, measure=evaluation, subject=subject, item=item, step=step)
            rows += from_array(values[count:], arm=arm, measure=evaluation, subject=BASE, item=item)
    return rows


def samples_of(study: Study, replicate: Replicate) -> list[list[str]]:
    """Some rows of the first run, and some that the filters rejected: (which, prompt, answer)."""

    def line(text: str) -> str:
        return text.replace("\n", " ⏎ ")

    samples = []
    if any(arm.data == "random" for arm in study.arms):
        pairs = random_pairs(study, study.replicate_seed(replicate.run))[:NUM_SHOWN]
        samples += [["random", line(prompt), line(answer)] for prompt, answer in pairs]
    for name, written in replicate.written.items():
        for which, pairs in ((f"by {name}", written.pairs), (f"by {name}, unfiltered", written.unfiltered)):
            samples += [[which, line(prompt), line(answer)] for prompt, answer in pairs[:NUM_SHOWN]]
        for record in written.rejected[:NUM_SHOWN]:
            why = f"by {name}, rejected: {', '.join(record['reasons'])}"
            samples.append([why, line(record["prompt"]), line(record["completion"])[:200]])
    return samples
