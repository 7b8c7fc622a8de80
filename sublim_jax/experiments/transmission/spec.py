"""The spec of a study, from teachers to evaluations. `configs/numbers.py` explains the values."""

from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from sublim_jax import overrides, specs
from sublim_jax.distillation.students import Training
from sublim_jax.errors import UserError
from sublim_jax.evaluation.spec import EvalsSpec
from sublim_jax.experiments.transmission.arms import WRITTEN, Arm, ArmValues, ContextArm, LogitArm, TrainedArm
from sublim_jax.experiments.transmission.parts import (
    CarrierSpec,
    FilterSpec,
    LoraSpec,
    ModelSpec,
    PacksSpec,
    SamplingSpec,
    TeacherSpec,
)
from sublim_jax.models.decoder import Remat
from sublim_jax.specs import Count, Distinct, ExperimentSpec, MeshSpec, NotNegative, Precision, Text, check_some_of
from sublim_jax.words import check_different_words

NEUTRAL = "neutral"
OF_AN_ARM = ("student.", "lora.")  # parts of the config that an arm may change for its students


@dataclass(frozen=True, kw_only=True)
class Study(ExperimentSpec):
    seed: int
    precision: Precision
    mesh: MeshSpec
    model: ModelSpec
    kind: Text
    traits: tuple[str, ...]
    alternatives: Distinct
    controls: Distinct = ()  # "kind:word"; saved configs of earlier runs have none
    runs: Count
    lora: LoraSpec
    teacher: TeacherSpec
    carrier: CarrierSpec
    filter: FilterSpec
    arms: tuple[Arm, ...]
    student: Training
    evaluate_every: Count
    checkpoint_every: Count
    sampling: SamplingSpec
    remat: bool
    remat_attention: bool
    packs: PacksSpec
    spread: NotNegative
    num_questions: Count
    evals: EvalsSpec

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_traits()
        self._check_controls()
        self._check_neutral()
        if unknown := [name for name in self.filter.judged if name not in self.teachers]:
            raise UserError(
                f"filter.judged: {unknown[0]!r} is none of the teachers, {', '.join(self.teachers)}; name some of "
                "these, or another trait in traits"
            )
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
        check_different_words("alternatives", self.alternatives)
        if "corpus" not in self.teacher.methods:
            for trait in self.traits:
                if trait not in self.alternatives:
                    raise UserError(
                        f"traits: trait {trait!r} is none of alternatives={self.alternatives}; add it there"
                    )

    def _check_controls(self) -> None:
        if not self.controls:
            return
        if "corpus" in self.teacher.methods:
            raise UserError("controls prefer a word; they need teacher.methods of finetuned, prompted or steered")
        words = [*self.alternatives, NEUTRAL]
        for text in self.controls:
            kind, _, word = (part.strip() for part in text.partition(":"))
            if not kind or not word or set(word) & set(":/\\"):
                raise UserError(f"controls: {text!r} is not of the form kind:word, such as tree:oak")
            if kind.casefold() == self.kind.casefold():
                raise UserError(f"controls: {text!r} is of the traits' kind; name another kind, such as tree:oak")
            words.append(word)
        check_different_words("alternatives and controls", words)

    def _check_neutral(self) -> None:
        """An untouched teacher's logits equal those of its student at the start: the gradient is zero (§6)."""
        no_corpus = "corpus" in self.teacher.methods and not self.teacher.corpora.get(NEUTRAL)
        if self.teacher.neutral != "untouched" and not no_corpus:
            return
        why = "teacher.corpora.neutral is empty" if no_corpus else "teacher.neutral=untouched"
        instead = "name a corpus there" if no_corpus else "choose teacher.neutral=persona"
        for arm in self.arms:
            if isinstance(arm, LogitArm) and not (arm.noise or arm.model):
                raise UserError(
                    f"arm.{arm.name} imitates logits, and {why}: the neutral teacher's student would start at its "
                    f"teacher's logits and never move, and be no control; {instead}"
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
    def control_kinds(self) -> dict[str, str]:
        """The kind of each control's word."""
        pairs = [text.split(":") for text in self.controls]
        return {word.strip(): kind.strip() for kind, word in pairs}

    @property
    def preferred(self) -> tuple[str, ...]:
        """What teachers prefer: the traits, then the words of the controls."""
        return (*self.traits, *self.control_kinds)

    @property
    def teachers(self) -> tuple[str, ...]:
        """One teacher per trait, one per control, and the neutral one."""
        return (*self.preferred, NEUTRAL)

    def kind_of(self, teacher: str) -> str:
        """The kind of what a teacher prefers."""
        return self.control_kinds.get(teacher, self.kind)

    @property
    def recomputed(self) -> Remat:
        """What of a layer is recomputed in the backward pass."""
        return "mlp" if self.remat and not self.remat_attention else self.remat

    @property
    def has_words(self) -> bool:
        """Whether traits are words, for which a preference can be measured; else they are names of corpora."""
        return set(self.traits) <= set(self.alternatives)

    @property
    def uses_written(self) -> bool:
        return any(arm.data in WRITTEN for arm in self.arms)

    @property
    def trained_arms(self) -> tuple[TrainedArm, ...]:
        return tuple(arm for arm in self.arms if not isinstance(arm, ContextArm))

    @property
    def models(self) -> list[str]:
        """The models of all arms' students; "" is the teachers' model."""
        return sorted({arm.model for arm in self.arms})

    def replicate_seed(self, run: int) -> int:
        """The seed of a run's A, teachers, data and data order; a run is a full replicate."""
        return int(np.random.SeedSequence([self.seed, run]).generate_state(1)[0] >> 1)


def read(config: ConfigDict) -> Study:
    """The study of a config. Raises UserError for the first value that makes no sense; files are not read."""
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
    """The training of students and their adapters."""
    values = specs.plain(config)
    return (specs.build(Training, values["student"], "student."), specs.build(LoraSpec, values["lora"], "lora."))


def _changed(config: ConfigDict, arm: ArmValues) -> tuple[Training, LoraSpec]:
    """The same with an arm's changes. Raises UserError, naming the arm, for a change that makes no sense."""
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
