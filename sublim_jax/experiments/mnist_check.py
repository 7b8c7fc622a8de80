"""The MNIST config, checked before any compute: every mistake in one line that says how to mend it."""

import ast
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sublim_jax import objectives
from sublim_jax.data import images
from sublim_jax.errors import UserError
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


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for the first value that makes no sense."""
    for who in ("teacher", "student"):
        part = config[who]
        _one_of(f"{who}.activation", part.activation, ACTIVATIONS)
        _one_of(f"{who}.optimizer", part.optimizer, OPTIMIZERS)
        for name in ("learning_rate", "batch", "epochs"):
            _positive(f"{who}.{name}", part[name])
        layer_numbers(config, part.trained_layers, f"{who}.trained_layers")
        divide(mesh, "fsdp", part.batch, f"{who}.batch")
    layer_numbers(config, config.student.shared_layers, "student.shared_layers")
    _one_of("student.objective", config.student.objective, OBJECTIVES)
    _one_of("inputs.kind", config.inputs.kind, images.KINDS)
    _one_of("clone.inputs", config.clone.inputs, ("noise", "real"))
    _one_of("precision", config.precision, PRECISIONS)
    for name in ("runs", "runs_at_once", "checkpoint_every", "model.width", "model.depth", "model.auxiliary"):
        _positive(name, at(config, name))
    for name in ("student.temperature", "inputs.count", "inputs.blur"):
        _positive(name, at(config, name))
    for arm in config.arms:
        _one_of("arms", arm, ARMS)
    if not config.arms or len(set(config.arms)) < len(config.arms):
        raise UserError(f"arms={config.arms} must name some of {', '.join(ARMS)}, each once")
    if config.student.init_distance < 0:
        raise UserError(f"student.init_distance={config.student.init_distance} must not be negative")
    if any(later <= earlier for earlier, later in zip((0, *config.clone.epochs), config.clone.epochs)):
        raise UserError(f"clone.epochs={config.clone.epochs} must be positive and rising, such as 5,20")
    foreign = [arm for arm in config.arms if arm.startswith(("cross", "clone"))]
    if config.student.shared_layers != "all":
        foreign.append(f"student.shared_layers={config.student.shared_layers}")
    if config.runs < 2 and foreign:
        raise UserError(f"runs={config.runs}, but {foreign[0]} starts from another run: at least 2 runs")
    if config.inputs.fresh and config.inputs.kind not in images.DRAWN:
        raise UserError(f"inputs.fresh draws noise anew; inputs.kind={config.inputs.kind} is no noise that is drawn")
    on_digits = "real" in config.arms or ("clone" in config.arms and config.clone.inputs == "real")
    if (config.inputs.kind in images.FROM_DATA or on_digits) and config.inputs.count > MNIST_ROWS:
        raise UserError(f"inputs.count={config.inputs.count}, but MNIST has {MNIST_ROWS} images")
    divide(mesh, "replica", min(config.runs, config.runs_at_once), "runs_at_once")
    divide(mesh, "replica", config.runs % config.runs_at_once, "the rest of runs over runs_at_once")


def layer_numbers(config: ConfigDict, text: str, name: str = "layers") -> tuple[int, ...]:
    """ "all" or "0+2" as layer numbers, counted from the input."""
    every = tuple(range(config.model.depth + 1))
    if text == "all":
        return every
    try:
        chosen = tuple(int(number) for number in text.split("+"))
    except ValueError:
        chosen = ()
    if not chosen or not set(chosen) <= set(every):
        raise UserError(f'{name}={text!r} must be "all" or some of {"+".join(map(str, every))}')
    return chosen


def variants(config: ConfigDict) -> dict[str, ConfigDict]:
    """One config for each value of a sweep; {"": config} where there is no sweep."""
    axis = config.sweep.axis
    if not axis:
        return {"": config}
    try:
        old = at(config, axis)
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"sweep.axis={axis} names no value of the config, such as student.learning_rate") from error
    if axis.startswith("sweep") or isinstance(old, ConfigDict):
        raise UserError(f"sweep.axis={axis} names no single value, such as student.learning_rate")
    points = config.sweep.points or POINTS.get(axis)
    if not points:
        raise UserError(f"sweep.points: say which values {axis} shall take, such as --config.sweep.points=1,2,3")
    configs = {}
    for value in map(str, points):
        variant = config.copy_and_resolve_references()
        variant.sweep.axis = ""
        try:
            variant.update_from_flattened_dict({axis: _like(old, value)})
        except (TypeError, ValueError, SyntaxError) as error:
            raise UserError(f"sweep.points: {value!r} is no value for {axis}, which is {old!r}") from error
        configs[value] = variant
    if len(configs) < 2:
        raise UserError(f"sweep.points={points} needs at least two different values of {axis}")
    return configs


def at(config: ConfigDict, path: str) -> Any:
    """The value at a dotted path."""
    for name in path.split("."):
        config = config[name]
    return config


def _like(old: Any, text: str) -> Any:
    """A sweep's value, written as text, in the type of the value it replaces."""
    if isinstance(old, str):
        return text
    value = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    if isinstance(old, float) and isinstance(value, int):
        value = float(value)
    if type(value) is not type(old):
        raise TypeError
    return value


def _one_of(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise UserError(f"{name}={value!r} must be one of {', '.join(choices)}")


def _positive(name: str, value: float | int) -> None:
    if not value > 0:
        raise UserError(f"{name}={value} must be positive")
