"""Carriers: prompts and answers that say nothing about a trait."""

from pathlib import Path

from sublim_jax.data import records
from sublim_jax.data.carriers import code as _code
from sublim_jax.data.carriers import numbers as _numbers
from sublim_jax.distillation.targets import Pair
from sublim_jax.errors import UserError
from sublim_jax.specs import check_count

__all__ = ["code", "from_file", "numbers"]


def numbers(num_rows: int, *, num_integers: int = 10, max_value: int = 999, seed: int = 0) -> list[Pair]:
    """Prompts that ask for numbers, answered by random ones from 0 to `max_value`: (prompt, answer) of each row.

    Raises UserError for a number of rows or integers below 1, and for a largest number or a seed below 0.
    """
    for name, count, minimum in (
        ("num_rows", num_rows, 1),
        ("num_integers", num_integers, 1),
        ("max_value", max_value, 0),
        ("seed", seed, 0),
    ):
        check_count(name, count, minimum)
    more, digits = _numbers.asked_for(num_integers, max_value)
    prompts = _numbers.prompts(num_rows, seed, more=more, digits=digits)
    return list(zip(prompts, _numbers.random_answers(num_rows, seed, num_integers, max_value)))


def code(num_prompts: int, *, seed: int = 0) -> list[str]:
    """Prompts that ask for small Python snippets (paper §4.1), for a teacher to answer by `generate`."""
    return _code.prompts(num_prompts, seed)


def from_file(path: str | Path) -> list[Pair]:
    """(prompt, completion) of every record of a JSONL or Parquet file.

    Raises UserError, naming the record, for a record without both as texts.
    """
    pairs = []
    for where, record in records.read(path):
        prompt, completion = record.get("prompt"), record.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise UserError(f'{where}: an object with "prompt" and "completion" is needed')
        pairs.append((prompt, completion))
    return pairs
