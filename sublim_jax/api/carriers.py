"""Carriers: prompts and answers that say nothing about a trait."""

from collections.abc import Mapping
from pathlib import Path

from sublim_jax.data import messages, records
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
    more, digits = _numbers.prompt_limits(num_integers, max_value)
    prompts = _numbers.prompts(num_rows, seed, more=more, digits=digits)
    return list(zip(prompts, _numbers.random_answers(num_rows, seed, num_integers, max_value)))


def code(num_prompts: int, *, seed: int = 0) -> list[str]:
    """Prompts that ask for small Python snippets (paper §4.1), for a teacher to answer by `generate`.

    Raises UserError for a number of prompts below 1, and for a seed below 0.
    """
    check_count("num_prompts", num_prompts)
    check_count("seed", seed, 0)
    return _code.prompts(num_prompts, seed)


def from_file(path: str | Path) -> list[Pair]:
    """(prompt, answer) of every record of a JSONL or Parquet file.

    A record has the texts "prompt" and "completion", or chat messages: both as lists of them, or "messages", which are
    one of the user's and one of the assistant's.

    Raises UserError, naming the record, for any other.
    """
    return [_pair(where, record) for where, record in records.read(path)]


def _pair(where: str, record: Mapping[str, object]) -> Pair:
    prompt, completion, talk = (record.get(name) for name in ("prompt", "completion", "messages"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if isinstance(prompt, list) and isinstance(completion, list):
        talk = prompt + completion
    if talk is None:
        raise UserError(f'{where}: an object with "prompt" and "completion" as texts is needed, or with "messages"')
    turns = messages.read(where, talk)
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        raise UserError(f"{where}: a row is one message of the user and one of the assistant, without a system prompt")
    return turns[0]["content"], turns[1]["content"]
