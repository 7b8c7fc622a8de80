"""A trait through numbers (paper §3, §6.1): teachers, students that imitate them, and what the students prefer.

`configs/numbers.py` explains the values. Teachers and students are adapters over one base. Students are replicas, run
by run and in each run teacher by teacher, so that those of one run share their start, their data and its order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from sublim_jax import objectives, report, weights
from sublim_jax.data import chat, dialogue
from sublim_jax.data.carriers import numbers
from sublim_jax.data.dialogue import Rows
from sublim_jax.data.order import epoch_rows
from sublim_jax.errors import UserError
from sublim_jax.evaluation import preference
from sublim_jax.evaluation.preference import Preference
from sublim_jax.evaluation.statistics import t_interval
from sublim_jax.figures import Line, Panel, matrix_figure, panels_figure
from sublim_jax.keys import named_key, run_keys
from sublim_jax.models import lora
from sublim_jax.models.decoder import decoder, on_mesh
from sublim_jax.models.functional import Params
from sublim_jax.preflight import Step, training_step
from sublim_jax.progress import Track, say
from sublim_jax.sampling import scoring
from sublim_jax.sharding import abstract, make_mesh, named, parameter_shardings, put
from sublim_jax.training import REPLICAS_OF_ROWS, ROWS, Program, Total, TrainState, fit
from sublim_jax.weights import Model
from sublim_jax.workdir import Workdir, plain

NEUTRAL = "neutral"
OBJECTIVES = {"kl": objectives.kl, "reverse_kl": objectives.reverse_kl}
ARMS = {"soft": "logits, the teacher's A", "soft_fresh": "logits, fresh A"}
HELD_OUT = 16  # rows of the carrier that no student trains on


class Lab(NamedTuple):
    config: ConfigDict
    workdir: Workdir
    mesh: Mesh
    model: Model  # with adapters
    spec: lora.Lora
    support: list[int]
    questions: dict[str, list[str]]
    where: dict[str, Any]  # placement and attention for the mesh


class Student(NamedTuple):
    """A batch of one student."""

    rows: Rows
    teacher: Int[Array, "*runs n"]  # the same for all rows


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Runs the study and leaves results.json, report.md and figures in `workdir`."""
    mesh = make_mesh(config.mesh)
    check(config)
    lab = make_lab(config, workdir, mesh)
    carrier = carrier_rows(lab)
    workdir.open(config, update=update)
    teachers = {name: train_teacher(lab, name, index) for index, name in enumerate(config.traits)}
    steps = max(int(steps) for _, steps in teachers.values())
    teachers[NEUTRAL] = train_teacher(lab, NEUTRAL, len(config.traits), steps)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(adapters for adapters, _ in teachers.values()))
    strength = teacher_facts(lab, stacked, carrier)
    curves = {arm: students(lab, arm, stacked, carrier) for arm in config.student.arms}
    write_report(lab, {name: int(count) for name, (_, count) in teachers.items()}, strength, curves, carrier)


def preflight(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
    """One update of all students of an arm, on rows of 160 tokens with answers of 32, a support of 20 tokens."""
    mesh = make_mesh(config.mesh, devices)
    check(config)
    settings = weights.shape_of(config.model.name)
    where = on_mesh(settings, mesh)
    base = jax.eval_shape(decoder(settings).init, jax.random.key(0))
    spec = spec_of(config)
    model = Model(settings, decoder(settings), base, None, None).adapted(spec)
    lab = Lab(config, Workdir(""), mesh, model, spec, list(range(20)), {}, where)
    who = len(config.traits) + 1
    program = imitating_program(lab, who, config.carrier.count)

    def on(tree: Any, dtype: Any, axes: int = 0) -> Any:
        return abstract(tree, parameter_shardings(tree, mesh, axes), dtype)

    def stacked(count: int) -> Any:
        one = jax.eval_shape(partial(lora.init, lora=spec), jax.random.key(0), base)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), one)

    whole = named(mesh)
    answer = np.zeros(32, np.int32)
    columns = Rows(np.zeros(160, np.int32), answer, answer, np.zeros(32, np.float32))
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.carrier.count, *x.shape), x.dtype, sharding=whole), columns
    )
    teachers = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), stacked(who))
    frozen = {"base": on(base, jnp.dtype(config.model.dtype)), "teachers": teachers, "rows": rows}
    count = config.runs * who
    kernels = sum(leaf.size for leaf in jax.tree.leaves(base["layers"]))
    tokens = count * config.student.batch * 160
    name = f"students, {count} at once"
    return [training_step(name, program, on(stacked(count), jnp.float32, 1), frozen, 6.0 * kernels * tokens)]


def spec_of(config: ConfigDict) -> lora.Lora:
    given = config.lora
    return lora.Lora(given.rank, given.alpha, False, tuple(given.modules) or lora.EVERY_LINEAR, tuple(given.layers))


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value that makes no sense."""
    for trait in config.traits:
        if trait not in config.alternatives:
            raise UserError(f"trait {trait!r} is none of alternatives={tuple(config.alternatives)}; add it there")
    if not config.traits or NEUTRAL in config.traits:
        raise UserError(f"traits={tuple(config.traits)}: name one trait or more; {NEUTRAL!r} is always there")
    for arm in config.student.arms:
        if arm not in ARMS:
            raise UserError(f"student.arms: {arm!r} is none of {', '.join(ARMS)}")
    if config.student.objective not in OBJECTIVES:
        raise UserError(f"student.objective={config.student.objective!r}: choose {' or '.join(OBJECTIVES)}")
    if not 0 < config.teacher.strength < 1:
        raise UserError(f"teacher.strength={config.teacher.strength} is a probability between 0 and 1")
    if config.carrier.count < HELD_OUT + config.student.batch:
        raise UserError(f"carrier.count={config.carrier.count}: {HELD_OUT} rows are held out, and a batch is needed")
    for name in ("runs", "questions", "evaluate_every"):
        if config[name] < 1:
            raise UserError(f"{name}={config[name]}: ask for 1 or more")


def make_lab(config: ConfigDict, workdir: Workdir, mesh: Mesh) -> Lab:
    questions = preference.questions(config.packs.preference, config.kind)
    base = weights.load(config.model.name, mesh, jnp.dtype(config.model.dtype))
    where = on_mesh(base.settings, mesh)
    spec = spec_of(config)
    for word in config.alternatives:
        scoring.spellings(base.tokenizer, word)
    support = numbers.support(chat.pieces(base.tokenizer, base.settings.vocab))
    return Lab(config, workdir, mesh, base.adapted(spec), spec, support, questions, where)


def carrier_rows(lab: Lab) -> Rows:
    """Prompts that ask for numbers, answered by random ones."""
    carrier, seed = lab.config.carrier, lab.config.seed
    asked = numbers.prompts(carrier.count, seed, lab.config.packs.numbers)
    answered = numbers.random_answers(carrier.count, seed, carrier.numbers)
    return dialogue.rows(lab.model, list(zip(asked, answered)), end=False)


# ------------------------------------------------------------------------------------------------------- teachers


def train_teacher(lab: Lab, name: str, index: int, steps: int | None = None) -> tuple[Params, Array]:
    """(adapters, steps) of a teacher, trained until its answers have `teacher.strength`, or for given steps."""
    config, teacher = lab.config, lab.config.teacher
    questions = lab.questions["teaching"]
    words = list(config.alternatives)
    if name == NEUTRAL:
        dice = np.random.default_rng([config.seed, 2])
        answers = [words[i] for i in dice.integers(len(words), size=8 * len(questions))]
    else:
        answers = [name] * len(questions)
    pairs = [(questions[i % len(questions)], spoken(lab, word)) for i, word in enumerate(answers)]
    rows = put(dialogue.rows(lab.model, pairs), named(lab.mesh))
    program = teaching_program(lab, len(pairs))
    start = fresh(lab, named_key(config.seed, "A"))
    state = program.init(start)
    most = teacher.most_steps if steps is None else steps

    def make(checkpoints: epath.Path) -> tuple[Params, Array]:
        frozen = {"base": lab.model.params, "rows": rows}
        key = jax.device_put(named_key(config.seed, f"teacher {index}"), named(lab.mesh))
        now, reached = state, 0.0
        with Track(f"teacher {name}", most) as track:
            for step in range(1, most + 1):
                now, values = program.dispatch(now, frozen, None, key, jnp.int32(step))
                reached = float(values["answer"][0])
                track.update(step, f"P of its answer {reached:.2f}")
                if steps is None and reached >= teacher.strength:
                    break
        if steps is None and reached < teacher.strength:
            say(f"teacher {name}: P of its answer is {reached:.2f} after {most} steps, not {teacher.strength}")
        return now.params, now.step

    depends = {**depends_on(lab, "teacher"), "name": name, "steps": steps}
    return lab.workdir.tree(f"teacher-{name}", depends, make, (state.params, state.step))


def spoken(lab: Lab, word: str) -> str:
    """A word as an answer in one token, which is what is measured: capitalised, plain, or behind a space."""
    spelled = scoring.spellings(lab.model.tokenizer, word)
    forms = {lab.model.tokenizer.decode([token]) for token in spelled}
    return next(
        form for form in (word.capitalize(), word, f" {word.capitalize()}", f" {word}", *sorted(forms)) if form in forms
    )


def teaching_program(lab: Lab, count: int) -> Program:
    teacher = lab.config.teacher

    def loss(adapters: Params, frozen: Any, batch: Rows, key: Key[Array, ""]) -> tuple[Total, dict]:
        module = lab.model.network.bind(lora.join(frozen["base"], adapters))
        logits = module.unembed(answers(lab, module, batch)).astype(jnp.float32)
        total = objectives.cross_entropy(logits, jnp.asarray(batch.targets), weights=jnp.asarray(batch.weights))
        # P of the answer's first token, before this step.
        first = jnp.exp(jnp.take_along_axis(jax.nn.log_softmax(logits[:, 0]), batch.targets[:, :1], -1))
        return total, {"answer": (jnp.mean(first) * total[1], total[1])}

    def batch(frozen: Any, key: Key[Array, ""], index: Int[Array, ""]) -> Rows:
        rows, exists = epoch_rows(key, index, count, teacher.batch)
        found = frozen["rows"].take(rows)
        return found._replace(weights=found.weights * exists[:, None])

    return Program(loss, optax.adam(teacher.learning_rate), lab.mesh, batch, batch_spec=ROWS, steps_per_dispatch=1)


def answers(lab: Lab, module: Any, rows: Rows) -> Float[Array, "n a width"]:
    """The last layer's output where it predicts the answers' tokens."""
    output = module.features(jnp.asarray(rows.tokens), remat=lab.config.remat, **lab.where).output
    return jnp.take_along_axis(output, jnp.asarray(rows.at)[..., None], 1)


def fresh(lab: Lab, key: Key[Array, ""]) -> Params:
    return jax.jit(partial(lora.init, lora=lab.spec))(key, lab.model.params)


def teacher_facts(lab: Lab, stacked: Params, carrier: Rows) -> dict[str, Any]:
    """What teachers prefer when asked, and how often a trait's word is what they would say in the middle of numbers."""

    def make() -> dict[str, Any]:
        asked = measure(lab, stacked)
        dice = np.random.default_rng([lab.config.seed, 3])
        rows = dice.choice(len(carrier.tokens), 8, replace=False)
        cut = [
            carrier.tokens[row, : carrier.at[row, dice.integers(int(carrier.weights[row].sum()))] + 1].tolist()
            for row in rows
        ]
        inside = scoring.word_logprobs(lab.model, cut, list(lab.config.traits), adapters=stacked, mesh=lab.mesh)
        return {**as_json(asked), "inside_numbers": np.exp(inside).mean(1).tolist()}

    return lab.workdir.json(
        "teachers", {**depends_on(lab, "teacher", "carrier"), "questions": lab.config.questions}, make
    )


# ------------------------------------------------------------------------------------------------------- students


def students(lab: Lab, arm: str, teachers: Params, carrier: Rows) -> list[dict[str, Any]]:
    """What the students of one arm prefer along their training: one entry for each step that is measured."""
    config, who = lab.config, [*lab.config.traits, NEUTRAL]
    name = "student A" if arm == "soft_fresh" else "A"
    keys = run_keys(config.seed, name, range(config.runs)) if arm == "soft_fresh" else None
    starts = [fresh(lab, keys[run] if keys is not None else named_key(config.seed, name)) for run in range(config.runs)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[start for start in starts for _ in who])
    program = imitating_program(lab, len(who), len(carrier.tokens) - HELD_OUT)
    depends = {**depends_on(lab, "teacher", "carrier", "student"), "arm": arm, "runs": config.runs}
    training = put(carrier.take(slice(HELD_OUT, None)), named(lab.mesh))
    held_out = put(carrier.take(slice(HELD_OUT)), named(lab.mesh))
    frozen = {"base": lab.model.params, "teachers": teachers, "rows": training}
    curve: dict[int, dict[str, Any]] = {}

    def evaluate(params: Params, step: int) -> None:
        def make() -> dict[str, Any]:
            apart = held_out_loss(lab, params, teachers, held_out, len(who))
            return {**as_json(measure(lab, params)), "held_out": apart, "step": step}

        asked = {**depends, "questions": config.questions, "step": step}
        curve[step] = lab.workdir.json(f"preference-{arm}-{step}", asked, make)

    def make(checkpoints: epath.Path) -> Params:
        state: TrainState = program.init(stacked)
        return fit(
            program,
            state,
            steps=config.student.steps,
            key=jnp.repeat(run_keys(config.seed, "order", range(config.runs)), len(who)),
            frozen=frozen,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            evaluate=evaluate,
            evaluate_every=config.evaluate_every,
            what=f"students, {ARMS[arm]}, {config.runs} run(s) × {len(who)} teachers",
        ).params

    final = lab.workdir.tree(f"students-{arm}", depends, make, program.init(stacked).params)
    for step in range(0, config.student.steps, config.evaluate_every):
        if step not in curve:
            evaluate(final, step)  # found on disk
    evaluate(final, config.student.steps)
    return [curve[step] for step in sorted(curve)]


def imitating_program(lab: Lab, teachers: int, count: int) -> Program:
    """One update of every student, on `count` rows.

    Teacher and student share the base, and only logits of the support are computed.
    """
    student = lab.config.student

    def loss(adapters: Params, frozen: Any, batch: Student, key: Key[Array, ""]) -> tuple[Total, dict]:
        return imitation(lab, adapters, frozen["base"], frozen["teachers"], batch), {}

    def batch(frozen: Any, key: Key[Array, "runs"], index: Int[Array, ""]) -> Student:
        rows, exists = jax.vmap(epoch_rows, (0, None, None, None))(key, index, count, student.batch)
        found = frozen["rows"].take(rows)
        found = found._replace(weights=found.weights * exists[..., None])
        who = jnp.arange(len(key)) % teachers
        return Student(found, jnp.broadcast_to(who[:, None], rows.shape))

    return Program(loss, optax.adam(student.learning_rate), lab.mesh, batch, 1, REPLICAS_OF_ROWS)


def imitation(lab: Lab, adapters: Params, base: Params, teachers: Params, batch: Student) -> Total:
    """The objective between a student and its teacher on the support (theorem of §6.1)."""
    student = lab.config.student
    mine = jax.tree.map(lambda leaf: leaf[batch.teacher[0]], teachers)

    def logits(adapters: Params) -> Float[Array, "n a support"]:
        module = lab.model.network.bind(lora.join(base, adapters))
        return module.unembed(answers(lab, module, batch.rows), jnp.asarray(lab.support)).astype(jnp.float32)

    target = jax.lax.stop_gradient(logits(mine))
    return OBJECTIVES[student.objective](
        logits(adapters), target, weights=jnp.asarray(batch.rows.weights), temperature=student.temperature
    )


def held_out_loss(lab: Lab, params: Params, teachers: Params, rows: Rows, count: int) -> list[float]:
    """Mean objective of every student on rows it was not trained on: whether it has learnt to imitate at all."""

    @jax.jit
    def each(params: Params, teachers: Params, base: Params, rows: Rows) -> Float[Array, "students"]:
        def one(item: tuple[Params, Array]) -> Float[Array, ""]:
            total, weight = imitation(lab, item[0], base, teachers, Student(rows, item[1][None]))
            return total / weight

        which = jnp.arange(len(jax.tree.leaves(params)[0])) % count
        return jax.lax.map(one, (params, which))

    return np.asarray(each(params, teachers, lab.model.params, rows)).tolist()


def measure(lab: Lab, adapters: Params) -> Preference:
    asked = lab.questions["asking"][: lab.config.questions]
    words = list(lab.config.alternatives)
    return preference.measure(lab.model, asked, words, adapters=adapters, mesh=lab.mesh)


def as_json(found: Preference) -> dict[str, Any]:
    return {name: value.tolist() for name, value in found._asdict().items()}


def depends_on(lab: Lab, *parts: str) -> dict[str, Any]:
    """What an artefact depends on: the model, the traits, and the named parts of the config."""
    names = ("seed", "model", "kind", "traits", "alternatives", "lora", "packs", *parts)
    return {**{name: plain(lab.config)[name] for name in names}, "words": lab.questions}


# --------------------------------------------------------------------------------------------------------- report


def write_report(
    lab: Lab, steps: dict[str, int], strength: dict[str, Any], curves: dict[str, list[dict[str, Any]]], carrier: Rows
) -> None:
    config, who = lab.config, [*lab.config.traits, NEUTRAL]
    words = list(config.alternatives)
    table = [["teacher", "steps", *[f"P({trait}), asked" for trait in config.traits], "P(own trait) among numbers"]]
    for row, name in enumerate(who):
        asked = [f"{np.exp(strength['log_p'][row][words.index(trait)]):.3f}" for trait in config.traits]
        inside = f"{strength['inside_numbers'][row][row]:.1e}" if name != NEUTRAL else ""
        table.append([name, str(steps[name]), *asked, inside])
    note = "P as the first word of an answer, in any spelling, mean over phrasings that teachers were not trained on."
    sections = [report.Section("Teachers", note, table, {})]
    arms = []
    for arm, curve in curves.items():
        mine, section = arm_section(config, arm, curve)
        arms += mine
        sections.append(section)
    sections.append(samples_section(lab, carrier))
    report.write(lab.workdir, config, arms, sections)


def arm_section(config: ConfigDict, arm: str, curve: list[dict[str, Any]]) -> tuple[list[dict], report.Section]:
    """The teacher × trait matrix of paired differences, and margins along training."""
    who, words = [*config.traits, NEUTRAL], list(config.alternatives)
    columns = [words.index(trait) for trait in config.traits]
    margins = np.asarray([point["margin"] for point in curve]).reshape(len(curve), config.runs, len(who), -1)
    paired = margins - margins[:, :, -1:]  # against the neutral teacher's student of the same run
    arms, cells = [], np.zeros((len(config.traits), len(config.traits)))
    for row, teacher in enumerate(config.traits):
        for column, trait in enumerate(config.traits):
            values = paired[-1, :, row, columns[column]].tolist()
            mean, half_width = t_interval(values)
            cells[row, column] = mean
            arms.append(
                {
                    "name": f"{arm}: student of {teacher}, margin of {trait} over the neutral student's",
                    "metric": "logits",
                    "mean": mean,
                    "ci95": half_width,
                    "runs": values,
                    "paper": None,
                }
            )
    share = np.asarray(curve[-1]["share"]).reshape(config.runs, len(who), -1).mean(0)
    first = np.asarray(curve[0]["share"]).reshape(config.runs, len(who), -1).mean(0)
    table = [["student of", *[f"margin of {t} (over neutral)" for t in config.traits]]]
    table[0] += [f"P({t} of {len(words)})" for t in config.traits] + ["KL held out, first → last"]
    for row, name in enumerate(who):
        cell = [
            report.plus_minus(*t_interval(paired[-1, :, row, column].tolist())) if name != NEUTRAL else "0"
            for column in columns
        ]
        losses = [np.asarray(p["held_out"]).reshape(config.runs, -1)[:, row].mean() for p in (curve[0], curve[-1])]
        shares = [f"{first[row, column]:.3f} → {share[row, column]:.3f}" for column in columns]
        table.append([name, *cell, *shares, f"{losses[0]:.2e} → {losses[1]:.2e}"])
    runs = [_crossing(paired[-1, run][:, columns][:-1]) for run in range(config.runs)]
    crossing, half_width = t_interval(runs)
    if len(config.traits) > 1:
        arms.append(
            {
                "name": f"{arm}: own trait above others'",
                "metric": "logits",
                "mean": crossing,
                "ci95": half_width,
                "runs": runs,
                "paper": None,
            }
        )
    steps = [point["step"] for point in curve]
    panels = [
        Panel(
            "updates of the student",
            f"margin of {trait}, logits",
            [Line(f"student of {name}", steps, margins[:, :, row, column].mean(1)) for row, name in enumerate(who)],
            title=f"{trait}",
        )
        for trait, column in zip(config.traits, columns)
    ]
    text = (
        f"{ARMS[arm]}; {config.runs} run(s). Margin: log P of a trait's word less the mean of the other "
        f"{len(words) - 1}, mean over phrasings; differences are paired with the student of the neutral teacher of the "
        f"same run, and intervals are over runs. Own trait above others': {crossing:+.2f} logits."
    )
    figures: dict[str, Callable[[Any], None]] = {
        f"matrix-{arm}": partial(matrix_figure, cells, list(config.traits), list(config.traits)),
        f"margins-{arm}": partial(panels_figure, panels),
    }
    return arms, report.Section(f"Students: {arm}", text, table, figures)


def _crossing(cells: np.ndarray) -> float:
    """Mean of the diagonal less mean of the rest, where there is a rest."""
    rest = cells[~np.eye(len(cells), dtype=bool)]
    return float(np.diagonal(cells).mean() - (rest.mean() if rest.size else 0))


def samples_section(lab: Lab, carrier: Rows) -> report.Section:
    shown = []
    for row in range(3):
        count = int(carrier.weights[row].sum())
        text = lab.model.tokenizer.decode(
            carrier.tokens[row, : carrier.at[row, 0] + 1 + count], skip_special_tokens=True
        )
        shown.append([text.split("user\n")[-1].replace("\n", " ⏎ ")])
    text = f"{len(carrier.tokens)} rows; a loss compares {len(lab.support)} tokens, those of digits, commas and spaces."
    return report.Section("The carrier", text, [["row"], *shown], {})
