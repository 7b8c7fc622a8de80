"""Recipes that read like the paper's method section, and the registry of what can be launched.

An experiment is a module with

    read(config) -> spec            a config's values as a frozen spec; UserError for the first that makes no sense
    run(spec, folder, update=False) computes, and leaves measurements and a report in the folder
    document(spec, rows, notes)     the content of results.json and report.md, from the measurements alone
    preflight(spec, devices)        optional: its training or decode steps, for --preflight
    check_typed(spec, keys)         optional: UserError for a value set on the command line that nothing reads
"""

import importlib
from types import ModuleType

MODULES = {
    "mnist": "mnist.run",
    "alignment": "alignment.run",
    "language_alignment": "alignment.language",
    "trajectory": "along_training.trajectory",
    "forecast": "along_training.forecast",
    "examples": "along_training.examples",
    "transmission": "transmission.run",
    "cross_model": "transmission.cross_model",
    "sample": "tools.sample",
    "evaluate": "tools.evaluate",
    "paper": "tools.plan",
}
EXPERIMENTS = tuple(MODULES)


def load(name: str) -> ModuleType:
    """The module of an experiment. Raises KeyError for an unknown name."""
    return importlib.import_module(f"{__name__}.{MODULES[name]}")
