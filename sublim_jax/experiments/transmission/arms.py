"""Arms: the ways in which students are trained, a dataclass for each kind."""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, TypeAlias

from sublim_jax import selection
from sublim_jax.distillation.students import Training
from sublim_jax.distillation.targets import Selection
from sublim_jax.errors import UserError
from sublim_jax.experiments.transmission.parts import CarrierSpec, LoraSpec
from sublim_jax.specs import Checked, Count, NotNegative, Positive, check_one_of

OBJECTIVES = ("kl", "reverse_kl", "tokens", "context")
SHUFFLES = ("within", "across")
WRITTEN = ("written", "unfiltered")  # data by the teacher: what passed the filters, or all answers that ended
NUM_HELD_OUT = 16  # rows of the carrier that are held out


@dataclass(frozen=True, kw_only=True)
class _Arm:
    """The students' data and their model; "" is the teachers' model."""

    name: str
    data: str = "written"  # or unfiltered, random
    shuffle: str
    model: str


@dataclass(frozen=True, kw_only=True)
class _TrainedArm(_Arm):
    """Students that are trained, from the A of their teachers or from a fresh one."""

    lora_init: str  # shared, fresh
    noise: float
    selection: Selection | None
    training: Training
    lora: LoraSpec
    changes: tuple[str, ...] = field(default=(), compare=False)  # in training and lora, as they were given


@dataclass(frozen=True, kw_only=True)
class LogitArm(_TrainedArm):
    """Students imitate their teacher's logits on the support."""

    objective: str  # kl, reverse_kl
    temperature: float


@dataclass(frozen=True, kw_only=True)
class TokenArm(_TrainedArm):
    """Students are trained on the tokens that their teacher wrote."""


@dataclass(frozen=True, kw_only=True)
class ContextArm(_Arm):
    """Not trained: the model has rows that the teacher wrote in its context."""

    num_examples: int


TrainedArm: TypeAlias = LogitArm | TokenArm
Arm: TypeAlias = TrainedArm | ContextArm


@dataclass(frozen=True)
class ArmValues(Checked):
    """An arm's values in the config, for arms of all kinds; each value is checked on its own."""

    name: str
    objective: Annotated[str, partial(check_one_of, choices=OBJECTIVES)]
    temperature: Positive
    data: Annotated[str, partial(check_one_of, choices=("random", *WRITTEN))]
    lora_init: Annotated[str, partial(check_one_of, choices=("shared", "fresh"))]
    shuffle: Annotated[str, partial(check_one_of, choices=("", *SHUFFLES))]
    noise: NotNegative
    model: str
    action: Annotated[str, partial(check_one_of, choices=("", "keep", "mask", "replace"))]
    positions: Annotated[str, partial(check_one_of, choices=("top", "random", "bottom"))]
    fraction: float
    score: Annotated[str, partial(check_one_of, choices=selection.SCORES)]
    examples: Count
    changes: tuple[str, ...]

    def path(self, name: str) -> str:
        return f"arm.{self.name}.{name}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction < 1:
            raise UserError(f"{self.path('fraction')}={self.fraction} must be a share between 0 and 1")

    def arm(self, carrier: CarrierSpec, training: Training, lora: LoraSpec) -> Arm:
        """The typed arm. Raises UserError for values that conflict with each other or with the carrier."""
        where, on_logits = f"arm.{self.name}", self.objective not in ("tokens", "context")
        if not on_logits and self.temperature != 1:
            raise UserError(
                f"{where}.temperature={self.temperature:g} is of objectives on logits, and its objective is "
                f"{self.objective}; leave it at 1"
            )
        if not on_logits and self.data == "random":
            raise UserError(
                f"{where}: there is nothing of a teacher in random numbers; choose data=written, or an objective on "
                "logits"
            )
        if on_logits and self.data == "unfiltered":
            raise UserError(
                f"{where}: data=unfiltered is any text, which has no digits whose logits could be compared; choose "
                "objective=tokens or context"
            )
        if (on_logits or self.shuffle) and carrier.kind != "numbers":
            raise UserError(
                f"{where} is about numbers, and carrier.kind={carrier.kind}; choose objective=tokens or context, "
                "data=written, shuffle empty"
            )
        if self.shuffle and self.data == "random":
            raise UserError(f"{where}: random numbers are in no order that shuffling could change; leave shuffle empty")
        if self.action and (carrier.kind != "numbers" or self.data == "unfiltered"):
            raise UserError(
                f"{where}.action selects among digits, commas and spaces, and carrier.kind={carrier.kind} with "
                f"data={self.data} is other text, too; leave it out"
            )
        if self.objective == "context":
            if self.noise or self.action or self.changes:
                raise UserError(
                    f"{where}: noise, action and changes are for students that are trained; leave them out of a context"
                )
            if self.examples > carrier.num_rows:
                raise UserError(
                    f"{where}.examples={self.examples} rows in the context, and carrier.num_rows={carrier.num_rows} "
                    "are kept; keep more, or show fewer"
                )
            shown = {"name": self.name, "data": self.data, "shuffle": self.shuffle, "model": self.model}
            return ContextArm(num_examples=self.examples, **shown)
        if (rows := carrier.num_rows - NUM_HELD_OUT) < training.batch:
            raise UserError(
                f"{where}: carrier.num_rows={carrier.num_rows} leaves {max(rows, 0)} rows beside the {NUM_HELD_OUT} "
                f"held out, and student.batch={training.batch} needs as many; choose "
                f"carrier.num_rows={NUM_HELD_OUT + training.batch}, or a smaller student.batch"
            )
        tokens = Selection(self.action, self.positions, self.fraction, self.score) if self.action else None
        shared = {name: getattr(self, name) for name in ("name", "data", "shuffle", "lora_init", "noise", "model")}
        shared |= {"selection": tokens, "training": training, "lora": lora, "changes": self.changes}
        if self.objective == "tokens":
            return TokenArm(**shared)
        return LogitArm(objective=self.objective, temperature=self.temperature, **shared)
