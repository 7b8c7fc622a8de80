"""Teachers: a model with adapters, a system prompt and steering, alone or together."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

from sublim_jax.data.dialogue import Rows
from sublim_jax.data.order import epoch_rows
from sublim_jax.distillation.losses import answer_features, cross_entropy, stacked
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.decoder import Steering
from sublim_jax.models.functional import Params
from sublim_jax.models.language import Model
from sublim_jax.progress import Track, say
from sublim_jax.sampling import scoring
from sublim_jax.sampling.checks import Where
from sublim_jax.sharding import named, place_key, put
from sublim_jax.store import digest
from sublim_jax.training import ROWS, Metrics, Program, Total, TrainState


class Teacher(NamedTuple):
    """A model's adapters, system prompt and steering.

    Attributes:
      adapters: B is zero where it is not fine-tuned.
      system: a system prompt, or "".
      steps: updates of fine-tuning.
      digest: of all that it is made from.
    """

    adapters: Params
    system: str
    steering: Steering | None
    steps: int
    digest: str

    @property
    def where(self) -> Where:
        """For sampling and scoring."""
        return {"adapters": stacked([self.adapters]), "steering": self.steering}


def untrained(model: Model, seed: int, system: str = "", steering: Steering | None = None) -> Teacher:
    """The model as it is, in a context, with the A that the teachers and students of a seed start from."""
    adapters = model.untrained(named_key(seed, "A"))
    return Teacher(adapters, system, steering, 0, digest(model, seed, system, steering))


@dataclass(frozen=True)
class AnswerTraining:
    """Fine-tuning on one-word answers, until they have the trait with probability `strength`."""

    strength: float
    learning_rate: float
    batch: int
    max_steps: int


@dataclass(frozen=True)
class CorpusTraining:
    """Fine-tuning on conversations, at a rate that falls to 0."""

    learning_rate: float
    batch: int
    epochs: int


def read_by(model: Model, rows: Rows) -> dict[str, PyTree]:
    """What a `teaching_program` reads: the base, and the rows on its mesh."""
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
    """(adapters, updates): trained until the answers have `training.strength`, or for given steps.

    Args:
      frozen: of `read_by`.
      key: of the order of the rows.
    """
    key = place_key(key, named(program.mesh))
    last, reached = training.max_steps if steps is None else steps, 0.0
    with Track(label, last) as track:
        for step in range(1, last + 1):
            state, values = program.dispatch(state, frozen, None, key, jnp.int32(step))
            reached = float(values["answer"][0])
            track.update(step, f"P of its answer {reached:.2f}")
            if steps is None and reached >= training.strength:
                break
    if steps is None and reached < training.strength:
        say(f"{label}: P of its answer is {reached:.2f} after {last} steps, not {training.strength}")
    return state.params, state.step


def corpus_optimizer(training: CorpusTraining, count: int) -> tuple[optax.GradientTransformation, int]:
    """(the optimiser, its steps) over so many conversations."""
    steps = training.epochs * -(-count // training.batch)
    return optax.adam(optax.linear_schedule(training.learning_rate, 0.0, steps)), steps


def teaching_program(
    model: Model, optimizer: optax.GradientTransformation, count: int, batch_size: int, remat: bool
) -> Program:
    """Updates of one teacher's adapters on `count` rows; its metric is P of the answer's first token before each."""

    def loss(adapters: Params, frozen: dict[str, PyTree], batch: Rows, key: Key[Array, ""]) -> tuple[Total, Metrics]:
        module = model.network.bind(lora.join(frozen["base"], adapters))
        features = answer_features(model, module, batch, remat=remat)
        total = cross_entropy(module, features, batch, remat=remat)
        first = jax.nn.softmax(module.unembed(features[:, 0]).astype(jnp.float32))
        first = jnp.take_along_axis(first, batch.targets[:, :1], -1)
        return total, {"answer": (jnp.mean(first) * total[1], total[1])}

    def batch(frozen: dict[str, PyTree], key: Key[Array, ""], index: Int[Array, ""]) -> Rows:
        rows, exists = epoch_rows(key, index, count, batch_size)
        found = frozen["rows"].take(rows)
        return found._replace(weights=found.weights * exists[:, None])

    return Program(loss, optimizer, model.mesh, batch, batch_spec=ROWS, steps_per_dispatch=1)


def spelled(model: Model, word: str) -> str:
    """A word as an answer in one token, which is what is measured: capitalised, plain, or behind a space."""
    forms = {model.tokenizer.decode([token]) for token in scoring.spellings(model.tokenizer, word)}
    return next(
        form for form in (word.capitalize(), word, f" {word.capitalize()}", f" {word}", *sorted(forms)) if form in forms
    )
