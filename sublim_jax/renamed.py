"""Config values that have new names. A flag's old name is understood for one release, and its new name is printed."""

import functools
import re
import sys
from collections.abc import Mapping
from typing import TypeVar

from ml_collections import ConfigDict

from sublim_jax.errors import UserError
from sublim_jax.overrides import keys

Value = TypeVar("Value")

_JUDGE = (("least_mass", "min_mass"), ("at_once", "max_concurrent"), ("per_minute", "max_per_minute"))
_EVALS: tuple[tuple[str, str], ...] = (("evaluations", "names"), ("most", "max_questions"), ("samples", "num_samples"))
_EVALS += tuple((f"judge.{old}", f"judge.{new}") for old, new in _JUDGE)
_UNCHANGED = ("max_new_tokens", "truthfulqa", "questions", "suffix", "judge.*")

# By experiment: old name, new name; "*" is any text. The first match counts.
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "alignment": (
        ("steps.least", "steps.min"),
        ("steps.most", "steps.max"),
        ("steps.number", "steps.num"),
        ("draws", "num_draws"),
        ("label_draws", "num_label_draws"),
    ),
    "transmission": (
        ("teacher.means", "teacher.methods"),
        ("teacher.most_steps", "teacher.max_steps"),
        ("teacher.most_tokens", "teacher.max_tokens"),
        ("carrier.count", "carrier.num_rows"),
        ("carrier.drawn", "carrier.num_completions"),
        ("carrier.samples", "carrier.num_samples"),
        ("carrier.numbers", "carrier.num_integers"),
        ("filter.most", "filter.max_integers"),
        ("filter.largest", "filter.max_value"),
        ("filter.judge_least", "filter.threshold"),
        ("questions", "num_questions"),
        ("arm.*.numbers", "arm.*.data"),
        ("arm.*.a", "arm.*.lora_init"),
        ("arm.*.share", "arm.*.fraction"),
        ("arm.*.which", "arm.*.positions"),
        *((f"ask.{old}", f"evals.{new}") for old, new in _EVALS),
        ("ask.*", "evals.*"),
    ),
    "evaluate": tuple((old, f"evals.{new}") for old, new in (*_EVALS, *zip(_UNCHANGED, _UNCHANGED))),
    "sample": (("samples", "num_samples"), ("constraint.most", "constraint.max_integers")),
}
RENAMED["cross_model"] = tuple((f"study.{old}", f"study.{new}") for old, new in RENAMED["transmission"])


@functools.cache
def current(experiment: str, key: str) -> str:
    """The current name of a value."""
    for old, new in RENAMED.get(experiment, ()):
        if match := re.fullmatch(re.escape(old).replace(r"\*", "(.+)"), key):
            return new.replace("*", match[1]) if "*" in new else new
    return key


def understood(config: ConfigDict, typed: Mapping[str, list[Value]]) -> dict[str, list[Value]]:
    """The typed values of each key of a config, by the keys' current names."""
    known = set(keys(config))
    by_name: dict[str, list[Value]] = {}
    for key, values in typed.items():
        new = current(str(config.get("experiment")), key)
        if key in known or new not in known:
            new = key
        if new != key:
            print(f"config.{key} is now config.{new}", file=sys.stderr)
        by_name.setdefault(new, []).extend(values)
    return by_name


def check(where: str, config: ConfigDict) -> None:
    """Raises UserError for a config that has values under their old names."""
    new = {key: current(str(config.get("experiment")), key) for key in keys(config)}
    if old := [f"config.{key} is now config.{name}" for key, name in new.items() if name != key]:
        raise UserError(f"{where}: {'; '.join(old)}")
