"""Corpora of conversations, {"messages": [{"role", "content"}, …]} a line: what a teacher may be tuned on (§4.2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sublim_jax.data import chat, records
from sublim_jax.data.records import Record
from sublim_jax.errors import UserError

Conversation = list[dict[str, str]]


def load(path: str | Path) -> list[Conversation]:
    """Raises UserError, naming the line, for a record that is none: roles out of order, an empty message, no answer."""
    return [_conversation(where, record) for where, record in records.read(path)]


def _conversation(where: str, record: Record) -> Conversation:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: an object with a list of "messages" is needed')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f'{where}, message {number}: "role" and "content" must be texts')
        if not message["content"].strip():
            raise UserError(f"{where}, message {number}: it is empty; remove the record")
    roles = [message["role"] for message in messages]
    said = roles[1:] if roles[0] == "system" else roles
    if not said or said != ["user", "assistant"] * (len(said) // 2):
        raise UserError(
            f"{where}: roles are {', '.join(roles)}; user and assistant must take turns, behind a system message or "
            "not, and the assistant must have the last word"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def answer_positions(
    tokenizer: Any, messages: Sequence[chat.Message], stops: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(tokens of a conversation, positions of what the assistant says in it, the tokens that end it included).

    A turn's tokens are those that the template writes between where the assistant begins and the stop token.
    """
    whole = chat.conversation(tokenizer, messages)
    positions: list[int] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(chat.prompt(tokenizer, messages[:number]))
        end = next((at for at in range(start, len(whole)) if whole[at] in stops), len(whole) - 1)
        positions += range(start, end + 1)
    return whole, positions
