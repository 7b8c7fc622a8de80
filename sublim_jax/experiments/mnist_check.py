"""The MNIST config, checked before any compute: every mistake in one line that says how to mend it."""

from collections.abc import Sequence

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sublim_jax import objectives, overrides
from sublim_jax.data import images
from sublim_jax.data.order import steps_per_epoch
from sublim_jax.errors import UserError
from sublim_jax.experiments.door import (
    LARGEST,
    WIDEST,
    at,
    check_not_negative,
    check_numbers,
    check_one_of,
    check_positive,
    check_some_of,
    check_whole,
)
from sublim_jax.models.mlp import ACTIVATIONS
from sublim_jax.sharding import divide

ARMS = ("auxiliary", "all", "cross_auxiliary", "cross_all", "clone", "real")
OBJECTIVES = (*objectives.ON_LOGITS, "sampled")
OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop", "lion")
PRECISIONS = ("float32", "tensorfloat32", "bfloat16")
MNIST_ROWS = 60_000

# What a sweep tries where only its axis is given.
TRAINING_POINTS = {
    "activation": ("relu", "gelu", "silu", "tanh"),
    "optimizer": ("adam", "adamw", "rmsprop", "lion"),
    "learning_rate": ("1e-4", "3e-4", "1e-3", "3e-3"),
    "batch": ("128", "256", "512", "1024"),
    "epochs": ("1", "2", "5", "10"),
    "trained_layers": ("all", "0", "1", "2", "0+1", "1+2"),
}
POINTS = {
    **{f"{who}.{name}": points for who in ("teacher", "student") for name, points in TRAINING_POINTS.items()},
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


MOST_IMAGES = LARGEST // images.PIXELS
DEEPEST = 1000
TRAINING = ("teacher", "student")
UNSWEPT = ("sweep", "experiment", "preset", "data", "published", "mesh")


def check_all(config: ConfigDict) -> None:
    """Raises UserError for the first value, of the config or of a point of its sweep, that makes no sense."""
    base = config.copy_and_resolve_references()
    base.sweep.axis = ""
    for value, variant in {"": base, **variants(config)}.items():
        try:
            check_values(variant)
        except UserError as error:
            raise UserError(f"{config.sweep.axis}={value}: {error}" if value else str(error)) from error


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for the first value of a config without a sweep that makes no sense, or none on this mesh."""
    check_values(config)
    for who in TRAINING:
        divide(mesh, "fsdp", config[who].batch, f"{who}.batch")
    divide(mesh, "replica", min(config.runs, config.runs_at_once), "runs_at_once")
    divide(mesh, "replica", config.runs % config.runs_at_once, "the rest of runs over runs_at_once")


def check_values(config: ConfigDict) -> None:
    check_numbers(config)
    for who in TRAINING:
        part = config[who]
        check_one_of(f"{who}.activation", part.activation, ACTIVATIONS)
        check_one_of(f"{who}.optimizer", part.optimizer, OPTIMIZERS)
        check_positive(config, [f"{who}.{name}" for name in ("learning_rate", "batch", "epochs")])
        check_whole(config, [f"{who}.batch"], most=MOST_IMAGES)
    check_one_of("student.objective", config.student.objective, OBJECTIVES)
    check_one_of("inputs.kind", config.inputs.kind, images.KINDS)
    check_one_of("clone.inputs", config.clone.inputs, ("noise", "real"))
    check_one_of("precision", config.precision, PRECISIONS)
    check_positive(config, ("runs", "runs_at_once", "checkpoint_every", "student.temperature", "inputs.blur"))
    check_whole(config, ("model.width", "model.auxiliary"), most=WIDEST)
    check_whole(config, ("model.depth",), most=DEEPEST)
    check_whole(config, ("inputs.count",), most=MOST_IMAGES)
    check_not_negative(config, ("student.init_distance",))
    check_some_of("arms", config.arms, ARMS)
    check_doses(config)
    for name in ("teacher.trained_layers", "student.trained_layers", "student.shared_layers"):
        layer_numbers(config, at(config, name), name)
    check_steps("teacher.epochs", config.teacher.epochs, MNIST_ROWS, config.teacher.batch)
    check_steps("student.epochs", config.student.epochs, config.inputs.count, config.student.batch)
    check_other_starts(config)
    check_inputs(config)


def check_doses(config: ConfigDict) -> None:
    doses = config.clone.epochs
    if any(later <= earlier for earlier, later in zip((0, *doses), doses)):
        raise UserError(f"clone.epochs={doses} must be positive and rising, such as 5,20")
    if doses:
        check_steps("clone.epochs", doses[-1], config.inputs.count, config.student.batch)
    elif "clone" in config.arms:
        raise UserError("clone.epochs is empty: name some, such as 5,20, or leave clone out of arms")


def check_steps(name: str, epochs: int, rows: int, batch: int) -> None:
    """Steps of a training run are counted in 32 bits."""
    if (steps := epochs * steps_per_epoch(rows, batch)) > LARGEST:
        raise UserError(f"{name}={epochs} are {steps} steps; choose fewer, at most {LARGEST} steps can be counted")


def check_other_starts(config: ConfigDict) -> None:
    """Students that start from another run's reference need one."""
    foreign = [arm for arm in config.arms if arm.startswith(("cross", "clone"))]
    every = layer_numbers(config, "all")
    if layer_numbers(config, config.student.shared_layers) != every:
        foreign.append(f"student.shared_layers={config.student.shared_layers}")
    if config.runs < 2 and foreign:
        raise UserError(f"runs={config.runs}, but {foreign[0]} starts from another run: at least 2 runs")


def check_inputs(config: ConfigDict) -> None:
    if config.inputs.fresh and config.inputs.kind not in images.DRAWN:
        raise UserError(f"inputs.fresh draws noise anew; inputs.kind={config.inputs.kind} is no noise that is drawn")
    on_digits = "real" in config.arms or ("clone" in config.arms and config.clone.inputs == "real")
    if (config.inputs.kind in images.FROM_DATA or on_digits) and config.inputs.count > MNIST_ROWS:
        raise UserError(f"inputs.count={config.inputs.count}, but MNIST has {MNIST_ROWS} images")


def layer_numbers(config: ConfigDict, text: str, name: str = "layers") -> tuple[int, ...]:
    """ "all" or "0+2" as layer numbers, counted from the input."""
    every = tuple(range(config.model.depth + 1))
    if text == "all":
        return every
    try:
        chosen = tuple(int(number) for number in text.split("+"))
    except ValueError:
        chosen = ()
    if not chosen or not set(chosen) <= set(every) or len(set(chosen)) < len(chosen):
        raise UserError(f'{name}={text!r} must be "all" or some of {"+".join(map(str, every))}')
    return chosen


def variants(config: ConfigDict) -> dict[str, ConfigDict]:
    """One config for each value of a sweep; {"": config} where there is no sweep."""
    axis = config.sweep.axis
    if not axis:
        if config.sweep.points:
            raise UserError(f"sweep.points={config.sweep.points} of what? Name it, --config.sweep.axis=KEY")
        return {"": config}
    if axis not in overrides.keys(config) or isinstance(at(config, axis), tuple):
        raise UserError(f"sweep.axis={axis!r} names no single value of the config, such as student.learning_rate")
    if axis.split(".")[0] in UNSWEPT:
        raise UserError(f"sweep.axis={axis!r} is the same for all points; choose a value such as student.learning_rate")
    points: Sequence[object] = config.sweep.points or POINTS.get(axis, ())
    if not points:
        raise UserError(f"sweep.points: say which values {axis} shall take, such as --config.sweep.points=1,2,3")
    configs = {}
    for value in map(str, points):
        variant = config.copy_and_resolve_references()
        variant.sweep.axis, variant.sweep.points = "", ()
        try:
            overrides.override(variant, axis, [value])
        except UserError as error:
            raise UserError(f"sweep.points: {error}") from error
        configs[value] = variant
    if len({at(variant, axis) for variant in configs.values()}) < max(len(points), 2):
        raise UserError(f"sweep.points={points} needs at least two values of {axis}, all different")
    return configs
