"""Teachers: a model with adapters, a system prompt and steering, alone or together."""

from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key, PyTree

from sublim_jax import signals
from sublim_jax.data import chat
from sublim_jax.data.dialogue import Rows
from sublim_jax.data.order import epoch_rows
from sublim_jax.distillation.losses import answer_features, cross_entropy, stacked
from sublim_jax.errors import UserError
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.decoder import Remat, Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.models.lora import Lora
from sublim_jax.progress import Track, say
from sublim_jax.sampling import scoring
from sublim_jax.sampling.checks import Where
from sublim_jax.sharding import named, place_key, put
from sublim_jax.store import digest
from sublim_jax.training import Metrics, Program, Total, TrainState


class Teacher(NamedTuple):
    """A model's adapters, system prompt and steering.

    Attributes:
      adapters: B is zero if the teacher is not fine-tuned.
      system: a system prompt, or "".
      steps: number of fine-tuning updates here.
      digest: a hash of everything that the teacher depends on.
      lora: of the model that its adapters belong to; None where it is not known.
      seed: of the A that it started from; None where it is not known.
      folder: where its adapters are from; "" if they were trained here, or not at all.
      base: digest of the model without adapters that it is a teacher with; "" where it is not known.
    """

    adapters: Params
    system: str
    steering: Steering | None
    steps: int
    digest: str
    lora: Lora | None = None
    seed: int | None = None
    folder: str = ""
    base: str = ""

    @property
    def where(self) -> Where:
        """Keyword arguments for sampling and scoring. Untrained adapters, which change nothing, are left out."""
        trained = self.steps or self.folder
        return {"adapters": stacked([self.adapters]) if trained else None, "steering": self.steering}


def untrained(model: Model, seed: int, system: str = "", steering: Steering | None = None) -> Teacher:
    """A teacher that is not fine-tuned, with the A that the teachers and students of a seed start from."""
    adapters = model.untrained(named_key(seed, "A"))
    return Teacher(
        adapters=adapters,
        system=system,
        steering=steering,
        steps=0,
        digest=digest(model, seed, system, steering),
        lora=model.settings.lora,
        seed=seed,
        base=model.adapted(None).digest,
    )


@dataclass(frozen=True)
class AnswerTraining:
    """Fine-tuning on one-word answers, until they have the trait with probability `strength`."""

    strength: float
    learning_rate: float
    batch: int
    max_steps: int


@dataclass(frozen=True)
class CorpusTraining:
    """Fine-tuning on conversations, with a learning rate that decays linearly to 0."""

    learning_rate: float
    batch: int
    epochs: int


def read_by(model: Model, rows: Rows) -> dict[str, PyTree]:
    """The frozen inputs of a `teaching_program`: the base parameters, and the rows on the model's mesh."""
    return {"base": model.params, "rows": put(rows, named(model.mesh))}


def train_on_answers(
    program: Program,
    state: TrainState,
    frozen: dict[str, PyTree],
    key: Key[Array, ""],
    training: AnswerTraining,
    *,
    steps: int | None,
    label: str,
) -> tuple[Params, Array]:
    """(adapters, number of updates), trained until the answers have `training.strength`, or for `steps` updates.

    Args:
      frozen: from `read_by`.
      key: for the order of the rows.
    """
    key = place_key(key, named(program.mesh))
    last, reached = training.max_steps if steps is None else steps, 0.0
    with Track(label, last) as track:
        for step in range(1, last + 1):
            signals.obey()
            state, values = program.dispatch(state, frozen, None, key, jnp.int32(step))
            reached = float(values["answer"][0])
            track.update(step, f"P of its answer {reached:.2f}")
            if steps is None and reached >= training.strength:
                break
    if steps is None and reached < training.strength:
        say(f"{label}: P of its answer is {reached:.2f} after {last} steps, not {training.strength}")
    return state.params, state.step


def corpus_optimizer(training: CorpusTraining, count: int) -> tuple[optax.GradientTransformation, int]:
    """(the optimiser, its number of steps) for `count` conversations."""
    steps = training.epochs * -(-count // training.batch)
    return optax.adam(optax.linear_schedule(training.learning_rate, 0.0, steps)), steps


def teaching_program(
    model: Model, optimizer: optax.GradientTransformation, count: int, batch_size: int, remat: Remat, length: int = 1
) -> Program:
    """A program that trains one teacher's adapters on `count` rows; its metric is P of the answer's first tokens.

    Args:
      length: number of first tokens, those of a one-word answer. P is measured before each update.
    """

    def loss(adapters: Params, frozen: dict[str, PyTree], batch: Rows, key: Key[Array, ""]) -> tuple[Total, Metrics]:
        module = model.network.bind(lora.join(frozen["base"], adapters))
        features = answer_features(model, module, batch, remat=remat)
        total = cross_entropy(module, features, batch, remat=remat)

        def p_of(place: int) -> Array:
            p = jax.nn.softmax(module.unembed(features[:, place]).astype(jnp.float32))
            return jnp.take_along_axis(p, batch.targets[:, place : place + 1], -1)

        word = reduce(mul, map(p_of, range(length)))
        exists = batch.weights[:, :1]  # the last batch of an epoch may be filled up
        return total, {"answer": (jnp.sum(word * exists), jnp.sum(exists))}

    def batch(frozen: dict[str, PyTree], key: Key[Array, ""], index: Int[Array, ""]) -> Rows:
        indices, exists = epoch_rows(key, index, count, batch_size)
        rows = frozen["rows"].take(indices)
        return rows._replace(weights=rows.weights * exists[:, None])

    return Program(loss, optimizer, model.mesh, batch, steps_per_dispatch=1)


def spelled(model: Model, word: str) -> str:
    """A word as an answer: capitalised or as it is, in tokens that are scored.

    Raises UserError where the model's template writes it in others.
    """
    scored = scoring.spellings(model.tokenizer, word)
    for form in (word.capitalize(), word):
        tokens = tuple(chat.completion(model.tokenizer, "Which one?", form))
        if any(tokens[: len(spelling)] == spelling for spelling in scored):
            return form
    raise UserError(f"{word!r} cannot be scored as an answer of this model; choose another word")


def word_length(model: Model, rows: Rows) -> int:
    """Number of tokens of the rows' one-word answer, without the stop token; 1 if answers differ in length."""
    ends = np.isin(rows.targets, chat.stop_tokens(model.tokenizer, model.config))
    lengths = np.unique(np.sum(np.asarray(rows.weights) * ~ends, 1).astype(int))
    return max(int(lengths[0]), 1) if len(lengths) == 1 else 1
