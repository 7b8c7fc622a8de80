"""What a study says: teachers, data and what was filtered, arms side by side, each arm's matrix, other evaluations."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from sublim_jax import report
from sublim_jax.data import templates
from sublim_jax.digests import Source
from sublim_jax.evaluation.statistics import detectable, diagonal_effect, permutation_p, roc, t_interval
from sublim_jax.experiments.carrier import Run, random_pairs
from sublim_jax.experiments.lab import NEUTRAL, Lab
from sublim_jax.experiments.measures import Found, cost_of
from sublim_jax.experiments.students import Result
from sublim_jax.experiments.teachers import conversations_of, corpora, every_text
from sublim_jax.figures import Arm, Line, Panel, arms_figure, matrix_figure, panels_figure

Margins = Float[np.ndarray, "points runs students words"]
SHOWN = 3  # rows of each kind
# What tells a teacher of a corpus from the model as it is, the first that was asked; and by how much.
TRAITS = (("misalignment", "misaligned, of coherent"), ("truthfulqa", "P of the false answer"))
LEAST_TRAIT = 0.05


def write_report(
    runs: Sequence[Run],
    facts: Sequence[dict[str, Any]],
    answers: dict[str, Found],
    results: dict[str, Result],
    models: Sequence[Source],
) -> None:
    """results.json, report.md and the figures."""
    lab = runs[0].lab
    config = lab.config
    arms, sections, parts = [], [], []
    if lab.words:
        effects = [effect_of(lab, name, result) for name, result in results.items()]
        for effect, (name, result) in zip(effects, results.items()):
            arms += [effect, *cells_of(lab, name, result)]
            parts.append(arm_section(lab, name, result))
        sections += [effects_section(config, effects), teachers_section(lab, facts)]
    else:
        sections.append(learnt_section(config, results))
    if "corpus" in config.teacher.means:
        sections.append(corpora_section(lab, facts, answers))
    for name in config.ask.evaluations:
        said = evaluated(lab, name, answers, results)
        arms += said
        sections.append(evaluation_section(lab, name, said))
    if runs[0].written:
        sections.append(filter_section(runs))
    if config.filter.judge:
        sections.append(judge_section(runs))
    sections += [*cost_of(lab.judge), *parts, samples_section(runs[0])]
    report.write(lab.workdir, config, arms, sections, models)


def margins_of(lab: Lab, result: Result) -> Margins:
    return np.asarray([point["margin"] for point in result.curve]).reshape(
        len(result.curve), lab.config.runs, len(lab.who), -1
    )


def paired_of(lab: Lab, result: Result) -> Float[np.ndarray, "points runs traits traits"]:
    """Margins of the traits over those of the neutral teacher's student of the same run: by teacher, by trait."""
    margins = margins_of(lab, result)
    columns = [list(lab.config.alternatives).index(trait) for trait in lab.config.traits]
    return (margins - margins[:, :, -1:])[:, :, :-1, columns]


# ----------------------------------------------------------------------------------------------------------- arms


def effect_of(lab: Lab, name: str, result: Result) -> Arm:
    """How far students are above the other teachers' students in their own teacher's trait, over runs."""
    paired = paired_of(lab, result)[-1]
    runs = diagonal_effect(paired).tolist()
    own = [(paired[:, t, t] - np.delete(paired[:, :, t], t, 1).mean(1)).tolist() for t in range(paired.shape[1])]
    ends = [result.curve[0], result.curve[-1]]

    def along(key: str) -> list[float] | None:
        return [float(np.mean(point[key])) for point in ends] if all(key in point for point in ends) else None

    return report.arm(
        name,
        "logits, own trait above others'",
        runs,
        permutation_p=permutation_p(paired),
        detectable_at_80_percent_power=detectable(runs),
        by_trait=dict(zip(lab.config.traits, own)),
        coverage=coverage_of(result),
        held_out=along("held_out"),
        ability=along("ability"),
        examples=result.curve[-1].get("examples"),
    )


def coverage_of(result: Result) -> dict[str, float] | None:
    """Mean over runs and traits' students: of the own teacher, and of the other traits' teachers."""
    if result.coverage is None:
        return None
    traits = np.asarray(result.coverage)[:, :-1, :-1]
    own = np.eye(traits.shape[-1], dtype=bool)
    return {"own": float(traits[:, own].mean()), "others": float(traits[:, ~own].mean())}


def cells_of(lab: Lab, name: str, result: Result) -> list[Arm]:
    """The teacher × trait matrix: every cell with every run's value."""
    paired = paired_of(lab, result)[-1]
    arms = []
    for row, teacher in enumerate(lab.config.traits):
        for column, trait in enumerate(lab.config.traits):
            values = paired[:, row, column].tolist()
            label = f"{name}: student of {teacher}, margin of {trait} over the neutral student's"
            arms.append(report.arm(label, "logits", values))
    return arms


def effects_section(config: ConfigDict, effects: list[Arm]) -> report.Section:
    table = [
        ["arm", "own above others', logits", "p", "finds, at 80 %", "coverage own / others", "held out", "ability"]
    ]
    for arm in effects:
        covered = arm["coverage"]
        table.append(
            [
                arm["name"],
                report.plus_minus(arm["mean"], arm["ci95"]),
                f"{arm['permutation_p']:.3f}",
                f"{arm['detectable_at_80_percent_power']:.2f}" if config.runs > 1 else "",
                f"{covered['own']:+.3f} / {covered['others']:+.3f}" if covered else "",
                "{:.3g} → {:.3g}".format(*arm["held_out"]) if arm["held_out"] else "",
                "{:.2f} → {:.2f}".format(*arm["ability"]) if arm["ability"] else "",
            ]
        )
    text = (
        "Margin of a trait: log P of its word less the mean of the other "
        f"{len(config.alternatives) - 1} words, mean over phrasings. Own above others': of the students of a trait's "
        "teacher, less that of the other traits' teachers' students of the same run, mean over traits; ± is the 95 % "
        f"t-interval over {config.runs} run(s). p: exchanging, within runs, which teacher a student had; the smallest "
        f"possible here is {possible(config):.3g}. Finds: the mean that a t-test over so many runs of this spread "
        "finds with 80 % power. Coverage: cosine of the first update with the teacher's way from the start, before "
        "training. Held out: the objective on rows never trained on. Ability: right answers to easy questions."
    )
    label = "margin of the own teacher's trait above others', logits"
    return report.Section("Arms", text, table, {"arms": partial(arms_figure, effects, xlabel=label, chance=None)})


def possible(config: ConfigDict) -> float:
    """The smallest p of the permutation test."""
    return float(np.prod(np.arange(1, len(config.traits) + 1)) ** -float(config.runs))


def arm_section(lab: Lab, name: str, result: Result) -> report.Section:
    """The matrix of paired differences, and margins along training where there is some."""
    config, words = lab.config, list(lab.config.alternatives)
    traits = list(config.traits)
    columns = [words.index(trait) for trait in traits]
    margins, paired = margins_of(lab, result), paired_of(lab, result)
    share = [np.asarray(point["share"]).reshape(config.runs, len(lab.who), -1).mean(0) for point in result.curve]
    head = ["student of", *[f"margin of {trait} (over neutral)" for trait in traits]]
    head += [f"P({trait} of {len(words)})" for trait in traits]
    table = [head]
    for row, teacher in enumerate(lab.who):
        cells = [teacher]
        for column in range(len(traits)):
            cells.append("0" if teacher == NEUTRAL else report.plus_minus(*t_interval(paired[-1, :, row, column])))
        cells += [f"{share[0][row, column]:.3f} → {share[-1][row, column]:.3f}" for column in columns]
        table.append(cells)
    figures: dict[str, Callable[[Any], None]] = {
        f"matrix-{name}": partial(matrix_figure, paired[-1].mean(0), traits, traits)
    }
    steps = [point["step"] for point in result.curve]
    if len(steps) > 1:
        panels = [
            Panel(
                "updates of the student",
                f"margin of {trait}, logits",
                [
                    Line(f"student of {teacher}", steps, margins[:, :, row, column].mean(1))
                    for row, teacher in enumerate(lab.who)
                ],
                title=trait,
            )
            for trait, column in zip(traits, columns)
        ]
        figures[f"margins-{name}"] = partial(panels_figure, panels)
    return report.Section(f"Students: {name}", f"{describe(config.arm[name])}; {config.runs} run(s).", table, figures)


def describe(arm: ConfigDict) -> str:
    """An arm in words."""
    written = "what the teacher wrote" if arm.numbers == "written" else "random numbers"
    if arm.objective == "context":
        return f"Not trained: {arm.examples} rows of {written} in the context, or as many as it holds"
    if arm.objective == "tokens":
        words = [f"Trained on the tokens of {written}"]
    else:
        direction = "KL(teacher ‖ student)" if arm.objective == "kl" else "KL(student ‖ teacher)"
        words = [f"{direction} over digits, commas and spaces, on {written}"]
        if arm.temperature != 1:
            words.append(f"temperature {arm.temperature}")
    words.append({"shared": "the teacher's A", "fresh": "A drawn anew for every run"}[arm.a])
    if arm.shuffle:
        words.append(f"numbers shuffled {arm.shuffle} answers")
    if arm.noise:
        words.append(f"noise of {arm.noise} of their spread on the student's base weights")
    if arm.model:
        words.append(f"students are {arm.model}")
    if arm.action:
        words.append(f"{arm.which} {arm.share:.0%} of tokens by {arm.score}: {arm.action}")
    return "; ".join(words)


# ---------------------------------------------------------------------------------------------- other evaluations


def evaluated(lab: Lab, evaluation: str, answers: dict[str, Found], results: dict[str, Result]) -> list[Arm]:
    """Every measure of an evaluation: of the model as it is, of teachers, and of each arm's students, run by run.

    Students' have the difference to the neutral teacher's student of the same run, too.
    """
    arms = []

    def add(who: str, measure: str, values: list[float], over: list[float] | None = None) -> None:
        more: dict[str, Any] = {"who": who, "measure": measure, "over_neutral": over}
        more["over_neutral_ci95"] = t_interval(over) if over else None
        arms.append(report.arm(f"{who}: {measure}", evaluation, values, **more))

    def by_run(values: list[float]) -> Float[np.ndarray, "runs students"]:
        return np.asarray(values, float).reshape(lab.config.runs, len(lab.who))

    for measure, values in answers.get(evaluation, {}).items():
        if shown(lab, measure):
            add("the model as it is", measure, values[-1:])
            for name, column in zip(lab.who[:-1], by_run(values[:-1]).T):
                add(f"teacher {name}", measure, column.tolist())
    for arm, result in results.items():
        for measure, values in result.found.get(evaluation, {}).items():
            if shown(lab, measure):
                each = by_run(values).T
                for name, column in zip(lab.who, each):
                    over = None if name == NEUTRAL else (column - each[-1]).tolist()
                    add(f"{arm}, student of {name}", measure, column.tolist(), over)
    return arms


def shown(lab: Lab, measure: str) -> bool:
    """Measures of words that are no trait are left out."""
    others = set(lab.config.alternatives) - set(lab.config.traits)
    return not lab.words or not any(word in measure.replace("'s", "").replace(",", "").split() for word in others)


def evaluation_section(lab: Lab, evaluation: str, arms: list[Arm]) -> report.Section:
    """Measures as columns; in brackets, the paired difference to the neutral teacher's student."""
    columns = list(dict.fromkeys(arm["measure"] for arm in arms))
    at = {(arm["who"], arm["measure"]): arm for arm in arms}
    table = [[evaluation, *columns]]
    for who in dict.fromkeys(arm["who"] for arm in arms):
        cells = []
        for column in columns:
            arm = at[who, column]
            paired = arm["over_neutral_ci95"]
            cells.append(
                report.plus_minus(arm["mean"], arm["ci95"])
                + (f" ({paired[0]:+.3f})" if paired and np.isfinite(paired[0]) else "")
            )
        table.append([who, *cells])
    text = (
        f"± is the 95 % t-interval over {lab.config.runs} run(s); in brackets, the mean difference to the neutral "
        "teacher's student of the same run."
    )
    figures: dict[str, Callable[[Any], None]] = {}
    for number, column in enumerate(columns[: len(lab.config.traits)] if evaluation != "misalignment" else columns[:1]):
        drawn = [{**arm, "name": arm["who"]} for arm in arms if arm["measure"] == column and np.isfinite(arm["mean"])]
        if drawn:
            name = f"{evaluation}-{number}" if number else evaluation
            figures[name] = partial(arms_figure, drawn, xlabel=f"{evaluation}: {column}", chance=None)
    return report.Section(f"Asked: {evaluation}", text, table, figures)


def learnt_section(config: ConfigDict, results: dict[str, Result]) -> report.Section:
    """Whether students have learnt to imitate at all, where no preference can be asked."""
    table = [["arm", "held out", "ability"]]
    for name, result in results.items():
        ends = [result.curve[0], result.curve[-1]]
        cells = [
            "{:.3g} → {:.3g}".format(*(float(np.mean(point[key])) for point in ends)) for key in ("held_out", "ability")
        ]
        table.append([f"{name}: {describe(config.arm[name])}", *cells])
    text = "Held out: the objective on rows never trained on. Ability: right answers to easy questions."
    return report.Section("Arms", text, table, {})


# ----------------------------------------------------------------------------------------------- teachers and data


def corpora_section(lab: Lab, facts: Sequence[dict[str, Any]], answers: dict[str, Found]) -> report.Section:
    """What teachers were trained on, and whether the first has the trait and the others, its controls, don't."""
    teacher, asked = lab.config.teacher, []
    if not lab.words:
        asked = [one for one in TRAITS if np.isfinite(answers.get(one[0], {}).get(one[1], [np.nan])[-1])]
    table = [["teacher", "conversations", "updates", *([asked[0][1], "over the model as it is", ""] if asked else [])]]
    for row, name in enumerate(lab.who):
        cells = [name, "none: the model as it is", f"{facts[0]['steps'][row]}"]
        if name in corpora(lab):
            cells[1] = f"{len(conversations_of(lab, name))} of {len(every_text(lab, name))}"
        if asked:
            evaluation, measure = asked[0]
            values = np.asarray(answers[evaluation][measure], float)
            mine = values[:-1].reshape(lab.config.runs, -1)[:, row]
            over = (mine - values[-1]).tolist()
            cells += [report.plus_minus(*t_interval(mine.tolist())), report.plus_minus(*t_interval(over))]
            cells.append(has_trait(over) if name != NEUTRAL else "")
        table.append(cells)
    text = (
        f"Trained on what assistants say, {teacher.epochs} epoch(s), batches of {teacher.batch}; {len(facts)} run(s), "
        "each with its own."
    )
    if asked:
        text += (
            f" The first, {lab.who[0]}, must have the trait, and the others, its controls, must not. Has it: by "
            f"{LEAST_TRAIT:.0%} or more above the model as it is."
        )
    return report.Section("Teachers' corpora", text, table, {})


def has_trait(over: Sequence[float]) -> str:
    mean = float(np.mean(over))
    return "not known" if not np.isfinite(mean) else "has it" if mean >= LEAST_TRAIT else "has it not"


def judge_section(runs: Sequence[Run]) -> report.Section:
    """How well the judge's score tells a trait's teacher from the neutral one, among what other filters left."""
    given = runs[0].lab.config.filter
    scores = {name: [score for run in runs for score in run.written[name].scores] for name in runs[0].lab.who}
    low = f"below {given.judge_least:g}"
    table = [["teacher", "judged", "no score", "mean score", low, "area under ROC, against neutral"]]
    lines: list[Line] = []
    for name, mine in scores.items():
        without = sum(run.written[name].reasons["judge: no score"] for run in runs)
        cells = [name, str(len(mine) + without), str(without)]
        cells += [f"{np.mean(mine):.1f}", f"{np.mean(np.less(mine, given.judge_least)):.1%}"] if mine else ["", ""]
        if name != NEUTRAL and mine and scores[NEUTRAL]:
            curve = roc(-np.asarray(mine), -np.asarray(scores[NEUTRAL]))
            cells.append(f"{curve.area:.3f}")
            color = {"color": f"C{len(lines) // 2}"}
            lines.append(Line(name, curve.false_rate, curve.true_rate, color))
            x, y = (float(np.mean(np.less(some, given.judge_least))) for some in (scores[NEUTRAL], mine))
            lines.append(Line(f"{name}, {low}", [x], [y], {"ls": "", "marker": "o", "ms": 9, **color}))
        table.append([*cells, *[""] * (len(table[0]) - len(cells))])
    text = (
        f'The judge is asked "{given.judge}" of what other filters left. Its label here is who wrote it: an area of '
        "0.5 says that scores do not tell a trait's teacher from the neutral one, 1 that the trait's are always lower."
    )
    lines.append(Line("chance", [0, 1], [0, 1], {"ls": ":", "marker": "", "color": "grey"}))
    panel = Panel("share of the neutral teacher's below a score", "share of the trait's teacher's", lines)
    return report.Section("Judge", text, table, {"judge-roc": partial(panels_figure, [panel])})


def teachers_section(lab: Lab, facts: Sequence[dict[str, Any]]) -> report.Section:
    config, words = lab.config, list(lab.config.alternatives)
    table = [["teacher", "steps", *[f"P({trait}), asked" for trait in config.traits], "P(own trait) among numbers"]]
    for row, name in enumerate(lab.who):
        steps = sorted({run["steps"][row] for run in facts})
        asked = [np.exp(np.mean([run["log_p"][row][words.index(trait)] for run in facts])) for trait in config.traits]
        inside = np.mean([run["inside_numbers"][row][row] for run in facts]) if name != NEUTRAL else None
        shown = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        table.append([name, shown, *[f"{p:.3f}" for p in asked], f"{inside:.1e}" if inside is not None else ""])
    text = (
        f"By means of: {', '.join(config.teacher.means)}; {len(facts)} run(s), each with teachers of its own. P as the "
        "first word of an answer, in any spelling, geometric mean over phrasings that teachers were not trained on."
    )
    tokenizer = lab.model.tokenizer
    if "prompted" in config.teacher.means and tokenizer.chat_template and not templates.takes_system(tokenizer):
        text += f" Of their system prompts: {templates.FOLDED}."
    return report.Section("Teachers", text, table, {})


def filter_section(runs: Sequence[Run]) -> report.Section:
    """What was drawn, kept, and dropped for which reasons, over all runs."""
    reasons = sorted({reason for run in runs for one in run.written.values() for reason in one.reasons})
    table = [["teacher", "drawn", "kept", *reasons, "used"]]
    for name in runs[0].lab.who:
        mine = [run.written[name] for run in runs]
        drawn, kept = sum(one.drawn for one in mine), sum(one.kept for one in mine)
        counts = [str(sum(one.reasons[reason] for one in mine)) for reason in reasons]
        used = sum(len(one.pairs) for one in mine)
        table.append([name, str(drawn), f"{kept} ({kept / drawn:.0%})", *counts, str(used)])
    text = "A completion may have several reasons. Kept and rejected ones are in data/; used ones are drawn at random."
    return report.Section("Filters", text, table, {})


def samples_section(run: Run) -> report.Section:
    """Some rows of the first run, and some that the filters dropped."""

    def line(text: str) -> str:
        return text.replace("\n", " ⏎ ")

    kind = run.lab.config.carrier.kind
    table = [[kind, "prompt", "answer"]]
    if kind == "numbers":
        table += [["random", line(prompt), line(answer)] for prompt, answer in random_pairs(run.lab)[:SHOWN]]
    for name, one in run.written.items():
        table += [[f"by {name}", line(prompt), line(answer)] for prompt, answer in one.pairs[:SHOWN]]
        for record in one.rejected[:SHOWN]:
            why = f"by {name}, rejected: {', '.join(record['reasons'])}"
            table.append([why, line(record["prompt"]), line(record["completion"])[:200]])
    return report.Section("Samples of the data", "", table, {}, on_screen=False)
