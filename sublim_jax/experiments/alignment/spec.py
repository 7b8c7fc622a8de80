"""Specs of the check of the theorem."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool

from sublim_jax import objectives, theorem
from sublim_jax.errors import UserError
from sublim_jax.experiments.mnist.spec import DataSpec
from sublim_jax.overrides import check_distinct
from sublim_jax.specs import MAX_ROWS, ExperimentSpec, MeshSpec, Positive, Text, check_count, check_positive
from sublim_jax.weights.spec import NamedModel

NUM_LOGITS = 13  # ten digits and three more
NUM_IMAGES = 512  # of MNIST
PER_SEQUENCE = 4  # examples per sequence of the transformer
SMALL = 0.004  # the teacher's step up to which first-order statements are judged
DECADES = 4.0  # of the teacher's step that a verdict needs
MAX_STEP, MAX_NUM_STEPS = 6, 1000
READS, NOISE = "reads MNIST", "noise"  # the teacher and the inputs of the first settings

Draws: TypeAlias = Annotated[int, check_positive, partial(check_count, maximum=MAX_ROWS)]


class About(NamedTuple):
    """Description of a setting, which is a row of the report."""

    network: str
    teacher: str
    inputs: str
    smooth: bool = True  # the network has no kinks

    @property
    def name(self) -> str:
        return f"{self.network}; {self.teacher}; {self.inputs}"

    @property
    def short(self) -> str:
        """The parts that differ from the first settings'."""
        return ", ".join([self.network] + [text for text in (self.teacher, self.inputs) if text not in (READS, NOISE)])


@dataclass(frozen=True)
class StepsSpec:
    """How far the teacher moves: `num` steps from 10^min to 10^max, root mean square changes of its logits."""

    small: ClassVar[float] = SMALL
    narrowest: ClassVar[float] = SMALL  # up to here, where that is less, controls are judged
    decades: ClassVar[float] = DECADES
    min: float
    max: float
    num: int

    def __post_init__(self) -> None:
        check_count("steps.num", self.num, maximum=MAX_NUM_STEPS)
        steps = np.linspace(self.min, self.max, self.num)
        judged = steps[steps <= np.log10(self.narrowest)]
        if self.num < 5 or not len(judged) or judged[-1] - judged[0] < self.decades:
            usual = np.floor(np.log10(self.narrowest)) - self.decades - 1
            raise UserError(
                f"steps.num={self.num}, steps.min={self.min:g}, steps.max={self.max:g}: verdicts are about those up to "
                f"{self.narrowest:g}; take at least 5 over at least {self.decades:g} decades below it, such as "
                f"--config.steps.min={usual:g}"
            )
        # Logits are of order 1; rounding hides D_S·D_T below this step.
        floor = np.log10(np.finfo(float).eps / theorem.NOISE_ALLOWED)
        if self.min < floor:
            raise UserError(
                f"float64 cannot resolve a teacher's step of 1e{self.min:g}: choose --config.steps.min="
                f"{np.ceil(10 * floor) / 10:.1f} or more"
            )
        if self.max > MAX_STEP:
            raise UserError(f"steps.max={self.max:g} is a power of ten: choose {MAX_STEP} or less")


@dataclass(frozen=True, kw_only=True)
class AlignmentSpec(ExperimentSpec):
    """The whole check; `configs/theorem.py` explains the values."""

    seed: int
    mesh: MeshSpec
    data: DataSpec
    steps: StepsSpec
    support: tuple[int, ...]
    examples: Annotated[int, check_positive, partial(check_count, minimum=PER_SEQUENCE, maximum=NUM_IMAGES)]
    learning_rate: Positive
    num_draws: Draws
    num_label_draws: Annotated[int, partial(check_count, minimum=2, maximum=MAX_ROWS)]  # a spread needs two

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 3 <= self.support_mask().sum() < NUM_LOGITS:
            raise UserError(
                f"support={self.support}: take 3 logits or more, of which a control cuts all but two, and leave one "
                "that is not compared"
            )

    def support_mask(self) -> Bool[np.ndarray, "logits"]:
        """The logits on which student and teacher are compared."""
        check_distinct("support", self.support)
        try:
            return objectives.support_mask(self.support, NUM_LOGITS)
        except ValueError as error:
            raise UserError(f"config.{error}") from error


@dataclass(frozen=True)
class LanguageSteps(StepsSpec):
    """A language model's logits are large, sums of many terms: rounding hides steps below 1e-5."""

    small: ClassVar[float] = 0.032  # above it, the error's second order bends the lines
    narrowest: ClassVar[float] = 4e-4  # above it, growing terms outweigh a control's constant one
    decades: ClassVar[float] = 3.0


@dataclass(frozen=True, kw_only=True)
class LanguageSpec(ExperimentSpec):
    """The check inside a language model; `configs/theorem.py` explains the values."""

    seed: int
    mesh: MeshSpec
    model: NamedModel
    kind: Text
    trait: Text
    num_rows: Annotated[int, check_count]
    num_integers: Annotated[int, check_count]
    num_questions: Annotated[int, check_count]
    rank: Annotated[int, check_count]
    noise: Positive
    steps: LanguageSteps
    learning_rate: Positive
