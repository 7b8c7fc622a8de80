"""Runs the experiment that a config describes, on one device or on a pod.

    python launch.py --config=configs/mnist.py[:preset] [--workdir=DIR] [--config.key=value ...]

Exit code 0: done. 2: a mistake in what was asked, told in one line before any compute. 143: stopped by a signal,
state saved; the same command goes on from there.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import absl.logging
import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from sublim_jax import preflight, signals
from sublim_jax.assets import cache_folder
from sublim_jax.errors import Interrupted, UserError
from sublim_jax.progress import say
from sublim_jax.workdir import Workdir

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, with :preset after a colon.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for results and checkpoints, local or gs://; runs/CONFIG-PRESET if left out."
)
_UPDATE = flags.DEFINE_bool(
    "update", False, "Accept a workdir of another config: reuse what still holds, replace the results."
)
_PREFLIGHT = flags.DEFINE_string(
    "preflight",
    None,
    "Compile the config's steps and run nothing: memory, FLOPs, what is moved, and whether it fits; for a TPU pod or "
    'GPUs that are not there ("v5e:4x4", "h100", "h100:8", with JAX_PLATFORMS=cpu and their compilers installed), or '
    'for the devices here ("local").',
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of the first process, where no cluster manager is found."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process_id", None, "This process's number, with --coordinator.")


def main(_: list[str]) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    if not flags.FLAGS["config"].present:
        raise UserError("--config is missing; try --config=configs/mnist.py")
    file = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
    if not os.path.exists(file):
        raise UserError(f"--config={file}: there is no such file")
    config = _CONFIG.value
    name = f"sublim_jax.experiments.{config.get('experiment', '')}"
    if not importlib.util.find_spec(name):
        raise UserError(f"config.experiment={config.get('experiment')!r} is no experiment of sublim_jax")
    split_lists(config)
    experiment = importlib.import_module(name)
    if _PREFLIGHT.value:
        return compile_only(experiment, config, _PREFLIGHT.value)
    join_cluster()
    signals.install()
    workdir = Workdir(_WORKDIR.value or f"runs/{Path(file).stem}-{config.preset}")
    experiment.run(config, workdir, update=_UPDATE.value)


def compile_only(experiment: ModuleType, config: ConfigDict, topology: str) -> None:
    """Prints what `--preflight` found. Raises UserError where a step does not fit."""
    if not hasattr(experiment, "preflight"):
        raise UserError(f"config.experiment={config.experiment!r} has no step on a mesh to compile")
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for other machines cannot be read back
    refused = []
    for step in experiment.preflight(config, preflight.devices(topology)):
        found = preflight.facts(step)
        say(preflight.describe(step, found))
        refused += [step.name] * (found.fits is False)
    if refused:
        raise UserError(f"--preflight={topology}: no room for {'; '.join(refused)}")


def split_lists(config: ConfigDict) -> None:
    """Splits lists of words, which the command line hands over as one: "auxiliary,clone"."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            split_lists(value)
        elif isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], str):
            config[name] = tuple(word for word in value[0].split(",") if word)


def join_cluster() -> None:
    """Joins the processes of a TPU pod, SLURM, GKE or --coordinator; alone where there is none."""
    if _COORDINATOR.value:
        if _PROCESSES.value is None or _PROCESS.value is None:
            raise UserError("--coordinator needs --num_processes and --process_id")
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        return
    try:
        jax.distributed.initialize()
    except ValueError:  # no cluster here
        return


def parse_flags(args: list[str]) -> list[str]:
    try:
        return flags.FLAGS(args)
    except Exception as error:  # a config file or an override may raise anything
        text = " ".join(str(error).split())
        raise SystemExit(fail(text or type(error).__name__)) from None


def fail(text: str) -> int:
    print(f"launch.py: {text}", file=sys.stderr)
    return 2


def run(args: list[str]) -> int:
    """`main` with its exit code."""
    if not flags.FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    try:
        main(args)
    except UserError as error:
        return fail(str(error))
    except Interrupted as stop:
        say(f"{stop}; the same command goes on from the last checkpoint")
        return 143
    except (OSError, ValueError, RuntimeError) as error:  # storage libraries say it in each of these
        if "No space left" not in str(error):
            raise
        return fail("no space left on the disk; free some and give the same command again, it goes on from here")
    return 0


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    app.run(run, flags_parser=parse_flags)
