"""Runs the experiment of a config, on one device or on a pod.

    python launch.py --config=configs/mnist.py[:preset] [--workdir=DIR] [--config.key=value ...]
    python launch.py --config=configs/mnist.py[:preset] --describe      what the config is, and what its values mean
    python launch.py --config=configs/mnist.py[:preset] --preflight=h100   memory and FLOPs on a device that is not here
    python launch.py --report --workdir=DIR                             the report of a finished run again

The configs, one for each experiment, are in configs/.

Exit code 0: done. 2: something that the user must fix, in one line: a wrong value, before any compute, or later a full
disk, too little memory, a bucket or a judge that fails. 143: stopped by a signal, state saved. 75: another process of
the run was lost. After these, the same command resumes. 1: a bug, with its traceback.
"""

import difflib
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import absl.logging
import jax
from absl import app, flags
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from sublim_jax import cluster, describe, experiments, overrides, preflight, renamed, report, signals, storage, workdir
from sublim_jax.assets import cache_folder
from sublim_jax.errors import Interrupted, UserError, is_of_memory, one_line
from sublim_jax.experiments import EXPERIMENTS
from sublim_jax.progress import say

_CONFIG = flags.DEFINE_string("config", None, "Config file, with :preset after a colon; --config.key=value changes it.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for results and checkpoints, local or gs://; runs/CONFIG-PRESET if left out."
)
_UPDATE = flags.DEFINE_bool(
    "update", False, "Run another config in a workdir that holds a run: reuse what still holds, replace the results."
)
_PREFLIGHT = flags.DEFINE_string(
    "preflight",
    None,
    "Compile the config's steps and run nothing: memory, FLOPs, data moved between devices, and whether it fits; for a "
    'TPU pod or GPUs that are not there ("v5e:4x4", "h100", "h100:8", with JAX_PLATFORMS=cpu and their compilers '
    'installed), or for the devices here ("local").',
)
_REPORT = flags.DEFINE_bool(
    "report", False, "Write the report of a finished --workdir again from its measurements, and compute nothing."
)
_DESCRIBE = flags.DEFINE_bool(
    "describe", False, "Print what the config is, its presets, and every value with its meaning, and compute nothing."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of the first process, where no cluster manager is found."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
_PROCESS = flags.DEFINE_integer("process_id", None, "This process's number, with --coordinator.")
_FLAGS = (_CONFIG, _WORKDIR, _UPDATE, _PREFLIGHT, _REPORT, _DESCRIBE, _COORDINATOR, _PROCESSES, _PROCESS)
_NAMES = tuple(flag.name for flag in _FLAGS)

NO_SPACE = (
    "no space left on the disk, or in its quota; free some and give the same command again, which resumes the run"
)
COMPILED = "JAX_COMPILATION_CACHE_DIR"  # a folder of the user's own choice
LOST_CODE = 75  # EX_TEMPFAIL
LOST = "another process of this run has ended or cannot be reached; the same command resumes from the last checkpoint"
NO_MEMORY = "there is not enough memory ({}); ask for less at once, or run on more or larger devices"


def run(args: Sequence[str]) -> int:
    """Runs the command line `args`, with or without the program's name in front, and returns the exit code."""
    if not flags.FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    watch = cluster.Watch(fail)
    try:
        main(args, watch)
        return 0
    except UserError as error:
        line, code = str(error), 2
    except Interrupted as stop:
        say(f"{stop}; the same command resumes from the last checkpoint")
        return 143
    except KeyboardInterrupt:  # before or after a run, which saves its state
        line, code = "stopped by SIGINT", 128 + signal.SIGINT
    except Exception as error:
        line, code = message_and_code(error)
    finally:
        watch.stop()
    fail(line)
    cluster.end_all(line, code)
    return code


def main(args: Sequence[str], watch: cluster.Watch) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    typed = parse(args)
    if _REPORT.value:
        return write_report_again(typed)
    if _DESCRIBE.value:
        with describe.traced() as origins:
            config, _ = read(typed)
        return print(describe.text(str(_CONFIG.value), config, origins), flush=True)
    config, set_keys = read(typed)
    report.commit()  # of the code that runs, whatever is committed meanwhile
    experiment = experiments.load(config.experiment)
    renamed.check(f"--config={config_file()}", config)
    if _PREFLIGHT.value is not None:
        return compile_only(experiment, config, _PREFLIGHT.value)
    storage.check(_WORKDIR.value or "")
    cluster.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)  # before anything asks JAX for its devices
    watch.start()
    if cluster.joined():
        say(f"{jax.process_count()} processes, {jax.device_count()} devices ({jax.devices()[0].device_kind})")
    name = Path(config_file()).stem
    folder = epath.Path(_WORKDIR.value or f"runs/{name}-{config.get('preset', '')}").expanduser()
    spec = experiment.read(config)
    if hasattr(experiment, "check_typed"):
        experiment.check_typed(spec, set_keys)
    workdir.check(folder, spec.values, update=_UPDATE.value)
    keep_compiled(folder)
    signals.install()
    experiment.run(spec, folder, update=_UPDATE.value)
    cluster.meet()  # the first one may still fail, in the report


def keep_compiled(folder: epath.Path) -> None:
    """Lets all processes of a run read one folder of compiled programs, which the first of them writes.

    With folders of their own the others, who write none, would compile everything again after a restart. On GPUs they
    would also wait for timings of kernels that the first reads from its folder, and therefore never sends.
    """
    if not cluster.joined() or COMPILED in os.environ:
        return
    compilation_cache.reset_cache()  # it may have been opened in another folder
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    if storage.in_bucket(folder):
        jax.config.update("jax_persistent_cache_enable_xla_caches", "")  # XLA itself writes to disks alone


def write_report_again(typed: Mapping[str, object]) -> None:
    """Rewrites the report of a finished run from its measurements. Raises UserError where the folder holds none."""
    if typed or _CONFIG.value or _WORKDIR.value is None:
        raise UserError("--report goes with --workdir=DIR alone: it writes the report of the run that is in DIR")
    storage.check(_WORKDIR.value)
    folder = epath.Path(_WORKDIR.value).expanduser()
    config = ConfigDict(report.measured_config(folder))
    if config.get("experiment") not in EXPERIMENTS:
        raise UserError(f"{folder} holds a run of an unknown experiment")
    experiment = experiments.load(config.experiment)
    report.rewrite(folder, experiment.read(config), experiment.document)


def message_and_code(error: Exception) -> tuple[str, int]:
    """The message and exit code for an error that is no `UserError`; raises the error again where it is a bug."""
    if isinstance(error, BrokenPipeError) and unread():
        return "standard output was closed by its reader", 128 + signal.SIGPIPE
    if line := lacking(error):  # libraries report a full disk, missing memory or a bucket by any type of error
        return line, 2
    if cluster.lost(error):
        time.sleep(4 * cluster.LOOK)  # its own message, if it has left one, is printed instead
        return f"{LOST} ({type(error).__name__}: {one_line(error)})", LOST_CODE
    if not cluster.joined():
        raise error
    traceback.print_exception(error)
    return f"process {jax.process_index()} failed with {type(error).__name__}; its traceback is in its own output", 1


def unread() -> bool:
    """Whether nobody reads standard output any more, such as `head` that has enough; it is then closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):  # a pipe without a reader has an error
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def lacking(error: Exception) -> str:
    """The message for an error of the machine's memory, disk or files, or of a bucket; empty for any other error."""
    text = str(error)
    if "No space left" in text or "quota exceeded" in text.lower():
        return NO_SPACE
    if is_of_memory(error):
        return NO_MEMORY.format(" ".join(text.split())[:120] or "none is left")
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if of_bucket := storage.explanation(error):
        return of_bucket
    if isinstance(error, OSError) and error.strerror:  # of a file that is open, which has no name
        return f"a file cannot be read or written: {error.strerror}"
    if "Could not determine home directory" in text:
        return "a path begins with ~ and a name, and there is no such user here"
    return ""


def fail(text: str) -> None:
    print(f"launch.py: {' '.join(text.split())}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ the command line


def read(typed: Mapping[str, list[str | bool]]) -> tuple[ConfigDict, list[str]]:
    """The config that --config names, with the values typed on the command line; and their keys, by current names.

    Raises UserError for the first value that is not valid.
    """
    if not _CONFIG.value:
        raise UserError(
            "--config is missing; try --config=configs/mnist.py (configs/ has the others, --help the flags)"
        )
    config = overrides.load(_CONFIG.value)
    given = named(config)
    by_name = renamed.understood(config, typed)
    for key, values in by_name.items():
        overrides.override(config, key, values)
    if config.get("experiment") not in EXPERIMENTS:
        raise UserError(f"config.experiment={config.get('experiment')!r} is none of {', '.join(EXPERIMENTS)}")
    for key, value in named(config).items():
        if value != given[key]:
            raise UserError(
                f"config.{key}={value!r}: it is {given[key]!r} by the file; choose another, --config=FILE:PRESET"
            )
    return config, list(by_name)


def named(config: ConfigDict, prefix: str = "") -> dict[str, str]:
    """The names `experiment` and `preset` of a config and of those inside it, by dotted key; they set nothing else."""
    names: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            names |= named(value, f"{prefix}{name}.")
        elif name in ("experiment", "preset") and "experiment" in config:
            names[f"{prefix}{name}"] = value
    return names


def config_file() -> str:
    return str(_CONFIG.value).split(":")[0]


def parse(args: Sequence[str]) -> dict[str, list[str | bool]]:
    """Parses the flags, and returns the values typed for each key of the config.

    A value is text for "--config.key=value" and "--config.key value", a bool for "--config.key" and "--noconfig.key".
    """
    for name in _NAMES:
        flags.FLAGS[name].unparse()  # of an earlier call
    typed: dict[str, list[str | bool]] = {}
    others, waiting = ["launch.py"], ""
    for word in args[not (args and args[0].startswith("-")) :]:
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(?:=(.*))?", word, re.DOTALL)
        if match:
            off, key, value = match.groups()
            if off and value is not None:
                raise UserError(f"{word}: write --config.{key}={value}, or --noconfig.{key} alone")
            typed.setdefault(key, []).append(not off if value is None else value)
            waiting = key if value is None and not off else ""
        elif waiting and not word.startswith("--"):
            typed[waiting][-1], waiting = word, ""
        else:
            others.append(word)
            waiting = ""
    parse_others(others)
    return typed


def parse_others(args: Sequence[str]) -> None:
    """Parses the flags that are not values of the config. Raises UserError for any other argument."""
    try:
        left = flags.FLAGS(args)[1:]
    except SystemExit:  # after --help, which absl ends with 1
        sys.exit(0)
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, _NAMES, 1)
        meant = f"did you mean --{close[0]}?" if close else f"there are --{', --'.join(_NAMES)}"
        how = "a value of the config is --config.NAME=VALUE, and a preset follows its file, --config=FILE:PRESET"
        raise UserError(f"there is no flag --{error.flagname}; {meant}; {how}") from error
    except flags.IllegalFlagValueError as error:
        shown = str(error).split(":")[0].removeprefix("flag ")
        kinds = {"int": "a whole number", "bool": "true or false"}
        name = shown.removeprefix("--").split("=")[0]
        if name not in flags.FLAGS:
            raise UserError(str(error)) from error
        raise UserError(f"{shown}: {kinds.get(flags.FLAGS[name].flag_type(), 'another value')} is needed") from error
    except (flags.Error, ValueError) as error:  # ValueError: absl's own, and a --flagfile that is no text
        raise UserError(" ".join(str(error).split())[:300]) from error
    if left:
        raise UserError(f"{left[0]!r} is not a flag; write --config=FILE, and --config.key=value for a value of it")


# ------------------------------------------------------------------------------------------------------ machines


def compile_only(experiment: ModuleType, config: ConfigDict, topology: str) -> None:
    """Prints what `--preflight` found. Raises UserError where a step does not fit."""
    if not hasattr(experiment, "preflight"):
        raise UserError(f"config.experiment={config.experiment!r} has no step on a mesh to compile")
    jax.config.update("jax_enable_compilation_cache", False)  # programs for other machines cannot be read back
    refused = []
    for step in experiment.preflight(experiment.read(config), preflight.devices(topology)):
        facts = preflight.facts(step)
        say(preflight.describe(step, facts))
        if facts.fits is False:
            refused.append(step.name)
    if refused:
        raise UserError(f"--preflight={topology}: no room for {'; '.join(refused)}")


if __name__ == "__main__":
    if COMPILED not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    absl.logging.use_absl_handler()
    app.define_help_flags()
    sys.exit(run(sys.argv))
