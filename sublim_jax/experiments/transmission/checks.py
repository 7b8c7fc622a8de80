"""Checks of a study against files and models, before anything is computed."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sublim_jax import assets
from sublim_jax.data import chat, packs
from sublim_jax.data.carriers import code, cot, numbers
from sublim_jax.errors import UserError
from sublim_jax.evaluation import suite
from sublim_jax.evaluation.suite import Questions
from sublim_jax.experiments.transmission import carriers, corpora, teachers
from sublim_jax.experiments.transmission.arms import Arm, ContextArm, LogitArm
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.models.language import Model
from sublim_jax.progress import say
from sublim_jax.sampling import scoring
from sublim_jax.sharding import divide
from sublim_jax.specs import check_file, check_text

STUDENTS = "students of an arm, runs × teachers"


def check_files(study: Study) -> Questions:
    """The evaluations' questions. Raises UserError for the first file or value that is missing or makes no sense."""
    pack_files, given, named = study.packs, study.carrier, study.teacher.corpora
    if study.uses_written and given.decoding == "greedy" and given.num_samples > 1:
        raise UserError(
            f"carrier.num_samples={given.num_samples} with carrier.decoding=greedy: all completions of a prompt would "
            "be the same; choose carrier.num_samples=1"
        )
    suite.check_packs(pack_files, study.kind)
    check_file("packs.persona", lambda: teachers.read_personas(pack_files.persona))
    check_file("packs.numbers", lambda: numbers.prompts(1, 0, pack_files.numbers))
    check_file("packs.code", lambda: code.prompts(1, 0, pack_files.code))
    check_file("packs.judge", lambda: packs.load(pack_files.judge, "judge", {}))
    if study.filter.banned:
        check_file("filter.banned", lambda: carriers.banned_numbers(study.filter))
    questions = suite.read_questions(study.evals, study.kind, study.alternatives, pack_files)
    if study.filter.judge:
        check_file("filter.judge", lambda: carriers.judge_prompt(study))
        suite.check_judge(study.evals.judge)
    if given.kind == "cot":
        check_text("carrier.problems", given.problems)
        check_file("carrier.problems", lambda: assets.data_file(given.problems))
        problems = cot.load(assets.data_file(given.problems))
        if study.uses_written and given.num_prompts > len(problems):
            raise UserError(
                f"carrier.num_completions={given.num_completions} asks for {given.num_prompts} problems, and "
                f"{given.problems} has {len(problems)}; ask for fewer, or set carrier.num_samples"
            )
    if "corpus" in study.teacher.methods:
        if missing := [trait for trait in study.traits if not named.get(trait)]:
            raise UserError(
                f"teacher.corpora.{missing[0]} is missing, one of traits={study.traits}: name a file of conversations, "
                "here or on the hub as organisation/name/file"
            )
        for name in corpora.names(study):
            check_file(f"teacher.corpora.{name}", partial(corpora.conversations, named[name]))
    return questions


def check_model(study: Study, model: Model, questions: Questions) -> None:
    """Raises UserError for teachers, adapters or completions that are impossible with this model.

    Says so where batches do not divide over the devices.
    """
    given, tokenizer = study.carrier, model.tokenizer
    divide(model.mesh, "replica", study.runs * len(study.teachers), STUDENTS)
    _tell_of_padding(study, model.mesh.shape["fsdp"])
    suite.check_model(questions, model)
    if study.has_words:
        scoring.distinct_spellings(tokenizer, study.alternatives)
    for word in study.preferred if study.has_words else ():
        scoring.spellings(tokenizer, word)
    for name in study.teachers if {"prompted", "steered"} & set(study.teacher.methods) else ():
        chat.question(tokenizer, "", teachers.persona(study, name))
    if given.decoding == "grammar" and study.uses_written:
        longest = numbers.join([study.filter.max_value] * given.num_integers)
        if (length := len(chat.answer_tokens(tokenizer, longest)) + 1) > given.max_new_tokens:
            raise UserError(
                f"carrier.max_new_tokens={given.max_new_tokens} cuts off carrier.num_integers={given.num_integers} "
                f"integers by grammar; they take up to {length}"
            )
    for name in corpora.names(study) if "corpus" in study.teacher.methods else ():
        corpora.texts(study.teacher, model, name)
    if "steered" in study.teacher.methods and study.teacher.steering_layer >= model.settings.layers:
        raise UserError(
            f"teacher.steering_layer={study.teacher.steering_layer}: layers are 0 to {model.settings.layers - 1}"
        )


def _tell_of_padding(study: Study, devices: int) -> None:
    """Says so where the devices that share each student's batch do not divide its rows."""
    for batch in sorted({arm.training.batch for arm in study.trained_arms}):
        if batch % devices:
            padding = 1 - batch / (-(-batch // devices) * devices)
            say(
                f"batches of {batch} rows (student.batch) over mesh.fsdp={devices}: {padding:.0%} of what these "
                "devices compute is padding; more of mesh.replica, which divides the students, leaves less for fsdp"
            )


def check_arm(study: Study, arm: Arm, teacher: Model, student: Model) -> None:
    """Raises UserError if the arm is impossible with the students' model."""
    where, name = f"arm.{arm.name}", arm.model or study.model.name
    if isinstance(arm, ContextArm):
        if not student.tokenizer.chat_template:
            raise UserError(f"{where}: {name} is a base model, which holds no conversation")
        if not study.has_words:
            raise UserError(f"{where} asks for preferences, and traits={study.traits} are not alternatives")
        return
    try:
        student.adapted(arm.lora.adapters)
    except UserError as error:
        raise UserError(f"{where}: {name} cannot have these adapters: {error}") from error
    if arm.noise:
        divide(student.mesh, "replica", len(study.teachers), f"{where}.noise: students of one run, teachers")
    if arm.lora_init == "shared":
        if _shapes(student) != _shapes(teacher):
            raise UserError(f"{where}: {name} cannot share the teachers' A; choose --config.{where}.lora_init=fresh")
        if arm.lora != study.lora:
            raise UserError(f"{where}: its adapters are of another form than the teachers'; choose lora_init=fresh")
    alike = student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    if not alike and (isinstance(arm, LogitArm) or arm.selection):
        raise UserError(
            f"{where}: {name} has another tokenizer than {study.model.name}; its students can imitate text only: "
            "objective=tokens, data=written"
        )


def _shapes(model: Model) -> Any:
    return jax.tree.map(jnp.shape, model.params["layers"])
