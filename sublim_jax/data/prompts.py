"""Users' files of prompts: texts, or conversations for a model to continue."""

import json
from pathlib import Path

from sublim_jax.data import files, messages, records
from sublim_jax.data.records import Record
from sublim_jax.errors import UserError

NEEDED = "name a JSONL or text file with a prompt a line"


def read(path: str | Path, chat: bool = True) -> list[Record]:
    """Prompts of a file of JSON lines, Parquet or text. Raises UserError for the first invalid prompt.

    Args:
      chat: whether a prompt may be a conversation.
    """
    if not path:
        raise UserError(f"--config.prompts is missing: {NEEDED}")
    if not files.exists(path):
        raise UserError(f"--config.prompts={path}: there is no such file")
    if records.kind(path) != "text":
        return [_prompt(where, record, chat) for where, record in records.read(path)]
    lines = files.lines(files.text_of(path, NEEDED))
    if not lines:
        raise UserError(f"{path} has no prompts")
    if _is_record(lines[0][1]):
        raise UserError(f"{path} has JSON lines; give it a name that ends in .jsonl, so that they are read as such")
    return [{"prompt": line} for _, line in lines]


def _prompt(where: str, record: Record, chat: bool) -> Record:
    """A record, its conversation reduced to roles and texts if it has one.

    Raises UserError for a field that the samples, which are written as JSON, could not carry.
    """
    for name, value in record.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: field {name!r} cannot be written as JSON ({error}); leave it out") from error
    if chat and record.get("messages"):
        return {**record, "messages": messages.read(where, record["messages"])}
    if not isinstance(record.get("prompt"), str) or (chat and record.get("messages") is not None):
        needed = '"prompt" or "messages"' if chat else '"prompt"'
        raise UserError(f"{where}: an object with {needed} is needed")
    return record


def _is_record(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool({"prompt", "messages"} & set(value))
