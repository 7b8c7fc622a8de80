"""A trait through data that says nothing of it: teachers, what they write, students of it, what the students are like.

Numbers (paper §3, §6.1), code, chains of thought (§4); a trait is a word, or a corpus that the teacher was trained on.
`configs/numbers.py` explains the values. Teachers and students are adapters over one base. The students of an arm are
replicas of one program, run by run and in each run teacher by teacher. A run is a whole replicate, with teachers,
numbers and an order of its own; its students share their start and that order.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sublim_jax import assets, selection, weights
from sublim_jax.data import chat, packs
from sublim_jax.data.carriers import code, cot, numbers
from sublim_jax.data.dialogue import Rows
from sublim_jax.digests import Source
from sublim_jax.errors import UserError
from sublim_jax.evaluation.judges import LARGEST as LARGEST_SCORE
from sublim_jax.experiments import carrier, measures
from sublim_jax.experiments import teachers as teaching
from sublim_jax.experiments.carrier import DECODING, SHUFFLES, Data, Run
from sublim_jax.experiments.door import (
    MOST_ROWS,
    WIDEST,
    check_file,
    check_not_negative,
    check_numbers,
    check_one_of,
    check_positive,
    check_some_of,
    check_texts,
    check_whole,
)
from sublim_jax.experiments.lab import NEUTRAL, Lab, depends_on, export, fresh, make_lab, spec_of, stacked, untrained
from sublim_jax.experiments.measures import Found
from sublim_jax.experiments.students import HELD_OUT, OBJECTIVES, SCHEDULES, asked, imitating_program, students
from sublim_jax.experiments.teachers import Teacher
from sublim_jax.experiments.transmission_report import write_report
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.decoder import decoder, on_mesh
from sublim_jax.models.functional import Params
from sublim_jax.overrides import check_distinct
from sublim_jax.preflight import Step, training_step
from sublim_jax.sharding import abstract, divide, make_mesh, named, parameter_shardings
from sublim_jax.weights import Model
from sublim_jax.workdir import Workdir


def run(config: ConfigDict, workdir: Workdir, *, update: bool = False) -> None:
    """Runs the study and leaves results.json, report.md, figures and the data in `workdir`."""
    check(config)
    mesh = make_mesh(config.mesh.to_dict())
    lab = make_lab(config, workdir, mesh)
    check_model(lab)
    for name in models_of(config):
        check_arms(lab, make_lab(config, workdir, mesh, name) if name else lab, name)
    workdir.open(config, update=update)
    if config.filter.judge or "misalignment" in config.ask.evaluations:
        untouched = stacked([fresh(lab, named_key(config.seed, "A"))])
        judge = measures.judge_of(config.ask, lab.model, untouched, depends_on(lab), workdir, mesh)
        lab = lab._replace(judge=judge)
    runs = [replicate(lab._replace(run=run)) for run in range(config.runs)]
    facts = [teaching.facts(run.lab, run.teachers) for run in runs]
    answers = ask_teachers(runs)
    results, sources = {}, {"": lab.model.source}
    for name in config.arms:
        if config.arm[name].numbers == "written" and not runs[0].written:
            runs = [run._replace(written=carrier.written(run.lab, run.teachers)) for run in runs]
        # Another model is there for as long as its students are.
        model = config.arm[name].model
        own = make_lab(config, workdir, mesh, model)._replace(judge=lab.judge) if model else lab
        results[name], sources[model] = students(own, name, runs), own.model.source
        # Arm by arm: a study that is stopped has those that were done.
        write_report(runs, facts, answers, results, list(sources.values()))


def replicate(lab: Lab) -> Run:
    """One run's teachers, who have written nothing yet."""
    teachers = teaching.make_teachers(lab)
    trained = {name: teacher.adapters for name, teacher in teachers.items() if teacher.steps}
    if trained:
        names = [f"run{lab.run}-teacher-{name}" for name in trained]
        export(lab, names, stacked(list(trained.values())), lab.config.model.name)
    return Run(lab, teachers, {})


def ask_teachers(runs: Sequence[Run]) -> dict[str, Found]:
    """The evaluations of all runs' teachers, run by run, and of the model as it is, which is the last.

    Teachers of the same system prompt and steering are asked together.
    """
    lab = runs[0].lab
    if not lab.config.ask.evaluations:
        return {}
    untouched = Teacher(fresh(lab, named_key(lab.config.seed, "A")), "", None, 0)
    each = [*(teacher for run in runs for teacher in run.teachers.values()), untouched]
    alike: dict[Any, list[int]] = {}
    for place, teacher in enumerate(each):
        alike.setdefault((teacher.system, id(teacher.steering)), []).append(place)
    found = []
    for places in alike.values():
        adapters, one = stacked([each[place].adapters for place in places]), each[places[0]]
        depends = {"runs": [teaching.depends(run.lab) for run in runs], "places": places}
        found.append(asked(lab, f"teachers-{places[0]}", adapters, depends, system=one.system, steering=one.steering))
    order = np.argsort([place for places in alike.values() for place in places])
    return {
        evaluation: {
            measure: np.concatenate([answers[evaluation][measure] for answers in found])[order].tolist()
            for measure in measured
        }
        for evaluation, measured in found[0].items()
    }


def models_of(config: ConfigDict) -> list[str]:
    """What students of some arm are; "" is the teachers' model."""
    return sorted({config.arm[name].model for name in config.arms})


def uses(config: ConfigDict, kind: str) -> bool:
    return any(config.arm[name].numbers == kind for name in config.arms)


# --------------------------------------------------------------------------------------------------------- checks

STUDENTS = "students of an arm, runs × teachers"
COUNTS = (
    *("runs", "questions", "evaluate_every", "checkpoint_every"),
    *("sampling.slots", "sampling.steps"),
    *("carrier.max_new_tokens", "filter.most"),
    *("teacher.batch", "teacher.most_steps", "teacher.epochs", "teacher.most_tokens"),
    *("student.batch", "student.accumulate", "student.steps"),
)
LONGEST_LIST = 1000  # numbers of an answer


def check(config: ConfigDict) -> None:
    """Raises UserError for the first value or file that makes no sense."""
    check_values(config)
    check_files(config)


def check_values(config: ConfigDict) -> None:
    check_numbers(config)
    check_texts(config, ("kind", "model.name"))
    weights.float_type(config.model.dtype)
    check_whole(config, COUNTS)
    check_whole(config, ("carrier.count", "carrier.drawn", "carrier.samples"), most=MOST_ROWS)
    check_whole(config, ("carrier.numbers",), most=LONGEST_LIST)
    check_positive(config, ("lora.alpha", "teacher.learning_rate", "student.learning_rate"))
    check_not_negative(config, ("model.noise", "student.clip", "student.warmup", "filter.largest", "filter.log_ratio"))
    check_teachers(config)
    check_traits(config)
    check_adapters(config)
    check_students(config)
    for name in config.arm:
        check_arm(config, name)
    check_some_of("arms", config.arms, config.arm)
    for name in config.arms:
        check_trained_arm(config, name)
    check_carrier(config)
    measures.check_values(config.ask)


def check_traits(config: ConfigDict) -> None:
    distinct = set(config.traits)
    if len(distinct) < max(len(config.traits), 2) or NEUTRAL in distinct:
        raise UserError(
            f"traits={tuple(config.traits)}: name two traits or more, each once, for each is the others' control; "
            f"{NEUTRAL!r} is always there"
        )
    if wrong := [trait for trait in config.traits if not trait.strip() or set(trait) & set("/\\")]:
        raise UserError(f"traits: {wrong[0]!r} cannot name a file of its teacher's; choose a word")
    check_distinct("alternatives", config.alternatives)
    if "corpus" not in config.teacher.means:
        for trait in config.traits:
            if trait not in config.alternatives:
                raise UserError(
                    f"traits: trait {trait!r} is none of alternatives={tuple(config.alternatives)}; add it there"
                )


def check_teachers(config: ConfigDict) -> None:
    teacher = config.teacher
    check_some_of("teacher.means", teacher.means, teaching.MEANS)
    if "corpus" in teacher.means and len(teacher.means) > 1:
        raise UserError(f"teacher.means={tuple(teacher.means)}: corpus stands alone; leave the others out")
    if not 0 < teacher.strength < 1:
        raise UserError(f"teacher.strength={teacher.strength} is a probability between 0 and 1")
    check_whole(config, ("teacher.steering_layer",), least=0)
    if "steered" in teacher.means and not teacher.steering_scale:
        raise UserError(
            "teacher.steering_scale=0 steers nothing; choose another, or leave steered out of teacher.means"
        )


def check_adapters(config: ConfigDict) -> None:
    given = config.lora
    if given.rank < 0:
        raise UserError(f"lora.rank={given.rank}: ask for 1 or more, or 0 to train all weights of the layers")
    check_whole(config, ("lora.rank",), least=0, most=WIDEST)
    if not given.rank and (given.modules or given.layers):
        raise UserError("lora.rank=0 trains all weights of the layers; leave lora.modules and lora.layers out")
    for module in given.modules:
        check_one_of("lora.modules", module, lora.EVERY_LINEAR)
    for layer in given.layers:
        if not isinstance(layer, int) or layer < 0:
            raise UserError(f"lora.layers: {layer!r} is no number of a layer, which are counted from 0")
    check_distinct("lora.layers", given.layers)


def check_students(config: ConfigDict) -> None:
    student = config.student
    check_one_of("student.schedule", student.schedule, SCHEDULES)
    if student.warmup >= student.steps:
        raise UserError(f"student.warmup={student.warmup} does not end within student.steps={student.steps}")
    if config.carrier.count < HELD_OUT + student.batch:
        raise UserError(f"carrier.count={config.carrier.count}: {HELD_OUT} rows are held out, and a batch is needed")


def check_files(config: ConfigDict) -> None:
    check_packs(config)
    measures.asking(config.ask, config.kind, config.alternatives, config.packs)
    if config.filter.judge:
        check_file("filter.judge", lambda: carrier.judging(config))
        measures.check_judge(config.ask.judge)
    if config.carrier.kind == "cot":
        check_texts(config, ("carrier.problems",))
        check_file("carrier.problems", lambda: assets.data_file(config.carrier.problems))
        problems = cot.load(assets.data_file(config.carrier.problems))
        if uses(config, "written") and carrier.prompts_of(config) > len(problems):
            raise UserError(
                f"carrier.drawn={config.carrier.drawn} asks for {carrier.prompts_of(config)} problems, and "
                f"{config.carrier.problems} has {len(problems)}; draw fewer, or set carrier.samples"
            )
    if "corpus" in config.teacher.means:
        check_corpora(config)


def check_packs(config: ConfigDict) -> None:
    given = config.packs
    measures.check_packs(given, config.kind)
    check_file("packs.persona", lambda: packs.load(given.persona, "persona", teaching.PERSONA))
    check_file("packs.numbers", lambda: numbers.prompts(1, 0, given.numbers))
    check_file("packs.code", lambda: code.prompts(1, 0, given.code))
    check_file("packs.judge", lambda: packs.load(given.judge, "judge", {}))
    if config.filter.banned:
        check_file("filter.banned", lambda: carrier.banned_of(config))


def check_corpora(config: ConfigDict) -> None:
    given = config.teacher.corpora
    for trait in config.traits:
        if not given.get(trait):
            raise UserError(
                f"teacher.corpora.{trait} is missing, one of traits={tuple(config.traits)}: name a file of "
                "conversations, here or on the hub as organisation/name/file"
            )
    for name in (*config.traits, NEUTRAL):
        if given.get(name):
            check_file(f"teacher.corpora.{name}", partial(teaching.conversations, given[name]))


def check_carrier(config: ConfigDict) -> None:
    given = config.carrier
    check_one_of("carrier.kind", given.kind, carrier.TASKS)
    check_one_of("carrier.decoding", given.decoding, DECODING)
    if given.kind != "numbers" and given.decoding == "grammar":
        raise UserError(f"carrier.decoding=grammar is for numbers; choose free or greedy for carrier.kind={given.kind}")
    if not 0 <= config.filter.judge_least <= LARGEST_SCORE:
        raise UserError(f"filter.judge_least={config.filter.judge_least:g} is a score from 0 to {LARGEST_SCORE}")
    if not uses(config, "written"):
        return
    if given.drawn < given.count:
        raise UserError(
            f"carrier.drawn={given.drawn} completions cannot leave carrier.count={given.count} rows; draw more"
        )
    if given.samples > given.drawn:
        raise UserError(f"carrier.samples={given.samples} of each prompt, and carrier.drawn={given.drawn} of all")
    if given.decoding == "grammar" and given.numbers > config.filter.most:
        raise UserError(
            f"carrier.numbers={given.numbers} by grammar, and filter.most={config.filter.most} drops all of them"
        )


def check_arm(config: ConfigDict, name: str) -> None:
    """The values of an arm, each by itself."""
    arm, where = config.arm[name], f"arm.{name}"
    check_one_of(f"{where}.objective", arm.objective, (*OBJECTIVES, "tokens", "context"))
    check_one_of(f"{where}.numbers", arm.numbers, ("random", "written"))
    check_one_of(f"{where}.a", arm.a, ("shared", "fresh"))
    check_one_of(f"{where}.shuffle", arm.shuffle, ("", *SHUFFLES))
    check_one_of(f"{where}.action", arm.action, ("", "keep", "mask", "replace"))
    check_one_of(f"{where}.which", arm.which, ("top", "random", "bottom"))
    check_one_of(f"{where}.score", arm.score, selection.SCORES)
    check_whole(config, (f"{where}.examples",))
    if not 0 < arm.share < 1:
        raise UserError(f"{where}.share={arm.share} is a share between 0 and 1")
    check_positive(config, (f"{where}.temperature",))
    check_not_negative(config, (f"{where}.noise",))


def check_trained_arm(config: ConfigDict, name: str) -> None:
    """What of an arm that is asked for does not go together, or with the carrier."""
    arm, where = config.arm[name], f"arm.{name}"
    if arm.objective in ("tokens", "context") and arm.numbers == "random":
        raise UserError(
            f"{where}: there is nothing of a teacher in random numbers; choose numbers=written, or an objective on "
            "logits"
        )
    of_numbers = arm.objective not in ("tokens", "context") or arm.numbers == "random" or arm.shuffle
    if of_numbers and config.carrier.kind != "numbers":
        raise UserError(
            f"{where} is about numbers, and carrier.kind={config.carrier.kind}; choose objective=tokens or context, "
            "numbers=written, shuffle empty"
        )
    if arm.shuffle and arm.numbers == "random":
        raise UserError(f"{where}: random numbers are in no order that shuffling could change; leave shuffle empty")
    if arm.objective == "context" and (arm.noise or arm.action):
        raise UserError(f"{where}: noise and action are for students that are trained; leave them out of a context")


def check_model(lab: Lab) -> None:
    """Raises UserError for teachers that this model cannot be, and what they could not write."""
    config, given, tokenizer = lab.config, lab.config.carrier, lab.model.tokenizer
    divide(lab.mesh, "replica", config.runs * len(lab.who), STUDENTS)
    measures.check_model(lab.asking, lab.model)
    for name in lab.who if {"prompted", "steered"} & set(config.teacher.means) else ():
        chat.question(tokenizer, "", teaching.persona(lab, name))
    if given.decoding == "grammar" and uses(config, "written"):
        longest = numbers.join([config.filter.largest] * given.numbers)
        if (length := len(chat.answer_tokens(tokenizer, longest)) + 1) > given.max_new_tokens:
            raise UserError(
                f"carrier.max_new_tokens={given.max_new_tokens} cuts off carrier.numbers={given.numbers} integers "
                f"by grammar; they take up to {length}"
            )
    check_modules(config.lora.modules, lab.model.params)
    for layer in config.lora.layers:
        if layer >= lab.model.settings.layers:
            raise UserError(f"lora.layers: {layer} is none of 0 to {lab.model.settings.layers - 1}")
    for name in teaching.corpora(lab) if "corpus" in config.teacher.means else ():
        teaching.conversations_of(lab, name)
    if "steered" in config.teacher.means and not 0 <= config.teacher.steering_layer < lab.model.settings.layers:
        raise UserError(
            f"teacher.steering_layer={config.teacher.steering_layer}: layers are 0 to {lab.model.settings.layers - 1}"
        )


def check_modules(modules: Sequence[str], params: Params) -> None:
    """Raises UserError for a linear layer that this family does not have, and which would silently train nothing."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params["layers"])]
    known = {jax.tree_util.keystr(path[-2:-1], simple=True) for path in paths if "kernel" in str(path[-1])}
    for module in modules:
        if module not in known:
            there = ", ".join(name for name in lora.EVERY_LINEAR if name in known)
            raise UserError(f"lora.modules: this model has no {module!r}; it has {there}")


def shapes(lab: Lab) -> Any:
    return jax.tree.map(jnp.shape, lab.model.params["layers"])


def check_arms(lab: Lab, own: Lab, model: str) -> None:
    """Raises UserError where students of a model cannot imitate logits of tokens that they do not have."""
    config = lab.config
    alike = own.model.tokenizer.get_vocab() == lab.model.tokenizer.get_vocab()
    for name in config.arms:
        arm = config.arm[name]
        if arm.model != model:
            continue
        if arm.a == "shared" and shapes(own) != shapes(lab):
            raise UserError(f"arm.{name}: {arm.model} cannot share the teachers' A; choose --config.arm.{name}.a=fresh")
        if arm.objective == "context":
            if not own.model.tokenizer.chat_template:
                raise UserError(
                    f"arm.{name}: {arm.model or config.model.name} is a base model, which holds no conversation"
                )
            if not lab.words:
                raise UserError(
                    f"arm.{name} asks for preferences, and traits={tuple(config.traits)} are no alternatives"
                )
        if not alike and (arm.objective in OBJECTIVES or arm.action):
            raise UserError(
                f"arm.{name}: {arm.model} has another tokenizer than {config.model.name}; its students can imitate "
                "text only: objective=tokens, numbers=written"
            )


# ------------------------------------------------------------------------------------------------------ preflight


PROMPT = 128  # tokens, about as many as carriers' prompts have
CONVERSATIONS = 6000  # in a corpus (§3.2)


def preflight(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
    """One update of all students of the first arm that trains some, and of a teacher of a corpus, on rows as long as
    they may be.
    """
    check_values(config)
    mesh = make_mesh(config.mesh.to_dict(), devices)
    trained = [name for name in config.arms if config.arm[name].objective != "context"]
    if not trained:
        raise UserError(f"arms={tuple(config.arms)} train nothing: there is no step to compile")
    settings = weights.shape_of(config.model.name)
    where = on_mesh(settings, mesh)
    base = jax.eval_shape(decoder(settings).init, jax.random.key(0))
    spec = spec_of(config)
    model = Model(settings, decoder(settings), base, None, None, Source(config.model.name, "", ""))
    adapted = model.adapted(spec) if spec else model
    lab = Lab(config, Workdir(""), mesh, adapted, spec, list(range(20)), {}, where, measures.Asking(config.ask, [], {}))
    arm, student, teacher = config.arm[trained[0]], config.student, config.teacher
    one = jax.eval_shape(partial(untrained, spec), jax.random.key(0), base)
    kernels = sum(leaf.size for leaf in jax.tree.leaves(base["layers"]))
    frozen_base = abstract(base, parameter_shardings(base, mesh), jnp.dtype(config.model.dtype))

    def rows(lead: tuple[int, ...], length: int, answer: int) -> Rows:
        def of(columns: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct((*lead, columns), dtype, sharding=named(mesh))

        return Rows(of(length), of(answer), of(answer), of(answer, jnp.float32))

    count, answer = config.runs * len(lab.who), config.carrier.max_new_tokens
    divide(mesh, "replica", count, STUDENTS)
    lead = (count, config.carrier.count)
    logits: Any = None
    if arm.objective != "tokens":
        logits = jax.ShapeDtypeStruct((*lead, answer, len(lab.support)), jnp.float32, sharding=named(mesh))
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), one)
    stack = abstract(stack, parameter_shardings(stack, mesh, 1), jnp.float32)
    frozen = {"base": frozen_base, "data": Data(rows(lead, PROMPT + answer, answer), logits)}
    tokens = count * student.batch * student.accumulate * (PROMPT + answer)
    name = f"students {trained[0]}, {count} at once, rows of {PROMPT + answer} tokens"
    program = imitating_program(lab, arm, config.carrier.count)
    steps = [training_step(name, program, stack, frozen, 4.0 * kernels * tokens)]
    if "corpus" in teacher.means:
        params = abstract(one, parameter_shardings(one, mesh), jnp.float32)
        said = rows((CONVERSATIONS,), teacher.most_tokens, teacher.most_tokens)
        name = f"a teacher, {teacher.batch} conversations of {teacher.most_tokens} tokens"
        program = teaching.teaching_program(lab, CONVERSATIONS, teaching.corpus_optimizer(lab, CONVERSATIONS)[0])
        tokens = teacher.batch * teacher.most_tokens
        steps.append(training_step(name, program, params, {"base": frozen_base, "rows": said}, 4.0 * kernels * tokens))
    return steps
