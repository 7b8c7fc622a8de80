"""The parts of a study: model, adapters, teachers, carrier, filter. `configs/numbers.py` explains the values."""

from dataclasses import dataclass, field

from sublim_jax import weights
from sublim_jax.distillation.teachers import AnswerTraining, CorpusTraining
from sublim_jax.errors import UserError
from sublim_jax.evaluation.spec import EvalPacks
from sublim_jax.evaluation.verdicts import LARGEST as MAX_SCORE
from sublim_jax.models import lora
from sublim_jax.overrides import check_distinct
from sublim_jax.sampling.generate import Slots
from sublim_jax.specs import (
    MAX_ROWS,
    MAX_WIDTH,
    check_count,
    check_not_negative,
    check_one_of,
    check_positive,
    check_some_of,
    check_text,
)

METHODS = {
    "finetuned": "adapters trained on one-word answers",
    "prompted": "a system prompt",
    "steered": "a vector added to the residual stream",
    "corpus": "adapters trained on conversations, alone",
}
CARRIERS = ("numbers", "code", "cot")
DECODING = {
    "free": "temperature 1",
    "greedy": "the likeliest token",
    "grammar": "temperature 1, as many integers as carrier.num_integers and nothing else",
}
MAX_INTEGERS = 1000  # of an answer


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
    def options(self) -> Slots:
        """For `sampling.generate.stream`."""
        return {"slots": self.slots, "steps": self.steps}


@dataclass(frozen=True)
class PacksSpec(EvalPacks):
    """Files of phrasings; "" for ours."""

    numbers: str
    persona: str
    code: str
    judge: str
