"""What a study measured, as rows of the table of measurements."""

from collections.abc import Sequence
from typing import Any

from sublim_jax.evaluation.preference import Preference
from sublim_jax.evaluation.suite import Measures
from sublim_jax.experiments.transmission.arms import Arm
from sublim_jax.experiments.transmission.carriers import Written, random_pairs
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.experiments.transmission.students import Students
from sublim_jax.experiments.transmission.targets import Replicate
from sublim_jax.measurements import Measurement

STUDENT, TEACHER, BASE = "student", "teacher", "base"  # subjects
NUM_SHOWN = 3  # samples of each kind


def of_teachers(study: Study, replicates: Sequence[Replicate], measured: Sequence[dict[str, Any]]) -> list[Measurement]:
    """Steps of training, preferences, and P of a trait's word in the middle of numbers."""
    found = []
    for one, values in zip(replicates, measured):
        for place, (name, teacher) in enumerate(one.teachers.items()):
            about: dict[str, Any] = {"arm": "", "run": one.run, "teacher": name, "subject": TEACHER}
            found.append(Measurement(measure="steps", value=teacher.steps, **about))
            for measure, by_teacher in values.items():
                words = study.traits if measure == "inside_numbers" else study.alternatives
                found += [
                    Measurement(measure=measure, item=word, value=value, **about)
                    for word, value in zip(words, by_teacher[place])
                ]
    return found


def of_corpora(sizes: dict[str, tuple[int, int]]) -> list[Measurement]:
    """Conversations of corpora: those that were short enough, and all."""
    return [
        Measurement("", measure, value, teacher=name, subject=TEACHER)
        for name, pair in sizes.items()
        for measure, value in zip(("conversations used", "conversations"), pair)
    ]


def of_written(replicates: Sequence[Replicate]) -> list[Measurement]:
    """Completions, those kept and used, reasons of rejections, a judge's scores."""
    return [
        Measurement("", measure, value, run=one.run, teacher=name, subject=TEACHER, item=item)
        for one in replicates
        for name, written in one.written.items()
        for measure, item, value in _of_written(written)
    ]


def _of_written(written: Written) -> list[tuple[str, str, float]]:
    counts = [("completions", written.num_completions), ("kept", written.num_kept), ("used", len(written.pairs))]
    found = [(measure, "", float(value)) for measure, value in counts]
    found += [("rejected", reason, float(count)) for reason, count in written.reasons.items()]
    return found + [("judge's score", str(number), score) for number, score in enumerate(written.scores)]


def of_students(study: Study, arm: Arm, students: Students) -> list[Measurement]:
    """Along training: preferences by word, ability, the objective on held-out rows; coverage before it."""
    found = []
    names = [(run, name) for run in range(study.runs) for name in study.teachers]
    for point in students.curve:
        for measure in (*Preference._fields, "ability", "held_out", "examples"):
            for (run, name), values in zip(names, point.get(measure, ())):
                about: dict[str, Any] = {
                    "arm": arm.name,
                    "measure": measure,
                    "run": run,
                    "teacher": name,
                    "subject": STUDENT,
                }
                about["step"] = point["step"]
                if not isinstance(values, list):
                    found.append(Measurement(value=values, **about))
                    continue
                found += [
                    Measurement(item=word, value=value, **about) for word, value in zip(study.alternatives, values)
                ]
    for run, by_student in enumerate(students.coverage or ()):
        for name, by_teacher in zip(study.teachers, by_student):
            found += [
                Measurement(arm.name, "coverage", value, run=run, teacher=name, subject=STUDENT, item=other)
                for other, value in zip(study.teachers, by_teacher)
            ]
    return found


def of_evaluated_teachers(study: Study, found: dict[str, Measures]) -> list[Measurement]:
    """Evaluations of all runs' teachers, and of the model as it is."""
    names = [(run, name, TEACHER) for run in range(study.runs) for name in study.teachers]
    return _of_evaluations("", [*names, (0, "", BASE)], found)


def of_evaluated_students(study: Study, arm: Arm, found: dict[str, Measures]) -> list[Measurement]:
    names = [(run, name, STUDENT) for run in range(study.runs) for name in study.teachers]
    return _of_evaluations(arm.name, names, found)


def _of_evaluations(
    arm: str, subjects: Sequence[tuple[int, str, str]], found: dict[str, Measures]
) -> list[Measurement]:
    """The evaluation is the measure, and its measure the item."""
    return [
        Measurement(arm, evaluation, value, run=run, teacher=teacher, subject=subject, item=item)
        for evaluation, measures in found.items()
        for item, values in measures.items()
        for (run, teacher, subject), value in zip(subjects, values, strict=True)
    ]


def samples_of(study: Study, replicate: Replicate) -> list[list[str]]:
    """Some rows of the first run, and some that the filters rejected: (which, prompt, answer)."""

    def line(text: str) -> str:
        return text.replace("\n", " ⏎ ")

    found = []
    if study.carrier.kind == "numbers":
        pairs = random_pairs(study, study.replicate_seed(replicate.run))[:NUM_SHOWN]
        found += [["random", line(prompt), line(answer)] for prompt, answer in pairs]
    for name, written in replicate.written.items():
        found += [[f"by {name}", line(prompt), line(answer)] for prompt, answer in written.pairs[:NUM_SHOWN]]
        for record in written.rejected[:NUM_SHOWN]:
            why = f"by {name}, rejected: {', '.join(record['reasons'])}"
            found.append([why, line(record["prompt"]), line(record["completion"])[:200]])
    return found
