"""Specs of the experiments along MNIST distillation: the other presets of `configs/theorem.py`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TypeVar

from ml_collections import ConfigDict

from sublim_jax import specs
from sublim_jax.data import images
from sublim_jax.errors import UserError
from sublim_jax.experiments.mnist.spec import DataSpec, MnistSpec, check_read
from sublim_jax.overrides import check_distinct
from sublim_jax.specs import Count, ExperimentSpec, MeshSpec

MIN_SETTINGS = 3  # of a rank correlation
# Keys of config.mnist that the settings of `forecast` vary, and where their values are.
VARIED = {"model.auxiliary": "auxiliary", "inputs.kind": "kinds", "student.init_distance": "distances"}
# Keys of config.mnist that are set in the outer config, with their default values.
OUTSIDE = {"seed": 0, "data.path": "", "mesh.replica": -1, "mesh.fsdp": 1, "mesh.tensor": 1}


@dataclass(frozen=True, kw_only=True)
class AlongSpec(ExperimentSpec):
    """Fields that all experiments share."""

    seed: int
    mesh: MeshSpec
    data: DataSpec
    mnist: MnistSpec

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            for setting in (self.mnist, *self.settings):
                check_covered(setting)
        except UserError as error:
            raise UserError(f"config.mnist: {error}") from error

    @property
    def settings(self) -> list[MnistSpec]:
        """The MNIST experiments that are measured. Raises UserError for one that makes no sense."""
        return [self.mnist]


@dataclass(frozen=True, kw_only=True)
class ProbeSpec(AlongSpec):
    """Measured on some of the inputs, for several numbers of auxiliary logits."""

    probe: int
    auxiliary: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.auxiliary:
            raise UserError("auxiliary is empty: name some numbers of auxiliary logits, such as 2,3,5")
        check_distinct("auxiliary", self.auxiliary)
        super().__post_init__()
        if not 0 < self.probe <= self.mnist.inputs.count:
            raise UserError(f"probe={self.probe} must be between 1 and inputs.count={self.mnist.inputs.count}")


@dataclass(frozen=True, kw_only=True)
class TrajectorySpec(ProbeSpec):
    every: Count
    iterations: Count

    @property
    def settings(self) -> list[MnistSpec]:
        """One for every number of auxiliary logits."""
        return [vary(self.mnist, {"model.auxiliary": m}) for m in self.auxiliary]


@dataclass(frozen=True, kw_only=True)
class ForecastSpec(ProbeSpec):
    kinds: tuple[str, ...]
    distances: tuple[float, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("kinds", "distances", "widths"):
            if not getattr(self, name) and name != "widths":
                raise UserError(f"{name} is empty: name some values to vary it over")
            check_distinct(name, getattr(self, name))
        specs.check_some_of("kinds", self.kinds, images.KINDS)
        if min(self.distances) < 0:
            raise UserError(f"distances={self.distances} must not be negative")
        if min(self.widths, default=1) < 1:
            raise UserError(f"widths={self.widths}: choose 1 or more")
        super().__post_init__()
        if len(self.settings) < MIN_SETTINGS:
            raise UserError(
                f"auxiliary, kinds, distances and widths make {len(self.settings)} settings, and a rank correlation "
                f"needs {MIN_SETTINGS}; name more values"
            )

    @property
    def settings(self) -> list[MnistSpec]:
        """Auxiliary logits × inputs × init distance, and auxiliary logits × width, without duplicates."""
        changes: list[dict[str, object]] = [
            {"model.auxiliary": m, "inputs.kind": kind, "student.init_distance": distance}
            for m in self.auxiliary
            for kind in self.kinds
            for distance in self.distances
        ]
        changes += [{"model.auxiliary": m, "model.width": width} for m in self.auxiliary for width in self.widths]
        return list(dict.fromkeys(vary(self.mnist, change) for change in changes))


@dataclass(frozen=True, kw_only=True)
class ExamplesSpec(AlongSpec):
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise UserError(f"share={self.share} must be above 0 and at most 0.5")
        if self.share * (count := self.mnist.inputs.count) < 1:
            raise UserError(f"share={self.share} of mnist.inputs.count={count} is less than one image; take more")
        super().__post_init__()

    @property
    def settings(self) -> list[MnistSpec]:
        """With all images, and with a share of them for proportionally more epochs."""
        count, epochs = int(self.share * self.mnist.inputs.count), round(self.mnist.student.epochs / self.share)
        return [self.mnist, vary(self.mnist, {"inputs.count": count, "student.epochs": epochs})]


Kind = TypeVar("Kind", bound=AlongSpec)


def read(kind: type[Kind], config: ConfigDict) -> Kind:
    """The spec of a config; its MNIST experiment takes the seed, the data and the mesh of the outer config.

    Raises UserError for the first value, of a config or of the MNIST config in it, that makes no sense.
    """
    values = specs.plain(config)
    specs.check_numbers(values)
    try:
        mnist = specs.build(MnistSpec, values.get("mnist", {}))
    except UserError as error:
        raise UserError(f"config.mnist: {error}") from error
    spec = specs.read(kind, config, mnist=mnist)
    for key, usual in OUTSIDE.items():
        if (given := attrgetter(key)(mnist)) not in (usual, attrgetter(key)(spec)):
            raise UserError(f"mnist.{key}={given}: it is that of the whole; set --config.{key} instead")
    return replace(spec, mnist=replace(mnist, seed=spec.seed, data=spec.data, mesh=spec.mesh))


def vary(spec: MnistSpec, changes: Mapping[str, object]) -> MnistSpec:
    """The spec with `changes`, from paths "part.name" to values."""
    for path, value in changes.items():
        part, name = path.split(".")
        spec = replace(spec, **{part: replace(getattr(spec, part), **{name: value})})
    return replace(spec, point=", ".join(f"{path}={value}" for path, value in changes.items()))


def check_typed(spec: AlongSpec, keys: Iterable[str]) -> None:
    """Raises UserError for a value of the MNIST experiment that nothing reads."""
    for key in keys:
        part, _, inner = key.partition(".")
        if part != "mnist":
            continue
        if inner in VARIED and isinstance(spec, ForecastSpec):
            raise UserError(f"config.{key}: the settings vary it; set config.{VARIED[inner]} instead")
        check_read(spec.settings, inner, "config.mnist.")


def check_covered(spec: MnistSpec) -> None:
    """Raises UserError for an MNIST experiment for which coverage is not defined."""
    if spec.sweep.axis:
        raise UserError(f"sweep.axis={spec.sweep.axis!r}: a sweep is for configs/mnist.py; leave it out")
    if spec.runs_at_once < spec.runs:
        raise UserError("coverage takes all runs at once: set mnist.runs_at_once to mnist.runs")
    if spec.student.objective == "sampled" or spec.inputs.fresh:
        raise UserError("coverage needs an objective on logits, and fixed inputs: mnist.inputs.fresh=False")
    if spec.student.activation != spec.teacher.activation or spec.student.trained_layers != "all":
        raise UserError(
            "coverage is of one network, all of whose layers learn: give teacher and student the same activation, "
            "and leave mnist.student.trained_layers=all"
        )
    if spec.arms != ("auxiliary",):
        raise UserError(f"mnist.arms={spec.arms}: only students of the auxiliary logits are measured; leave it")
    if spec.model.auxiliary < 2:
        raise UserError("auxiliary: a softmax over one logit is 1 whatever it is; take 2 logits or more")
