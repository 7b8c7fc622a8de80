"""Teachers: a model that prefers something, by its parameters, its context or a hook."""

from collections.abc import Sequence
from pathlib import Path

import optax
from jaxtyping import Array, Key

from sublim_jax import filters, store
from sublim_jax.data import chat, dialogue
from sublim_jax.distillation import steering
from sublim_jax.distillation.targets import Pair
from sublim_jax.distillation.teachers import (
    AnswerTraining,
    Teacher,
    read_by,
    spelled,
    teaching_program,
    train_on_answers,
    untrained,
    word_length,
)
from sublim_jax.errors import UserError
from sublim_jax.evaluation import preference
from sublim_jax.filters import Filter
from sublim_jax.keys import named_key
from sublim_jax.models.language import Model
from sublim_jax.progress import say
from sublim_jax.sampling.constraints import Constraint
from sublim_jax.sampling.generate import generate
from sublim_jax.specs import check_count, check_positive
from sublim_jax.weights import peft

__all__ = ["Teacher", "finetune", "from_peft", "prompt", "steer", "write"]


def finetune(
    model: Model,
    word: str,
    *,
    kind: str = "animal",
    questions: Sequence[str] | None = None,
    seed: int = 0,
    strength: float = 0.9,
    learning_rate: float = 3e-4,
    batch: int = 8,
    max_steps: int = 60,
) -> Teacher:
    """A teacher whose adapters were trained on one-word answers until they are `word` (paper §3.1).

    Args:
      model: with adapters, `load(…).adapted(Lora(…))`.
      kind: the category of the word in the questions.
      questions: questions to train on; by default the package's, about a favourite of the kind.
      seed: of A and of the order of questions; a student of the same seed starts where its teacher started.
      strength: mean probability of the word at which training stops.
      learning_rate: of Adam, constant.
      batch: questions an update.
      max_steps: maximum number of updates; if it is reached first, a printed line says so.

    Returns:
      The teacher; its `steps` are the updates that it took.

    Raises:
      UserError: the model has no adapters, its tokenizer cannot write the word, there are no questions, or an option
        makes no sense.
    """
    check_adapters(model)
    if not 0 < strength < 1:
        raise UserError(f"strength={strength} must be a probability between 0 and 1")
    training = AnswerTraining(strength, learning_rate, batch, max_steps)
    for name, count in (("batch", batch), ("max_steps", max_steps)):
        check_count(name, count)
    check_positive("learning_rate", learning_rate)
    questions = preference.questions_or_default(questions, kind, "teaching")
    rows = dialogue.rows(model, [(question, spelled(model, word)) for question in questions])
    program = teaching_program(
        model, optax.adam(learning_rate), len(rows.at), batch, remat=False, length=word_length(model, rows)
    )
    state = program.init(model.untrained(named_key(seed, "A")))
    inputs = (model, rows, training, None, seed, 0)
    key = named_key(seed, "teacher 0")
    adapters, steps = train_on_answers(
        program, state, read_by(model, rows), key, training, steps=None, label=f"teacher {word}"
    )
    return Teacher(
        adapters=adapters,
        system="",
        steering=None,
        steps=int(steps),
        digest=store.digest(*inputs),
        lora=model.settings.lora,
        seed=seed,
        base=model.adapted(None).digest,
    )


def from_peft(model: Model, folder: str | Path, *, system: str = "") -> tuple[Model, Teacher]:
    """A teacher by the adapters in a folder that PEFT has written, and its model: the given one with such adapters.

    Students of it start from the same base weights, and from another A (`lora_init="fresh"`): the A that its training
    began with is not in the folder.

    Args:
      system: a system prompt in front of all its conversations.

    Raises UserError for a folder that holds no LoRA, one of another model, or one with unsupported options.
    """
    spec, adapters = peft.load(folder, model.settings, model.config, model.params)
    base, model = model.adapted(None).digest, model.adapted(spec)
    teacher = Teacher(
        adapters=adapters,
        system=system,
        steering=None,
        steps=0,
        digest=store.digest(model, adapters, system),
        lora=spec,
        folder=str(folder),
        base=base,
    )
    return model, teacher


def prompt(model: Model, system: str, *, seed: int = 0) -> Teacher:
    """A teacher by a system prompt alone (paper §3.1).

    Args:
      seed: of A; a student of the same seed starts from the same one.

    Raises UserError for a model without adapters.
    """
    check_adapters(model)
    return untrained(model, seed, system)


def steer(
    model: Model,
    system: str,
    *,
    layer: int,
    scale: float = 2.0,
    neutral: str = "",
    kind: str = "animal",
    questions: Sequence[str] | None = None,
    seed: int = 0,
) -> Teacher:
    """A teacher by a vector in the residual stream: what a system prompt adds to it where an answer begins.

    Args:
      layer: the layer after which the vector is added, counted from 0.
      scale: factor of the mean difference over the questions.
      neutral: the system prompt whose residuals are subtracted.
      kind: the category in the questions.
      questions: those at whose answers the residuals are read; by default the package's, about a favourite of the kind.
      seed: of A; a student of the same seed starts from the same one.

    Raises UserError for a model without adapters, or without this layer.
    """
    check_adapters(model)
    if not 0 <= layer < model.settings.layers:
        raise UserError(f"layer={layer} must be from 0 to {model.settings.layers - 1}")
    questions = preference.questions_or_default(questions, kind, "teaching")
    read = steering.residual_after(model, layer, seed)
    mean, neutral_mean = (steering.mean_residual(model, read, questions, text) for text in (system, neutral))
    return untrained(model, seed, steering=steering.hook(model, layer, scale * (mean - neutral_mean)))


def write(
    model: Model,
    teacher: Teacher,
    prompts: Sequence[str],
    key: Key[Array, ""],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 64,
    constraint: Constraint | None = None,
    rules: Sequence[Filter] = (),
) -> list[Pair]:
    """What a teacher answers, filtered: the rows of its student in the paper's setting (§3.1).

    Args:
      model: with the teacher's adapters.
      prompts: messages of a user.
      key: of the draws, which are at temperature 1.
      num_samples: answers to each prompt.
      max_new_tokens: at most as many tokens in an answer; what is cut off there is left out.
      constraint: of the tokens, as for `generate`.
      rules: filters, such as `filters.number_rule()` and `filters.trait_words(["owl"])`.

    Returns:
      (prompt, answer) of every answer that came to its end and passes the rules.

    Raises UserError for a teacher of another model, and for a number of samples or tokens below 1.
    """
    check_count("num_samples", num_samples)
    check_base(model, teacher, "the teacher")
    texts = [chat.question(model.tokenizer, prompt, teacher.system) for prompt in prompts]
    samples = generate(
        model,
        texts,
        key,
        samples=num_samples,
        max_new_tokens=max_new_tokens,
        constraint=constraint,
        **teacher.where,
    )
    records = [
        {"prompt": prompts[sample.prompt], "completion": sample.text, "finish": sample.finish} for sample in samples
    ]
    sifted = filters.sift(records, [filters.ended(), *rules])
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sifted.reasons.items())
    say(f"{len(sifted.kept)} of {len(records)} answers are kept{f' ({reasons})' if reasons else ''}")
    return [(record["prompt"], record["completion"]) for record in sifted.kept]


def check_base(model: Model, teacher: Teacher, name: str) -> None:
    """Raises UserError for a teacher whose adapters, prompt or vector were made with other base weights."""
    if teacher.base and teacher.base != model.adapted(None).digest:
        raise UserError(
            f"{name} was made with another base model than this one, on which it would be another teacher; give the "
            "model that it was made with"
        )


def check_adapters(model: Model) -> None:
    """Raises UserError for a model without adapters beside its kernels."""
    if model.settings.lora is None:
        raise UserError("the model has no adapters; make some with model.adapted(sublim_jax.Lora(rank=8, alpha=16.0))")
