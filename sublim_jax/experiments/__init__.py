"""Recipes that read like the paper's method section, and the registry of what can be launched.

An experiment is a module with

    read(config) -> spec            a config's values as a frozen spec; UserError for the first that makes no sense
    run(spec, folder, update=False) computes, and leaves measurements and a report in the folder
    document(spec, rows, notes)     what results.json and report.md say, from the measurements alone
    preflight(spec, devices)        its training or decode steps, for --preflight; not every experiment has it
    check_typed(spec, keys)         UserError for a value that was typed and that nothing reads; where there are any
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
    """The module of an experiment. Raises KeyError for a name that is none."""
    return importlib.import_module(f"{__name__}.{MODULES[name]}")
