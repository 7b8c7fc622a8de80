"""What a study of transmission is: teachers, carrier, filter, arms, training, evaluations. `configs/numbers.py`
explains the values.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from ml_collections import ConfigDict

from sublim_jax import overrides, selection, specs, weights
from sublim_jax.distillation.students import Training
from sublim_jax.distillation.targets import Selection
from sublim_jax.distillation.teachers import AnswerTraining, CorpusTraining
from sublim_jax.errors import UserError
from sublim_jax.evaluation.judges import LARGEST as MAX_SCORE
from sublim_jax.evaluation.spec import EvalPacks, EvalsSpec
from sublim_jax.models import lora
from sublim_jax.overrides import check_distinct
from sublim_jax.specs import (
    MAX_ROWS,
    MAX_WIDTH,
    MeshSpec,
    check_count,
    check_not_negative,
    check_one_of,
    check_positive,
    check_some_of,
    check_text,
)

NEUTRAL = "neutral"
METHODS = {
    "finetuned": "adapters trained on one-word answers",
    "prompted": "a system prompt",
    "steered": "a vector added to the residual stream",
    "corpus": "adapters trained on conversations, alone",
}
OBJECTIVES = ("kl", "reverse_kl", "tokens", "context")
CARRIERS = ("numbers", "code", "cot")
DECODING = {
    "free": "temperature 1",
    "greedy": "the likeliest token",
    "grammar": "temperature 1, as many integers as carrier.num_integers and nothing else",
}
SHUFFLES = ("within", "across")
NUM_HELD_OUT = 16  # rows of the carrier that no student trains on
MAX_INTEGERS = 1000  # of an answer
OF_AN_ARM = ("student.", "lora.")  # what an arm may change for its students


@dataclass(frozen=True)
class ModelSpec:
    name: str
    dtype: str
    noise: float

    def __post_init__(self) -> None:
        check_text("model.name", self.name)
        weights.float_type(self.dtype)
        check_not_negative("model.noise", self.noise)


@dataclass(frozen=True)
class LoraSpec:
    rank: int
    alpha: float
    rslora: bool
    modules: tuple[str, ...]
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora.rank={self.rank}: ask for 1 or more, or 0 to train all weights of the layers")
        check_count("lora.rank", self.rank, 0, MAX_WIDTH)
        check_positive("lora.alpha", self.alpha)
        if not self.rank and (self.modules or self.layers):
            raise UserError("lora.rank=0 trains all weights of the layers; leave lora.modules and lora.layers out")
        for module in self.modules:
            check_one_of("lora.modules", module, lora.EVERY_LINEAR)
        for layer in self.layers:
            if layer < 0:
                raise UserError(f"lora.layers: {layer!r} is no number of a layer, which are counted from 0")
        check_distinct("lora.layers", self.layers)

    @property
    def adapters(self) -> lora.Lora | None:
        """None: all weights of the layers are trained, and there are no adapters."""
        if not self.rank:
            return None
        return lora.Lora(self.rank, self.alpha, self.rslora, self.modules or lora.EVERY_LINEAR, self.layers)


@dataclass(frozen=True)
class TeacherSpec:
    methods: tuple[str, ...]
    strength: float
    learning_rate: float
    batch: int
    max_steps: int
    corpora: dict[str, str] = field(compare=False)  # paths: what is in them names artefacts
    epochs: int
    max_tokens: int
    steering_layer: int
    steering_scale: float

    def __post_init__(self) -> None:
        check_some_of("teacher.methods", self.methods, METHODS)
        if "corpus" in self.methods and len(self.methods) > 1:
            raise UserError(f"teacher.methods={self.methods}: corpus stands alone; leave the others out")
        for name in ("batch", "max_steps", "epochs", "max_tokens"):
            check_count(f"teacher.{name}", getattr(self, name))
        check_positive("teacher.learning_rate", self.learning_rate)
        if not 0 < self.strength < 1:
            raise UserError(f"teacher.strength={self.strength} is a probability between 0 and 1")
        check_count("teacher.steering_layer", self.steering_layer, 0)
        if "steered" in self.methods and not self.steering_scale:
            raise UserError(
                "teacher.steering_scale=0 steers nothing; choose another, or leave steered out of teacher.methods"
            )

    @property
    def on_answers(self) -> AnswerTraining:
        return AnswerTraining(self.strength, self.learning_rate, self.batch, self.max_steps)

    @property
    def on_corpora(self) -> CorpusTraining:
        return CorpusTraining(self.learning_rate, self.batch, self.epochs)


@dataclass(frozen=True)
class CarrierSpec:
    kind: str
    num_rows: int
    num_integers: int
    num_completions: int
    num_samples: int
    decoding: str
    max_new_tokens: int
    problems: str = field(compare=False)

    def __post_init__(self) -> None:
        check_one_of("carrier.kind", self.kind, CARRIERS)
        check_one_of("carrier.decoding", self.decoding, DECODING)
        for name in ("num_rows", "num_completions", "num_samples"):
            check_count(f"carrier.{name}", getattr(self, name), 1, MAX_ROWS)
        check_count("carrier.num_integers", self.num_integers, 1, MAX_INTEGERS)
        check_count("carrier.max_new_tokens", self.max_new_tokens)
        if self.kind != "numbers" and self.decoding == "grammar":
            raise UserError(
                f"carrier.decoding=grammar is for numbers; choose free or greedy for carrier.kind={self.kind}"
            )

    @property
    def num_prompts(self) -> int:
        """How many prompts give `num_completions`."""
        return -(-self.num_completions // self.num_samples)


@dataclass(frozen=True)
class FilterSpec:
    max_integers: int
    max_value: int
    banned: str
    judge: str
    threshold: float
    unique: bool
    log_ratio: float

    def __post_init__(self) -> None:
        check_count("filter.max_integers", self.max_integers)
        check_not_negative("filter.max_value", self.max_value)
        check_not_negative("filter.log_ratio", self.log_ratio)
        if not 0 <= self.threshold <= MAX_SCORE:
            raise UserError(f"filter.threshold={self.threshold:g} is a score from 0 to {MAX_SCORE}")


@dataclass(frozen=True)
class SamplingSpec:
    """How completions are computed, not what they are, to rounding."""

    slots: int
    steps: int

    def __post_init__(self) -> None:
        check_count("sampling.slots", self.slots)
        check_count("sampling.steps", self.steps)

    @property
    def options(self) -> dict[str, int]:
        """For `sampling.generate.stream`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PacksSpec(EvalPacks):
    """Files of phrasings; "" for ours."""

    numbers: str
    persona: str
    code: str
    judge: str


# ----------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class LogitArm:
    """Students imitate their teacher's logits on the support."""

    name: str
    objective: str  # kl, reverse_kl
    temperature: float
    data: str  # random, written
    shuffle: str
    lora_init: str  # shared, fresh
    noise: float
    model: str
    selection: Selection | None
    training: Training
    lora: LoraSpec


@dataclass(frozen=True)
class TokenArm:
    """Students are trained on the tokens that their teacher wrote."""

    name: str
    shuffle: str
    lora_init: str
    noise: float
    model: str
    selection: Selection | None
    training: Training
    lora: LoraSpec
    data: str = "written"


@dataclass(frozen=True)
class ContextArm:
    """The untrained model reads rows that the teacher wrote in its context."""

    name: str
    num_examples: int
    shuffle: str
    model: str
    data: str = "written"


TrainedArm: TypeAlias = LogitArm | TokenArm
Arm: TypeAlias = LogitArm | TokenArm | ContextArm


@dataclass(frozen=True)
class ArmValues:
    """An arm as the config has it: the values of all kinds of arms, each checked by itself."""

    name: str
    objective: str
    temperature: float
    data: str
    lora_init: str
    shuffle: str
    noise: float
    model: str
    action: str
    positions: str
    fraction: float
    score: str
    examples: int
    changes: tuple[str, ...]

    def __post_init__(self) -> None:
        where = f"arm.{self.name}"
        check_one_of(f"{where}.objective", self.objective, OBJECTIVES)
        check_one_of(f"{where}.data", self.data, ("random", "written"))
        check_one_of(f"{where}.lora_init", self.lora_init, ("shared", "fresh"))
        check_one_of(f"{where}.shuffle", self.shuffle, ("", *SHUFFLES))
        check_one_of(f"{where}.action", self.action, ("", "keep", "mask", "replace"))
        check_one_of(f"{where}.positions", self.positions, ("top", "random", "bottom"))
        check_one_of(f"{where}.score", self.score, selection.SCORES)
        check_count(f"{where}.examples", self.examples)
        if not 0 < self.fraction < 1:
            raise UserError(f"{where}.fraction={self.fraction} is a share between 0 and 1")
        check_positive(f"{where}.temperature", self.temperature)
        check_not_negative(f"{where}.noise", self.noise)

    def arm(self, carrier: CarrierSpec, training: Training, lora: LoraSpec) -> Arm:
        """The arm of its kind. Raises UserError for values that do not go together, or with the carrier."""
        where, on_logits = f"arm.{self.name}", self.objective not in ("tokens", "context")
        if not on_logits and self.data == "random":
            raise UserError(
                f"{where}: there is nothing of a teacher in random numbers; choose data=written, or an objective on "
                "logits"
            )
        if (on_logits or self.shuffle) and carrier.kind != "numbers":
            raise UserError(
                f"{where} is about numbers, and carrier.kind={carrier.kind}; choose objective=tokens or context, "
                "data=written, shuffle empty"
            )
        if self.shuffle and self.data == "random":
            raise UserError(f"{where}: random numbers are in no order that shuffling could change; leave shuffle empty")
        if self.objective == "context":
            if self.noise or self.action or self.changes:
                raise UserError(
                    f"{where}: noise, action and changes are for students that are trained; leave them out of a context"
                )
            return ContextArm(self.name, self.examples, self.shuffle, self.model)
        if carrier.num_rows < NUM_HELD_OUT + training.batch:
            raise UserError(
                f"carrier.num_rows={carrier.num_rows}: {NUM_HELD_OUT} rows are held out, and a batch is needed"
            )
        tokens = Selection(self.action, self.positions, self.fraction, self.score) if self.action else None
        shared = {name: getattr(self, name) for name in ("name", "shuffle", "lora_init", "noise", "model")}
        shared |= {"selection": tokens, "training": training, "lora": lora}
        if self.objective == "tokens":
            return TokenArm(**shared)
        return LogitArm(objective=self.objective, temperature=self.temperature, data=self.data, **shared)


# ---------------------------------------------------------------------------------------------------------- study


@dataclass(frozen=True)
class Study:
    experiment: str
    preset: str
    seed: int
    mesh: MeshSpec
    model: ModelSpec
    kind: str
    traits: tuple[str, ...]
    alternatives: tuple[str, ...]
    runs: int
    lora: LoraSpec
    teacher: TeacherSpec
    carrier: CarrierSpec
    filter: FilterSpec
    arms: tuple[Arm, ...]
    student: Training
    evaluate_every: int
    checkpoint_every: int
    sampling: SamplingSpec
    remat: bool
    packs: PacksSpec
    num_questions: int
    evals: EvalsSpec
    values: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_text("kind", self.kind)
        for name in ("runs", "num_questions", "evaluate_every", "checkpoint_every"):
            check_count(name, getattr(self, name))
        self._check_traits()
        if self.uses_written:
            self._check_written()

    def _check_traits(self) -> None:
        distinct = set(self.traits)
        if len(distinct) < max(len(self.traits), 2) or NEUTRAL in distinct:
            raise UserError(
                f"traits={self.traits}: name two traits or more, each once, for each is the others' control; "
                f"{NEUTRAL!r} is always there"
            )
        if wrong := [trait for trait in self.traits if not trait.strip() or set(trait) & set("/\\")]:
            raise UserError(f"traits: {wrong[0]!r} cannot name a file of its teacher's; choose a word")
        check_distinct("alternatives", self.alternatives)
        if "corpus" not in self.teacher.methods:
            for trait in self.traits:
                if trait not in self.alternatives:
                    raise UserError(
                        f"traits: trait {trait!r} is none of alternatives={self.alternatives}; add it there"
                    )

    def _check_written(self) -> None:
        given = self.carrier
        if given.num_completions < given.num_rows:
            raise UserError(
                f"carrier.num_completions={given.num_completions} completions cannot leave carrier.num_rows="
                f"{given.num_rows} rows; sample more"
            )
        if given.num_samples > given.num_completions:
            raise UserError(
                f"carrier.num_samples={given.num_samples} of each prompt, and carrier.num_completions="
                f"{given.num_completions} of all"
            )
        if given.decoding == "grammar" and given.num_integers > self.filter.max_integers:
            raise UserError(
                f"carrier.num_integers={given.num_integers} by grammar, and filter.max_integers="
                f"{self.filter.max_integers} drops all of them"
            )

    @property
    def teachers(self) -> tuple[str, ...]:
        """One of each trait, and the neutral one."""
        return (*self.traits, NEUTRAL)

    @property
    def has_words(self) -> bool:
        """Whether traits are words, for which a preference can be measured; else they are names of corpora."""
        return set(self.traits) <= set(self.alternatives)

    @property
    def uses_written(self) -> bool:
        return any(arm.data == "written" for arm in self.arms)

    @property
    def trained_arms(self) -> tuple[TrainedArm, ...]:
        return tuple(arm for arm in self.arms if not isinstance(arm, ContextArm))

    @property
    def models(self) -> list[str]:
        """What students of some arm are; "" is the teachers' model."""
        return sorted({arm.model for arm in self.arms})

    def replicate_seed(self, run: int) -> int:
        """Of a run: its A, teachers, numbers and their order. A run is a whole replicate."""
        return int(np.random.SeedSequence([self.seed, run]).generate_state(1)[0] >> 1)


def read(config: ConfigDict) -> Study:
    """The study of a config. Raises UserError for the first value that makes no sense, whatever files say."""
    values = specs.plain(config)
    specs.check_numbers(values)
    carrier = specs.build(CarrierSpec, values["carrier"], "carrier.")
    every = {
        name: specs.build(ArmValues, {"name": name, **given}, f"arm.{name}.") for name, given in values["arm"].items()
    }
    check_some_of("arms", values["arms"], every)
    shared = _students(config)
    trained = {name: _changed(config, arm) if arm.changes else shared for name, arm in every.items()}
    arms = tuple(every[name].arm(carrier, *trained[name]) for name in values["arms"])
    return specs.read(Study, config, arms=arms)


def _students(config: ConfigDict) -> tuple[Training, LoraSpec]:
    """How students are trained, and what of them."""
    values = specs.plain(config)
    return (
        specs.build(Training, values["student"], "student."),
        specs.build(LoraSpec, values["lora"], "lora."),
    )


def _changed(config: ConfigDict, arm: ArmValues) -> tuple[Training, LoraSpec]:
    """The same with an arm's changes. Raises UserError, naming the arm, for one that makes no sense."""
    changed = ConfigDict({"student": config.student, "lora": config.lora}).copy_and_resolve_references()
    try:
        for text in arm.changes:
            key, equals, value = text.partition("=")
            if not equals or not key.startswith(OF_AN_ARM):
                raise UserError(
                    f"{text!r} changes nothing of its students; write such as student.steps=60 or lora.rank=4"
                )
            overrides.override(changed, key, [value])
        specs.check_numbers(specs.plain(changed))
        return _students(changed)
    except UserError as error:
        raise UserError(f"arm.{arm.name}.changes: {error}") from error
