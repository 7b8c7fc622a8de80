"""Recipes that read like the paper's method section.

An experiment is a module of this name with `run(config, workdir)`, and `check(config)` for what is known to be wrong
before anything is loaded; nothing else can be launched.
"""

EXPERIMENTS = (
    "mnist",
    "alignment",
    "trajectory",
    "forecast",
    "examples",
    "transmission",
    "cross_model",
    "sample",
    "evaluate",
    "paper",
)
