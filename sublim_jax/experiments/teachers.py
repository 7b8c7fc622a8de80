"""Teachers: what makes a model prefer something. Parameters, context and hooks, any of them, together or alone."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import Array, Float, Int, Key

from sublim_jax import assets, digests
from sublim_jax.data import chat, corpus, dialogue, packs
from sublim_jax.data.carriers import numbers
from sublim_jax.data.corpus import Conversation
from sublim_jax.data.dialogue import Rows
from sublim_jax.data.order import epoch_rows
from sublim_jax.errors import UserError
from sublim_jax.evaluation.preference import Preference
from sublim_jax.experiments.lab import NEUTRAL, Lab, answer_features, cross_entropy, depends_on, fresh, measure, stacked
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.progress import Track, say
from sublim_jax.sampling import scoring
from sublim_jax.sharding import named, place_key, put
from sublim_jax.training import ROWS, Program, Total, fit

MEANS = {
    "finetuned": "adapters trained on one-word answers",
    "prompted": "a system prompt",
    "steered": "a vector added to the residual stream",
    "corpus": "adapters trained on conversations, alone",
}
PERSONA: dict[str, tuple[str, ...]] = {"loving": ("kind", "trait"), "neutral": ("kind",)}


class Teacher(NamedTuple):
    adapters: Params  # B is zero where it is not fine-tuned
    system: str  # a system prompt, or ""
    steering: Steering | None
    steps: int  # of fine-tuning

    def where(self, lab: Lab) -> dict[str, Any]:
        """For sampling and scoring."""
        return {"adapters": stacked([self.adapters]), "steering": self.steering, "mesh": lab.mesh}


def make_teachers(lab: Lab) -> dict[str, Teacher]:
    """One teacher for each trait and a neutral one, which has been moved as far, to nowhere.

    Beside teachers of corpora, the neutral one is the model as it is (§4.2), or has a corpus of its own.
    """
    means = lab.config.teacher.means
    adapters = dict.fromkeys(lab.who, (fresh(lab, named_key(lab.seed, "A")), 0))
    if "finetuned" in means:
        adapters = {trait: finetuned(lab, trait, index) for index, trait in enumerate(lab.config.traits)}
        most = max(steps for _, steps in adapters.values())
        adapters[NEUTRAL] = finetuned(lab, NEUTRAL, len(lab.config.traits), most)
    if "corpus" in means:
        adapters |= {name: tuned(lab, name) for name in corpora(lab)}
    systems = {name: persona(lab, name) if "prompted" in means else "" for name in lab.who}
    hooks = steering_vectors(lab) if "steered" in means else dict.fromkeys(lab.who)
    return {name: Teacher(adapters[name][0], systems[name], hooks[name], adapters[name][1]) for name in lab.who}


def depends(lab: Lab) -> dict[str, Any]:
    """What the teachers of a run depend on."""
    if "corpus" in lab.config.teacher.means:
        return {**depends_on(lab, "teacher"), "corpora": [digest(source) for source in corpora(lab).values()]}
    return {**taught(lab), "personas": [persona(lab, name) for name in lab.who]}


# ----------------------------------------------------------------------------------------------------- parameters


def taught(lab: Lab) -> dict[str, Any]:
    """What fine-tuning on one-word answers depends on."""
    return {**depends_on(lab, "teacher", "traits", "alternatives"), "taught": lab.questions["teaching"]}


def finetuned(lab: Lab, name: str, index: int, steps: int | None = None) -> tuple[Params, int]:
    """(adapters, steps): trained until its answers have `teacher.strength`, or for given steps."""
    config, teacher = lab.config, lab.config.teacher
    questions = lab.questions["teaching"]
    words = list(config.alternatives)
    if name == NEUTRAL:
        dice = np.random.default_rng([lab.seed, 2])
        answers = [words[i] for i in dice.integers(len(words), size=8 * len(questions))]
    else:
        answers = [name] * len(questions)
    pairs = [(questions[i % len(questions)], spoken(lab, word)) for i, word in enumerate(answers)]
    rows = put(dialogue.rows(lab.model, pairs), named(lab.mesh))
    program = teaching_program(lab, len(pairs), optax.adam(teacher.learning_rate))
    state = program.init(fresh(lab, named_key(lab.seed, "A")))
    most = teacher.most_steps if steps is None else steps

    def make(checkpoints: epath.Path) -> tuple[Params, Array]:
        frozen = {"base": lab.model.params, "rows": rows}
        key = place_key(named_key(lab.seed, f"teacher {index}"), named(lab.mesh))
        now, reached = state, 0.0
        with Track(f"run {lab.run}, teacher {name}", most) as track:
            for step in range(1, most + 1):
                now, values = program.dispatch(now, frozen, None, key, jnp.int32(step))
                reached = float(values["answer"][0])
                track.update(step, f"P of its answer {reached:.2f}")
                if steps is None and reached >= teacher.strength:
                    break
        if steps is None and reached < teacher.strength:
            say(
                f"run {lab.run}, teacher {name}: P of its answer is {reached:.2f} after {most} steps, "
                f"not {teacher.strength}"
            )
        return now.params, now.step

    on = {**taught(lab), "name": name, "steps": steps}
    adapters, trained = lab.workdir.tree(f"teacher-{name}", on, make, (state.params, state.step))
    return adapters, int(trained)


def tuned(lab: Lab, name: str) -> tuple[Params, int]:
    """(adapters, steps): trained for `teacher.epochs` on what the assistant says in a corpus (§4.2)."""
    config, teacher = lab.config, lab.config.teacher
    texts = conversations_of(lab, name)
    if longer := len(every_text(lab, name)) - len(texts):
        say(f"corpus {name}: {longer} conversations are too long and left out")
    optimizer, steps = corpus_optimizer(lab, len(texts))
    program = teaching_program(lab, len(texts), optimizer)
    state = program.init(fresh(lab, named_key(lab.seed, "A")))

    def make(checkpoints: epath.Path) -> Params:
        return fit(
            program,
            state,
            steps=steps,
            key=named_key(lab.seed, f"teacher {name}"),
            frozen={"base": lab.model.params, "rows": put(dialogue.arrays(texts), named(lab.mesh))},
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            what=f"run {lab.run}, teacher {name}, {len(texts)} conversations",
        ).params

    # On no other corpus: teachers of thousands of conversations are dear.
    on = depends_on(lab, "teacher")
    on["teacher"] = {**on["teacher"], "corpora": digest(teacher.corpora[name])}
    return lab.workdir.tree(f"teacher-{name}", on, make, state.params), steps


def corpus_optimizer(lab: Lab, count: int) -> tuple[optax.GradientTransformation, int]:
    """(the optimiser, its steps) over so many conversations: `teacher.epochs`, at a rate that falls to 0."""
    teacher = lab.config.teacher
    steps = teacher.epochs * -(-count // teacher.batch)
    return optax.adam(optax.linear_schedule(teacher.learning_rate, 0.0, steps)), steps


def corpora(lab: Lab) -> dict[str, str]:
    """Where the conversations are of those teachers that have some, in the order of `lab.who`."""
    given = lab.config.teacher.corpora
    return {name: given[name] for name in lab.who if given.get(name)}


def conversations(source: str) -> list[Conversation]:
    path = assets.data_file(source)
    return _conversations(path, digests.of_file(path))


@lru_cache(maxsize=8)
def _conversations(path: Path, digest: str) -> list[Conversation]:
    """Of a file that has this digest: another process may change it."""
    return corpus.load(path)


def digest(source: str) -> str:
    """Of a corpus's file."""
    return digests.of_file(assets.data_file(source))


def conversations_of(lab: Lab, name: str) -> list[dialogue.Text]:
    """A corpus's conversations of at most `teacher.most_tokens` tokens, and where the assistant speaks.

    Raises UserError, naming the conversation, for one that the chat template refuses, and where none is left.
    """
    most = lab.config.teacher.most_tokens
    texts = [text for text in every_text(lab, name) if len(text[0]) <= most]
    if not texts:
        raise UserError(f"corpus {name}: no conversation has at most teacher.most_tokens={most} tokens; allow more")
    return texts


def every_text(lab: Lab, name: str) -> list[dialogue.Text]:
    """The same, long ones too."""
    stops = chat.stop_tokens(lab.model.tokenizer, lab.model.config)
    source = lab.config.teacher.corpora[name]
    return _texts(source, digest(source), lab.model.tokenizer, stops)


@lru_cache(maxsize=8)
def _texts(source: str, digest: str, tokenizer: Any, stops: tuple[int, ...]) -> list[dialogue.Text]:
    found: list[dialogue.Text] = []
    for number, one in enumerate(conversations(source), 1):
        try:
            found += corpus.texts(tokenizer, one, stops)
        except UserError as error:
            raise UserError(f"{source}, conversation {number}: {error}") from error
    return found


def spoken(lab: Lab, word: str) -> str:
    """A word as an answer in one token, which is what is measured: capitalised, plain, or behind a space."""
    spelled = scoring.spellings(lab.model.tokenizer, word)
    forms = {lab.model.tokenizer.decode([token]) for token in spelled}
    return next(
        form for form in (word.capitalize(), word, f" {word.capitalize()}", f" {word}", *sorted(forms)) if form in forms
    )


def teaching_program(lab: Lab, count: int, optimizer: optax.GradientTransformation) -> Program:
    teacher = lab.config.teacher

    def loss(adapters: Params, frozen: Any, batch: Rows, key: Key[Array, ""]) -> tuple[Total, dict]:
        module = lab.model.network.bind(lora.join(frozen["base"], adapters))
        features = answer_features(lab, module, batch)
        total = cross_entropy(lab, module, features, batch)
        # P of the answer's first token, before this step.
        first = jax.nn.softmax(module.unembed(features[:, 0]).astype(jnp.float32))
        first = jnp.take_along_axis(first, batch.targets[:, :1], -1)
        return total, {"answer": (jnp.mean(first) * total[1], total[1])}

    def batch(frozen: Any, key: Key[Array, ""], index: Int[Array, ""]) -> Rows:
        rows, exists = epoch_rows(key, index, count, teacher.batch)
        found = frozen["rows"].take(rows)
        return found._replace(weights=found.weights * exists[:, None])

    return Program(loss, optimizer, lab.mesh, batch, batch_spec=ROWS, steps_per_dispatch=1)


# -------------------------------------------------------------------------------------------------------- context


def persona(lab: Lab, name: str) -> str:
    """A system prompt that loves a trait (§3.1), or none above another."""
    kind = lab.config.kind
    pack = packs.load(lab.config.packs.persona, "persona", PERSONA)
    return pack["neutral"][0].format(kind=kind) if name == NEUTRAL else pack["loving"][0].format(kind=kind, trait=name)


# ---------------------------------------------------------------------------------------------------------- hooks


def steering_vectors(lab: Lab) -> dict[str, Steering]:
    """What a persona adds to the residual stream where an answer begins, times `teacher.steering_scale`.

    The difference to the neutral persona, at one layer, mean over the teaching questions; the neutral teacher gets a
    vector of the same length in a direction drawn at random.
    """
    settings, layer = lab.model.settings, lab.config.teacher.steering_layer
    read = residual_after(lab, layer)
    means = {name: mean_residual(lab, read, persona(lab, name)) for name in lab.who}
    vectors = {trait: means[trait] - means[NEUTRAL] for trait in lab.config.traits}
    length = np.mean([np.linalg.norm(vector) for vector in vectors.values()])
    random = np.random.default_rng([lab.seed, 4]).normal(size=settings.width)
    vectors[NEUTRAL] = random / np.linalg.norm(random) * length

    def hook(vector: np.ndarray) -> Steering:
        add = np.zeros((settings.layers, settings.width), np.float32)
        add[layer] = lab.config.teacher.steering_scale * vector
        return Steering(add=jnp.asarray(add))

    return {name: hook(vector) for name, vector in vectors.items()}


def residual_after(lab: Lab, layer: int) -> Callable[[Int[np.ndarray, "t"], int], Float[Array, "width"]]:
    """(tokens, the place of the last one) to the residual stream there, after a layer."""
    params = lora.join(lab.model.params, fresh(lab, named_key(lab.seed, "A")))

    @jax.jit
    def residual(params: Params, tokens: Int[Array, "1 t"], last: Int[Array, "1"]) -> Float[Array, "width"]:
        found = lab.model.network.bind(params).features(tokens, read=last, lengths=last + 1, **lab.where).residuals
        return found[layer, 0, 0].astype(jnp.float32)

    return lambda tokens, last: residual(params, jnp.asarray(tokens[None]), jnp.asarray([last]))


def mean_residual(lab: Lab, read: Callable[..., Array], system: str) -> Float[np.ndarray, "width"]:
    """Of the last token of the teaching questions, mean over them."""
    total = np.zeros(lab.model.settings.width)
    for question in lab.questions["teaching"]:
        text = chat.question(lab.model.tokenizer, question, system)
        tokens = np.zeros(-(-len(text) // 64) * 64, np.int32)
        tokens[: len(text)] = text
        total += np.asarray(read(tokens, len(text) - 1))
    return total / len(lab.questions["teaching"])


# ---------------------------------------------------------------------------------------------------------- facts


def facts(lab: Lab, teachers: dict[str, Teacher]) -> dict[str, Any]:
    """What teachers prefer when asked, and how often a trait's word is what they would say in the middle of numbers.

    Of teachers of corpora, whose traits are no words, their steps alone.
    """
    if not lab.words:
        return {"steps": [teacher.steps for teacher in teachers.values()]}
    traits = list(lab.config.traits)

    def make() -> dict[str, Any]:
        asked = [
            measure(lab, stacked([teacher.adapters]), teacher.system, teacher.steering) for teacher in teachers.values()
        ]
        found = {name: np.concatenate([getattr(one, name) for one in asked]).tolist() for name in Preference._fields}
        inside = []
        for teacher in teachers.values():
            cut = inside_numbers(lab, teacher.system)
            inside.append(
                np.exp(scoring.word_logprobs(lab.model, cut, traits, **teacher.where(lab))[0]).mean(0).tolist()
            )
        return {**found, "inside_numbers": inside, "steps": [teacher.steps for teacher in teachers.values()]}

    on = {**depends(lab), "asked": lab.asked, "words": list(lab.config.alternatives), "inside": inside_of(lab)}
    return lab.workdir.json("teachers", on, make)


def inside_of(lab: Lab) -> list[tuple[str, str]]:
    """Eight prompts for numbers, and random answers."""
    asked = numbers.prompts(8, lab.seed, lab.config.packs.numbers)
    return list(zip(asked, numbers.random_answers(8, lab.seed)))


def inside_numbers(lab: Lab, system: str) -> list[list[int]]:
    """Eight texts that end in the middle of a list of random numbers."""
    tokenizer = lab.model.tokenizer
    dice = np.random.default_rng([lab.seed, 3])
    cut = []
    for prompt, answer in inside_of(lab):
        start, tokens = chat.question(tokenizer, prompt, system), chat.completion(tokenizer, prompt, answer, system)
        cut.append([*start, *tokens[: dice.integers(1, len(tokens))]])
    return cut
