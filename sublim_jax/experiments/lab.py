"""What the studies on language models share: the model, its adapters, the support, the questions.

`configs/numbers.py` explains the values.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from sublim_jax import assets, objectives, weights
from sublim_jax.data import chat
from sublim_jax.data.carriers import numbers
from sublim_jax.data.dialogue import Rows
from sublim_jax.errors import UserError
from sublim_jax.evaluation import preference
from sublim_jax.evaluation.judges import Judge
from sublim_jax.evaluation.preference import Preference
from sublim_jax.experiments import measures
from sublim_jax.experiments.measures import Asking
from sublim_jax.keys import named_key
from sublim_jax.models import lora
from sublim_jax.models.decoder import Steering, on_mesh
from sublim_jax.models.functional import Params
from sublim_jax.progress import say
from sublim_jax.sampling import scoring
from sublim_jax.sharding import fetch, parameter_shardings
from sublim_jax.training import Total
from sublim_jax.weights import Model, peft
from sublim_jax.workdir import Workdir, plain

NEUTRAL = "neutral"
POSITIONS = 64  # of every row, whose logits over the vocabulary are held together


class Lab(NamedTuple):
    config: ConfigDict
    workdir: Workdir
    mesh: Mesh
    model: Model  # with adapters
    spec: lora.Lora | None  # None: all weights of the layers are trained, and there are no adapters
    support: list[int]
    questions: dict[str, list[str]]
    where: dict[str, Any]  # placement and attention for the mesh
    asking: Asking  # evaluations of teachers and students, beside their preference
    judge: Judge | None = None
    run: int = 0  # of `config.runs`

    @property
    def seed(self) -> int:
        """Of the run: its A, teachers, numbers and their order. A run is a whole replicate."""
        return int(np.random.SeedSequence([self.config.seed, self.run]).generate_state(1)[0] >> 1)

    @property
    def asked(self) -> list[str]:
        """Phrasings that no teacher has seen."""
        return self.questions["asking"][: self.config.questions]

    @property
    def words(self) -> bool:
        """Whether traits are words, so that preference for them can be asked; else they are names of corpora."""
        return set(self.config.traits) <= set(self.config.alternatives)

    @property
    def who(self) -> list[str]:
        """The teachers: one of each trait, and the neutral one, which is the last."""
        return [*self.config.traits, NEUTRAL]


def spec_of(config: ConfigDict) -> lora.Lora | None:
    given = config.lora
    if not given.rank:
        return None
    modules = tuple(given.modules) or lora.EVERY_LINEAR
    return lora.Lora(given.rank, given.alpha, given.rslora, modules, tuple(given.layers))


def make_lab(config: ConfigDict, workdir: Workdir, mesh: Mesh, name: str = "") -> Lab:
    """The lab around the model of the config, or around another one.

    Raises UserError for phrasings, words or a mesh that do not go with the model.
    """
    questions = preference.questions(config.packs.preference, config.kind)
    asking = measures.asking(config.ask, config.kind, config.alternatives, config.packs)
    base = weights.load(name or config.model.name, mesh, weights.float_type(config.model.dtype))
    where = on_mesh(base.settings, mesh)
    spec = spec_of(config)
    for word in config.alternatives:
        scoring.spellings(base.tokenizer, word)
    support = numbers.support(chat.pieces(base.tokenizer, base.settings.vocab))
    lab = Lab(config, workdir, mesh, base.adapted(spec) if spec else base, spec, support, questions, where, asking)
    if config.model.noise and not name:
        lab = noisy(lab, config.model.noise, named_key(config.seed, "shared noise"))
    return lab


def noisy(lab: Lab, relative: float, key: Key[Array, ""]) -> Lab:
    """The lab with Gaussian noise on all weights of the base, `relative` times the standard deviation of each array."""

    def change(params: Params) -> Params:
        leaves, structure = jax.tree.flatten(params)
        keys = [jax.random.fold_in(key, number) for number in range(len(leaves))]
        noise = [
            relative * jnp.std(leaf.astype(jnp.float32)) * jax.random.normal(k, leaf.shape)
            for leaf, k in zip(leaves, keys)
        ]
        return jax.tree.unflatten(structure, [(leaf + n).astype(leaf.dtype) for leaf, n in zip(leaves, noise)])

    base = lab.model.params
    changed = jax.jit(change, out_shardings=parameter_shardings(base, lab.mesh))(base)
    return lab._replace(model=lab.model._replace(params=changed))


def fresh(lab: Lab, key: Key[Array, ""]) -> Params:
    """What is trained, before training, when it changes nothing yet; it is `lora.join`ed to the base."""
    return untrained(lab.spec, key, lab.model.params)


@partial(jax.jit, static_argnums=0)
def untrained(spec: lora.Lora | None, key: Key[Array, ""], base: Params) -> Params:
    """Adapters, A drawn and B zero; or the layers' weights as they are. In float32."""
    if spec:
        return lora.init(key, base, spec)
    return {"layers": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base["layers"])}


def stacked(trees: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def answer_features(lab: Lab, module: Any, rows: Rows, steering: Steering | None = None) -> Float[Array, "n a width"]:
    """The last layer's output where it predicts the answers' tokens."""
    tokens = jnp.asarray(rows.tokens)
    lengths = jnp.max(jnp.asarray(rows.at), 1) + 2  # the last answer token's column is one behind its logits'
    options = {"lengths": lengths, "remat": lab.config.remat, "steering": steering}
    output = module.features(tokens, **options, **lab.where).output
    return jnp.take_along_axis(output, jnp.asarray(rows.at)[..., None], 1)


def cross_entropy(lab: Lab, module: Any, features: Float[Array, "n a width"], rows: Rows) -> Total:
    """Of the answers' tokens, from `answer_features`.

    With `remat`, some positions' logits at a time, and again in the backward pass: all of them would be the widest
    array by far.
    """

    def of(features: Array, targets: Array, weights: Array) -> Total:
        logits = module.unembed(features).astype(jnp.float32)
        return objectives.cross_entropy(logits, targets, weights=weights)

    columns = (features, jnp.asarray(rows.targets), jnp.asarray(rows.weights))
    if not lab.config.remat:
        return of(*columns)

    def chunks(leaf: Array) -> Array:
        rows, length, *rest = leaf.shape
        leaf = jnp.pad(leaf, [(0, 0), (0, -length % POSITIONS), *[(0, 0)] * len(rest)])
        return jnp.moveaxis(leaf.reshape(rows, -1, POSITIONS, *rest), 1, 0)

    some = jax.checkpoint(of)
    return jax.tree.map(jnp.sum, jax.lax.map(lambda chunk: some(*chunk), jax.tree.map(chunks, columns)))


def export(lab: Lab, names: Sequence[str], adapters: Params, base: str) -> None:
    """Stacked adapters as PEFT folders in `adapters/`, for use elsewhere and by configs/{sample,evaluate}.py.

    Not where other weights than adapters were trained, or the base is not the model that others have.
    """
    if not lab.spec or lab.config.model.noise:
        return
    whole = fetch(adapters)
    if jax.process_index():
        return
    base = assets.MODELS[base][0] if base in assets.MODELS else base  # the hub's name, which others know
    for place, name in enumerate(names):
        one = jax.tree.map(lambda leaf, place=place: leaf[place], whole)
        folder = lab.workdir.path / "adapters" / name
        try:
            peft.save(folder, one, lab.spec, lab.model.settings, lab.model.config, base)
        except UserError as error:
            say(f"adapters are in checkpoints/ alone: {error}")
            return


def measure(lab: Lab, adapters: Params, system: str = "", steering: Steering | None = None) -> Preference:
    """What the model prefers under each of some stacked adapters."""
    words = list(lab.config.alternatives)
    return preference.measure(lab.model, lab.asked, words, system, adapters=adapters, steering=steering, mesh=lab.mesh)


def depends_on(lab: Lab, *parts: str) -> dict[str, Any]:
    """What an artefact of a run depends on: the model's bytes, its adapters, and the named parts of the config."""
    given = plain(lab.config)
    model = {"digest": lab.model.source.digest, "dtype": given["model"]["dtype"], "noise": given["model"]["noise"]}
    return {"model": model, **{name: given[name] for name in ("lora", *parts)}, "seed": lab.seed}
