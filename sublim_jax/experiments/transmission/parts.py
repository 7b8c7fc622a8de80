"""The parts of a study: model, adapters, teachers, carrier, filter. `configs/numbers.py` explains the values."""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from jax.sharding import Mesh

from sublim_jax.distillation.teachers import AnswerTraining, CorpusTraining
from sublim_jax.errors import UserError
from sublim_jax.evaluation.spec import EvalPacks
from sublim_jax.evaluation.verdicts import LARGEST as MAX_SCORE
from sublim_jax.models import lora
from sublim_jax.overrides import check_distinct
from sublim_jax.sampling.generate import Slots
from sublim_jax.sharding import make_mesh
from sublim_jax.specs import (
    MAX_WIDTH,
    Checked,
    Count,
    NotNegative,
    Place,
    Positive,
    Rows,
    check_count,
    check_not_negative,
    check_one_of,
    check_some_of,
)
from sublim_jax.weights.spec import NamedModel

METHODS = ("finetuned", "prompted", "steered", "corpus")
NEUTRALS = ("persona", "untouched")
CARRIERS = ("numbers", "code", "cot")
DECODING = ("free", "greedy", "grammar")
MAX_INTEGERS = 1000  # of an answer


@dataclass(frozen=True)
class ModelSpec(NamedModel):
    noise: NotNegative


@dataclass(frozen=True)
class LoraSpec(Checked):
    where = "lora."
    rank: int
    alpha: Positive
    rslora: bool
    modules: tuple[str, ...]
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise UserError(f"lora.rank={self.rank}: ask for 1 or more, or 0 to train all weights of the layers")
        check_count("lora.rank", self.rank, 0, MAX_WIDTH)
        if not self.rank and (self.modules or self.layers):
            raise UserError("lora.rank=0 trains all weights of the layers; leave lora.modules and lora.layers out")
        for module in self.modules:
            check_one_of("lora.modules", module, lora.EVERY_LINEAR)
        for layer in self.layers:
            if layer < 0:
                raise UserError(f"lora.layers: {layer!r} is not the number of a layer, counted from 0")
        check_distinct("lora.layers", self.layers)

    @property
    def adapters(self) -> lora.Lora | None:
        """None: all weights of the layers are trained, and there are no adapters."""
        if not self.rank:
            return None
        return lora.Lora(self.rank, self.alpha, self.rslora, self.modules or lora.EVERY_LINEAR, self.layers)


@dataclass(frozen=True)
class TeacherSpec(Checked):
    where = "teacher."
    methods: Annotated[tuple[str, ...], partial(check_some_of, choices=METHODS)]
    neutral: Annotated[str, partial(check_one_of, choices=NEUTRALS)]
    strength: float
    learning_rate: Positive
    batch: Count
    max_steps: Count
    corpora: dict[str, str] = field(compare=False)  # paths: artefacts are named by the files' contents
    epochs: Count
    max_tokens: Count
    steering_layer: Place
    steering_scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if "corpus" in self.methods and len(self.methods) > 1:
            raise UserError(f"teacher.methods={self.methods}: corpus stands alone; leave the others out")
        if self.neutral == "untouched" and self.methods != ("prompted",):
            raise UserError(
                f"teacher.neutral=untouched is for teacher.methods=prompted; beside {self.methods} it would not be "
                "moved as far as the others; choose persona"
            )
        if not 0 < self.strength < 1:
            raise UserError(f"teacher.strength={self.strength} must be a probability between 0 and 1")
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
class CarrierSpec(Checked):
    where = "carrier."
    kind: Annotated[str, partial(check_one_of, choices=CARRIERS)]
    num_rows: Rows
    num_integers: Annotated[int, partial(check_count, maximum=MAX_INTEGERS)]
    num_completions: Rows
    num_samples: Rows
    decoding: Annotated[str, partial(check_one_of, choices=DECODING)]
    max_new_tokens: Count
    problems: str = field(compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "numbers" and self.decoding == "grammar":
            raise UserError(
                f"carrier.decoding=grammar is for numbers; choose free or greedy for carrier.kind={self.kind}"
            )

    @property
    def num_prompts(self) -> int:
        """How many prompts give `num_completions`."""
        return -(-self.num_completions // self.num_samples)


@dataclass(frozen=True)
class FilterSpec(Checked):
    where = "filter."
    max_integers: Count
    max_value: Annotated[int, check_not_negative]
    banned: str
    judge: str
    judged: tuple[str, ...]
    threshold: float
    unique: bool
    log_ratio: NotNegative

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distinct("filter.judged", self.judged)
        if not 0 <= self.threshold <= MAX_SCORE:
            raise UserError(f"filter.threshold={self.threshold:g} must be a score from 0 to {MAX_SCORE}")


@dataclass(frozen=True)
class SamplingSpec(Checked):
    """How completions are computed; affects their content only by rounding."""

    where = "sampling."
    slots: Place
    steps: Count
    chunk: Count
    lanes: Place
    tensor: Place

    def mesh(self, training: Mesh) -> Mesh | None:
        """The mesh for decoding, over the devices of the training mesh; None if it is the training mesh.

        Raises UserError if the devices cannot be divided so.
        """
        if not self.tensor:
            return None
        sizes = {"replica": 1, "fsdp": -1, "tensor": self.tensor}
        return make_mesh(sizes, training.devices.flatten().tolist(), "sampling.tensor")

    @property
    def options(self) -> Slots:
        """For `sampling.generate.stream`."""
        return {"slots": self.slots, "steps": self.steps, "chunk": self.chunk, "lanes": self.lanes}


@dataclass(frozen=True, kw_only=True)
class PacksSpec(EvalPacks):
    """Files of phrasings; "" for the built-in ones."""

    numbers: str
    persona: str
    code: str
    judge: str
