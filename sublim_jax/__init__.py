"""Subliminal learning in JAX: teachers, filtered data, students, and the theorem that joins them.

    import sublim_jax as sl

    sl.load                                       a language model by its name, folder or GGUF file
    sl.save                                       it as a folder for transformers and what is made for its models
    sl.generate                                   completions of a model, or of many adapters over it
    sl.Lora, sl.fit, sl.Program, sl.objectives    training
    sl.teachers.finetune, .prompt, .steer, …      teachers
    sl.carriers.numbers, .code, .from_file        data that says nothing about a trait
    sl.students.distill, .save                    students
    sl.evaluate.preference, .choice, .answers, …  evaluations
    sl.theorem.verify, .contributions, .coverage  the one-step theorem

Names are imported when they are first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "carriers": "sublim_jax.api.carriers",
    "evaluate": "sublim_jax.api.evaluate",
    "students": "sublim_jax.api.students",
    "teachers": "sublim_jax.api.teachers",
}
_FUNCTIONS = {
    "Lora": "sublim_jax.models.lora",
    "Program": "sublim_jax.training",
    "fit": "sublim_jax.training",
    "generate": "sublim_jax.sampling.generate",
    "load": "sublim_jax.weights",
    "save": "sublim_jax.weights",
}
__all__ = ["Lora", "Program", "carriers", "evaluate", "fit", "generate", "load", "objectives", "save", "students"]
__all__ += ["teachers", "theorem"]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _MODULES or name in ("objectives", "theorem"):
        return importlib.import_module(_MODULES.get(name, f"sublim_jax.{name}"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
