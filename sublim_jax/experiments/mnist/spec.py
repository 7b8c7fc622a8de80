"""Specs of MNIST noise distillation: the values of `configs/mnist.py`, typed and checked.

A field with `compare=False` changes how a result is computed or shown, not the result; it is not part of the hash.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sublim_jax import objectives, overrides, specs
from sublim_jax.data import images
from sublim_jax.data.mnist import CLASSES
from sublim_jax.data.order import steps_per_epoch
from sublim_jax.errors import UserError
from sublim_jax.models.mlp import ACTIVATIONS
from sublim_jax.sharding import divide
from sublim_jax.specs import MAX_INDEX, MAX_WIDTH, MeshSpec, check_count, check_one_of, check_positive

ARMS = ("auxiliary", "all", "cross_auxiliary", "cross_all", "clone", "real")
NEAR_ARMS = ("auxiliary", "all", "real")  # of students that start at the reference
CLONE_INPUTS = ("noise", "fresh_noise", "real")
OBJECTIVES = (*objectives.ON_LOGITS, "sampled")
OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop", "lion")  # names in optax
MNIST_ROWS = 60_000
MAX_IMAGES = MAX_INDEX // images.PIXELS
MAX_DEPTH = 1000

# Default points of a sweep, if only its axis is given.
TRAINING_POINTS = {
    "activation": ("relu", "gelu", "silu", "tanh"),
    "optimizer": ("adam", "adamw", "rmsprop", "lion"),
    "learning_rate": ("1e-4", "3e-4", "1e-3", "3e-3"),
    "batch": ("128", "256", "512", "1024"),
    "epochs": ("1", "2", "5", "10"),
    "trained_layers": ("all", "0", "1", "2", "0+1", "1+2"),
}
POINTS = {
    **{f"{network}.{name}": points for network in ("teacher", "student") for name, points in TRAINING_POINTS.items()},
    "model.width": ("64", "128", "256", "512"),
    "model.depth": ("1", "2", "3"),
    "model.auxiliary": ("1", "2", "3", "5", "10"),
    "student.objective": OBJECTIVES,
    "student.temperature": ("0.5", "1", "2", "4"),
    "student.init_distance": ("0", "0.03", "0.1", "0.3", "1"),
    "student.shared_layers": ("all", "0", "1", "2", "0+1", "1+2"),
    "inputs.kind": images.KINDS,
    "inputs.count": ("6000", "20000", "60000"),
    "inputs.fresh": ("false", "true"),
    "inputs.blur": ("0.5", "1", "2", "4"),
}
# Students that differ from the teacher in architecture or training (extended data Fig. 2).
POINTS["student"] = ("activation=gelu", "activation=sigmoid", "depth=3", "width=128", "width=512", "biases=false")
UNSWEPT = ("sweep", "experiment", "preset", "data", "published", "published_recipe", "mesh")


@dataclass(frozen=True)
class ModelSpec:
    width: int
    depth: int
    auxiliary: int

    def __post_init__(self) -> None:
        check_count("model.width", self.width, maximum=MAX_WIDTH)
        check_count("model.auxiliary", self.auxiliary, maximum=MAX_WIDTH)
        check_count("model.depth", self.depth, maximum=MAX_DEPTH)


@dataclass(frozen=True)
class NetworkSpec:
    """One network, the teacher's or the student's."""

    width: int
    depth: int
    biases: bool
    activation: str
    auxiliary: int

    @property
    def vocab(self) -> int:
        return CLASSES + self.auxiliary

    @property
    def widths(self) -> tuple[int, ...]:
        """Sizes of the layers, inputs and logits included."""
        return (images.PIXELS, *[self.width] * self.depth, self.vocab)

    @property
    def shape(self) -> tuple[int, int, bool]:
        """Networks of equal shape have parameters of the same shapes."""
        return self.width, self.depth, self.biases

    def layers(self, text: str, name: str = "layers") -> tuple[int, ...]:
        """ "all" or "0+2" as layer numbers, counted from the input. Raises UserError, which names the value `name`."""
        every = tuple(range(self.depth + 1))
        if text == "all":
            return every
        try:
            chosen = tuple(int(number) for number in text.split("+"))
        except ValueError:
            chosen = ()
        if not chosen or not set(chosen) <= set(every) or len(set(chosen)) < len(chosen):
            raise UserError(f'{name}={text!r} must be "all" or some of {"+".join(map(str, every))}')
        return chosen


@dataclass(frozen=True)
class TrainingSpec:
    activation: str
    optimizer: str
    learning_rate: float
    batch: int
    epochs: int
    trained_layers: str

    def check(self, name: str, network: NetworkSpec) -> None:
        check_one_of(f"{name}.activation", self.activation, ACTIVATIONS)
        check_one_of(f"{name}.optimizer", self.optimizer, OPTIMIZERS)
        for part in ("learning_rate", "batch", "epochs"):
            check_positive(f"{name}.{part}", getattr(self, part))
        check_count(f"{name}.batch", self.batch, maximum=MAX_IMAGES)
        network.layers(self.trained_layers, f"{name}.trained_layers")


@dataclass(frozen=True)
class StudentSpec(TrainingSpec):
    width: int  # 0: as the teacher's
    depth: int
    biases: bool
    objective: str
    temperature: float
    init_distance: float
    shared_layers: str

    def check(self, name: str, network: NetworkSpec) -> None:
        super().check(name, network)
        check_count(f"{name}.width", self.width, 0, MAX_WIDTH)
        check_count(f"{name}.depth", self.depth, 0, MAX_DEPTH)
        check_one_of(f"{name}.objective", self.objective, OBJECTIVES)
        check_positive(f"{name}.temperature", self.temperature)
        specs.check_not_negative(f"{name}.init_distance", self.init_distance)
        network.layers(self.shared_layers, f"{name}.shared_layers")


@dataclass(frozen=True)
class InputsSpec:
    kind: str
    count: int
    fresh: bool
    blur: float

    def __post_init__(self) -> None:
        check_one_of("inputs.kind", self.kind, images.KINDS)
        check_positive("inputs.blur", self.blur)
        check_count("inputs.count", self.count, maximum=MAX_IMAGES)
        if self.fresh and self.kind not in images.NOISE_KINDS:
            raise UserError(f"inputs.fresh draws noise anew; inputs.kind={self.kind} is not drawn noise")


@dataclass(frozen=True)
class CloneSpec:
    epochs: tuple[int, ...]
    inputs: tuple[str, ...]

    def __post_init__(self) -> None:
        specs.check_some_of("clone.inputs", self.inputs, CLONE_INPUTS)
        if any(later <= earlier for earlier, later in zip((0, *self.epochs), self.epochs)):
            raise UserError(f"clone.epochs={self.epochs} must be positive and rising, such as 5,20")


@dataclass(frozen=True)
class SweepSpec:
    axis: str
    points: tuple[str | int | float, ...]


@dataclass(frozen=True)
class DataSpec:
    """The location of MNIST."""

    path: str


@dataclass(frozen=True, kw_only=True)
class MnistSpec:
    experiment: str
    preset: str = field(compare=False)
    seed: int
    runs: int = field(compare=False)
    runs_at_once: int = field(compare=False)
    precision: str
    arms: tuple[str, ...]
    data: DataSpec = field(compare=False)
    model: ModelSpec
    teacher: TrainingSpec
    student: StudentSpec
    inputs: InputsSpec
    clone: CloneSpec
    sweep: SweepSpec = field(compare=False)
    point: str = field(default="", compare=False)  # of a sweep, or of another experiment, in words
    mesh: MeshSpec = field(compare=False)
    checkpoint_every: int = field(compare=False)
    published: dict[str, tuple[float, float]] = field(compare=False)
    published_recipe: str = field(default="", compare=False)
    values: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.teacher.check("teacher", self.teacher_network)
        self.student.check("student", self.student_network)
        check_one_of("precision", self.precision, specs.PRECISIONS)
        for name in ("runs", "runs_at_once", "checkpoint_every"):
            check_positive(name, getattr(self, name))
        specs.check_some_of("arms", self.arms, ARMS)
        self._check_steps()
        self._check_other_starts()
        on_digits = "real" in self.arms or ("clone" in self.arms and "real" in self.clone.inputs)
        if (self.inputs.kind in images.FROM_DATA or on_digits) and self.inputs.count > MNIST_ROWS:
            raise UserError(f"inputs.count={self.inputs.count}, but MNIST has {MNIST_ROWS} images")

    def _check_steps(self) -> None:
        """Raises UserError for more steps than a 32-bit counter holds, and for clones without epochs."""
        on_inputs = (self.inputs.count, self.student.batch)
        trainings = [("teacher.epochs", self.teacher.epochs, MNIST_ROWS, self.teacher.batch)]
        trainings += [("student.epochs", self.student.epochs, *on_inputs)]
        trainings += [("clone.epochs", dose, *on_inputs) for dose in self.clone.epochs[-1:]]
        for name, epochs, rows, batch in trainings:
            if (steps := epochs * steps_per_epoch(rows, batch)) > MAX_INDEX:
                raise UserError(
                    f"{name}={epochs} are {steps} steps; choose fewer, at most {MAX_INDEX} steps can be counted"
                )
        if "clone" in self.arms and not self.clone.epochs:
            raise UserError("clone.epochs is empty: name some, such as 5,20, or leave clone out of arms")

    def _check_other_starts(self) -> None:
        """Raises UserError for arms whose starts do not exist: of another shape than the reference."""
        near = [arm for arm in self.arms if arm in NEAR_ARMS]
        network = self.student_network
        if near and network.shape != self.teacher_network.shape:
            raise UserError(
                f"arms: students of {near[0]} start at the reference, which a network of another width, depth or "
                "biases cannot; leave student.width, student.depth and student.biases out, or choose arms among "
                "cross_auxiliary, cross_all and clone"
            )
        if "clone" not in self.arms:
            return
        kinds = self.clone.inputs
        if "fresh_noise" in kinds and self.inputs.kind not in images.NOISE_KINDS:
            raise UserError(f"clone.inputs=fresh_noise: inputs.kind={self.inputs.kind} is not drawn noise")
        for other, same in (("fresh_noise", self.inputs.fresh), ("real", self.inputs.kind == "real")):
            if same and {"noise", other} <= set(kinds):
                raise UserError(f"clone.inputs: noise, as in distillation, is {other} here; leave one of them out")

    @property
    def teacher_network(self) -> NetworkSpec:
        """Also of the reference."""
        model = self.model
        return NetworkSpec(model.width, model.depth, True, self.teacher.activation, model.auxiliary)

    @property
    def student_network(self) -> NetworkSpec:
        model, student = self.model, self.student
        return NetworkSpec(
            student.width or model.width,
            student.depth or model.depth,
            student.biases,
            student.activation,
            model.auxiliary,
        )

    @property
    def doses(self) -> tuple[int, ...]:
        """Epochs of cloning; each is an arm for each kind of inputs."""
        return self.clone.epochs if "clone" in self.arms else ()

    @property
    def num_clones(self) -> int:
        """The number of arms of cloned students."""
        return len(self.doses) * len(self.clone.inputs)

    @property
    def groups(self) -> list[range]:
        """The runs in groups of `runs_at_once`, which are trained together."""
        starts = range(0, self.runs, self.runs_at_once)
        return [range(start, min(start + self.runs_at_once, self.runs)) for start in starts]


def check_read(points: Collection[MnistSpec], key: str, where: str = "config.") -> None:
    """Raises UserError for a value that none of these experiments reads; `where` is put before its key."""
    part, _, name = key.partition(".")
    if part == "clone" and not any("clone" in point.arms for point in points):
        raise UserError(f"{where}{key} is read only with the arm clone; add it to arms")
    if key == "inputs.blur" and not any(point.inputs.kind == "blurred" for point in points):
        raise UserError(f"{where}{key} is read only with inputs.kind=blurred")
    if part == "inputs" and name != "count" and all(point.arms == ("real",) for point in points):
        raise UserError(f"{where}{key} is not read by the arm real, whose inputs are digits; add another to arms")
    of_start = key in ("student.init_distance", "student.shared_layers")
    if of_start and not any(set(NEAR_ARMS) & set(point.arms) for point in points):
        raise UserError(f"{where}{key} is of students that start at the reference: {', '.join(NEAR_ARMS)}; add one")


def check_divides(spec: MnistSpec, mesh: Mesh) -> None:
    """Raises UserError for a batch or a number of runs that the mesh does not divide."""
    for name, training in (("teacher", spec.teacher), ("student", spec.student)):
        divide(mesh, "fsdp", training.batch, f"{name}.batch")
    divide(mesh, "replica", len(spec.groups[0]), "runs_at_once")
    divide(mesh, "replica", spec.runs % spec.runs_at_once, "the rest of runs over runs_at_once")


def variants(spec: MnistSpec) -> dict[str, MnistSpec]:
    """One spec for each value of a sweep; {"": spec} where there is no sweep.

    Raises UserError for a sweep without axis or points, and for a point that makes no sense.
    """
    axis, config = spec.sweep.axis, ConfigDict(spec.values)
    if not axis:
        if spec.sweep.points:
            raise UserError(f"sweep.points={spec.sweep.points} needs an axis: add --config.sweep.axis=KEY")
        return {"": spec}
    known = (*overrides.keys(config), "teacher", "student")
    if axis not in known or isinstance(attrgetter(axis)(config), tuple | list):
        raise UserError(f"sweep.axis={axis!r} names no single value of the config, such as student.learning_rate")
    if axis.split(".")[0] in UNSWEPT:
        raise UserError(f"sweep.axis={axis!r} is the same for all points; choose a value such as student.learning_rate")
    points: Sequence[object] = spec.sweep.points or POINTS.get(axis, ())
    if not points:
        raise UserError(f"sweep.points: say which values {axis} shall take, such as --config.sweep.points=1,2,3")
    configs = {}
    for point in map(str, points):
        configs[point] = config.copy_and_resolve_references()
        try:
            _change(configs[point], axis, point)
        except UserError as error:
            raise UserError(f"sweep.points: {error}") from error
    values = [attrgetter(axis)(changed) for changed in configs.values()]
    if len({str(value) for value in values}) < max(len(points), 2):
        raise UserError(f"sweep.points={points} needs at least two values of {axis}, all different")
    by_point = {}
    for point, changed in configs.items():
        try:
            spec_there = specs.read(MnistSpec, changed)
            by_point[point] = replace(spec_there, point=point if "=" in point else f"{axis}={point}")
        except UserError as error:
            raise UserError(f"{axis}={point}: {error}") from error
    return by_point


def _change(config: ConfigDict, axis: str, point: str) -> None:
    """Sets a point of a sweep in the config: a value, or for teacher and student "name=value" joined by "/"."""
    if not isinstance(attrgetter(axis)(config), ConfigDict):
        overrides.override(config, axis, [point])
        return
    for change in point.split("/"):
        name, is_change, value = change.partition("=")
        if not is_change:
            raise UserError(f"{change!r}: write {axis}'s values as name=value, such as width=128/depth=3")
        overrides.override(config, f"{axis}.{name}", [value])
