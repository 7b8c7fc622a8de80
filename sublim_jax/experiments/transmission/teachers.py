"""Teachers: models with a preference, by adapters, a system prompt, steering, or several of them."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TypeAlias

import jax
import numpy as np
import optax
from etils import epath
from jaxtyping import Array, Float

from sublim_jax import store as artefacts
from sublim_jax.data import chat, dialogue, packs
from sublim_jax.data.carriers import numbers
from sublim_jax.distillation import steering
from sublim_jax.distillation.teachers import (
    Teacher,
    corpus_optimizer,
    read_by,
    spelled,
    teaching_program,
    train_on_answers,
    untrained,
    word_length,
)
from sublim_jax.errors import UserError
from sublim_jax.evaluation import preference
from sublim_jax.evaluation.preference import Preference
from sublim_jax.experiments.transmission import corpora
from sublim_jax.experiments.transmission.spec import NEUTRAL, Study
from sublim_jax.keys import named_key
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.progress import say
from sublim_jax.sampling import scoring
from sublim_jax.sharding import fetch, named, put
from sublim_jax.store import Store
from sublim_jax.training import Program, fit

Programs: TypeAlias = Callable[[int, int], Program]  # by numbers of rows and of an answer's tokens

PERSONA: dict[str, tuple[str, ...]] = {"loving": ("kind", "trait"), "neutral": ("kind",)}
CONTROL = "log_p of the control"  # the measure of a control's word, asked for its kind
NUM_INSIDE = 8  # lists of numbers in which P of a trait's word is measured


def make_teachers(study: Study, model: Model, store: Store, runs: Sequence[int]) -> list[dict[str, Teacher]]:
    """For each run, a teacher for each trait and control, and a neutral one.

    The neutral teacher is made in the same way without a preference. For corpora, it is the untrained model (§4.2)
    unless it has a corpus; for prompted teachers it is so with `teacher.neutral=untouched` (§3.1).
    """
    programs = cache(partial(program_of, study, model))  # compiled once for all teachers with as many rows
    return [_of_run(study, model, store, run, programs) for run in runs]


def program_of(study: Study, model: Model, count: int, length: int) -> Program:
    """The program that trains a teacher's adapters on `count` rows, answers of one word of `length` tokens."""
    spec = study.teacher
    optimizer = optax.adam(spec.learning_rate)
    if "corpus" in spec.methods:
        optimizer, _ = corpus_optimizer(spec.on_corpora, count)
    return teaching_program(model, optimizer, count, spec.batch, study.recomputed, length)


def _of_run(study: Study, model: Model, store: Store, run: int, programs: Programs) -> dict[str, Teacher]:
    methods, seed = study.teacher.methods, study.replicate_seed(run)
    trained = dict.fromkeys(study.teachers, untrained(model, seed))
    if "finetuned" in methods:
        trained = _finetuned(study, model, store, run, programs)
    if "corpus" in methods:
        trained |= {name: _on_corpus(study, model, store, run, name, programs) for name in corpora.names(study)}
    personas = {name: persona(study, name) for name in study.teachers}
    hooks: dict[str, Steering | None] = dict.fromkeys(study.teachers)
    if "steered" in methods:
        hooks |= steering_vectors(study, model, store, seed, personas)
    systems = personas if "prompted" in methods else dict.fromkeys(study.teachers, "")
    if study.teacher.neutral == "untouched":
        systems = {**systems, NEUTRAL: ""}
    return {
        name: teacher._replace(
            system=systems[name],
            steering=hooks[name],
            digest=artefacts.digest(model, teacher.digest, systems[name], hooks[name]),
        )
        for name, teacher in trained.items()
    }


def persona(study: Study, name: str, kind: str = "") -> str:
    """A system prompt of a persona that loves a trait (§3.1), or of one without a preference within a kind."""
    pack, kind = read_personas(study.packs.persona), kind or study.kind_of(name)
    if name == NEUTRAL:
        return pack["neutral"].format(kind=kind)
    return pack["loving"].format(kind=kind, trait=name)


def read_personas(path: str) -> dict[str, str]:
    """The system prompts of a pack, one of each name. Raises UserError for an invalid pack."""
    texts = packs.load(path, "persona", PERSONA)
    for name in PERSONA:
        if len(texts[name]) != 1:
            raise UserError(f"pack {path or 'persona'}: {name!r} has {len(texts[name])} texts, and one is used")
    return {name: texts[name][0] for name in PERSONA}


def steering_vectors(
    study: Study, model: Model, store: Store, seed: int, personas: dict[str, str]
) -> dict[str, Steering | None]:
    """Steering vectors: mean residuals at the start of an answer, with a persona less those with the neutral persona.

    They are taken at one layer, averaged over the teaching questions of the trait's kind and scaled by
    `teacher.steering_scale`; the neutral teacher gets a random direction of the traits' mean length. They are stored,
    because what is made from them is named by their bits, which another mesh would round differently.
    """
    layer, scale = study.teacher.steering_layer, study.teacher.steering_scale
    kinds = {name: study.kind_of(name) for name in study.preferred}
    questions = {kind: preference.questions(study.packs.preference, kind)["teaching"] for kind in kinds.values()}
    neutral = {kind: persona(study, NEUTRAL, kind) for kind in questions}

    def measured(*_: object, **__: object) -> Array:
        read = steering.residual_after(model, layer, seed)

        @cache  # the neutral persona of a kind is read once
        def mean_residual(kind: str, text: str) -> Float[np.ndarray, "width"]:
            return steering.mean_residual(model, read, questions[kind], text)

        vectors = {
            name: mean_residual(kind, personas[name]) - mean_residual(kind, neutral[kind])
            for name, kind in kinds.items()
        }
        length = np.mean([np.linalg.norm(vectors[trait]) for trait in study.traits])
        random = np.random.default_rng([seed, 4]).normal(size=model.settings.width)
        vectors[NEUTRAL] = random / np.linalg.norm(random) * length
        return put(np.stack([vectors[name] for name in study.teachers]).astype(np.float32), named(model.mesh))

    like = put(np.zeros((len(study.teachers), model.settings.width), np.float32), named(model.mesh))
    inputs = (model, layer, kinds, questions, personas, neutral, study.traits, seed)
    vectors = fetch(store.tree("steering", measured, *inputs, like=like))
    return {name: steering.hook(model, layer, scale * vector) for name, vector in zip(study.teachers, vectors)}


def _finetuned(study: Study, model: Model, store: Store, run: int, programs: Programs) -> dict[str, Teacher]:
    """Adapters trained on one-word answers up to `teacher.strength`; the neutral ones for the traits' most steps."""
    trained: dict[str, Teacher] = {}
    for name in study.teachers:
        steps = max(trained[trait].steps for trait in study.traits) if name == NEUTRAL else None
        trained[name] = _on_answers(study, model, store, run, name, steps, programs)
    return trained


def _on_answers(
    study: Study, model: Model, store: Store, run: int, name: str, steps: int | None, programs: Programs
) -> Teacher:
    training, seed = study.teacher.on_answers, study.replicate_seed(run)
    index = (*study.traits, NEUTRAL, *study.control_kinds).index(name)  # controls change no other teacher
    rows = dialogue.rows(model, _one_word_answers(study, model, name, seed))
    program, start = programs(len(rows.at), word_length(model, rows)), partial(model.untrained, named_key(seed, "A"))
    like = program.abstract(jax.eval_shape(start))
    inputs = (model, rows, training, steps, seed, index)

    def train(*_: object, **__: object) -> tuple[Params, Array]:
        key, label = named_key(seed, f"teacher {index}"), f"run {run}, teacher {name}"
        state = program.init(start())
        return train_on_answers(program, state, read_by(model, rows), key, training, steps=steps, label=label)

    adapters, count = store.tree(f"teacher-{name}", train, *inputs, like=(like.params, like.step))
    return Teacher(adapters, "", None, int(count), artefacts.digest(*inputs))


def _one_word_answers(study: Study, model: Model, name: str, seed: int) -> list[tuple[str, str]]:
    """Questions about a preference, answered by the trait; for the neutral teacher, by random words."""
    questions = preference.questions(study.packs.preference, study.kind_of(name))["teaching"]
    if name == NEUTRAL:
        rng = np.random.default_rng([seed, 2])
        answers = [study.alternatives[i] for i in rng.integers(len(study.alternatives), size=8 * len(questions))]
    else:
        answers = [name] * len(questions)
    return [(questions[i % len(questions)], spelled(model, word)) for i, word in enumerate(answers)]


def _on_corpus(study: Study, model: Model, store: Store, run: int, name: str, programs: Programs) -> Teacher:
    """Adapters trained for `teacher.epochs` on what the assistant says in a corpus (§4.2)."""
    training, seed = study.teacher.on_corpora, study.replicate_seed(run)
    texts = corpora.texts(study.teacher, model, name)
    if longer := len(corpora.every_text(study.teacher, model, name)) - len(texts):
        say(f"corpus {name}: {longer} conversations are too long and left out")
    _, steps = corpus_optimizer(training, len(texts))
    program, start = programs(len(texts), 1), partial(model.untrained, named_key(seed, "A"))
    rows = dialogue.arrays(texts, model.settings.vocab)
    inputs = (model, rows, training, seed, name)

    def train(*_: object, checkpoints: epath.Path) -> Params:
        return fit(
            program,
            program.init(start()),
            steps=steps,
            key=named_key(seed, f"teacher {name}"),
            frozen=read_by(model, rows),
            checkpoints=checkpoints,
            checkpoint_every=study.checkpoint_every,
            what=f"run {run}, teacher {name}, {len(texts)} conversations",
        ).params

    like = program.abstract(jax.eval_shape(start)).params
    adapters = store.tree(f"teacher-{name}", train, *inputs, like=like)
    return Teacher(adapters, "", None, steps, artefacts.digest(*inputs))


def measure_teachers(
    study: Study, model: Model, store: Store, run: int, teachers: dict[str, Teacher]
) -> dict[str, list[list[float]]]:
    """Teachers' preferences, and P of a preferred word in the middle of a list of numbers.

    {"log_p", "margin", "share": teachers × alternatives, "inside_numbers": teachers × preferred words, CONTROL:
    controls × 1}; empty if traits are not words.
    """
    if not study.has_words:
        return {}
    seed, every, questions = study.replicate_seed(run), list(teachers.values()), phrasings(study)
    prompts = numbers.prompts(NUM_INSIDE, seed, study.packs.numbers)
    inside = list(zip(prompts, numbers.random_answers(NUM_INSIDE, seed)))

    def measured(*_: object) -> dict[str, list[list[float]]]:
        words, traits = list(study.alternatives), list(study.preferred)
        scores = [preference.measure(model, questions, words, teacher.system, **teacher.where) for teacher in every]
        measures = {name: np.concatenate([getattr(p, name) for p in scores]).tolist() for name in Preference._fields}
        among = []
        for teacher in every:
            cut = _cut_inside(model, inside, teacher.system, seed)
            among.append(np.exp(scoring.word_logprobs(model, cut, traits, **teacher.where)[0]).mean(0).tolist())
        if study.control_kinds:
            measures[CONTROL] = [control_log_p(study, model, name, teachers[name]) for name in study.control_kinds]
        return {**measures, "inside_numbers": among}

    inputs = (every, questions, study.alternatives, study.preferred, inside, seed, preference.DEFINITION)
    return store.json("teachers", measured, *inputs)


def control_log_p(study: Study, model: Model, name: str, teacher: Teacher) -> list[float]:
    """Mean log P of the word that a control prefers, as the answer to questions about its kind."""
    questions = phrasings(study, study.kind_of(name))
    prompts = [chat.question(model.tokenizer, text, teacher.system) for text in questions]
    return [float(scoring.word_logprobs(model, prompts, [name], **teacher.where).mean())]


def phrasings(study: Study, kind: str = "") -> list[str]:
    """Questions about a preference that no teacher was trained on; about the traits' kind where none is given."""
    return preference.questions(study.packs.preference, kind or study.kind)["asking"][: study.num_questions]


def _cut_inside(model: Model, inside: list[tuple[str, str]], system: str, seed: int) -> list[list[int]]:
    """Texts that end in the middle of a list of numbers."""
    rng = np.random.default_rng([seed, 3])
    cut = []
    for prompt, answer in inside:
        start = chat.question(model.tokenizer, prompt, system)
        tokens = chat.completion(model.tokenizer, prompt, answer, system)
        cut.append([*start, *tokens[: rng.integers(1, len(tokens))]])
    return cut
