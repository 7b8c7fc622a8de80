"""Chat messages of users' files: {"role", "content"}, where the content is a text or OpenAI's list of parts."""

from collections.abc import Mapping, Sequence

from sublim_jax.data.templates import Message
from sublim_jax.errors import UserError

TEXT_PARTS = ("text", "input_text", "output_text")
# Unsupported fields that would change the meaning of a message.
UNREAD = (
    "tool_calls",
    "tool_call_id",
    "function_call",
    "name",
    "audio",
    "image",
    "images",
    "video",
    "videos",
    "refusal",
    "reasoning",
    "reasoning_content",
    "thinking",
)
EMPTY: tuple[object, ...] = (None, "", [], {})  # values of an unset field, as tables fill them in


def read(where: str, every: object) -> list[Message]:
    """Messages reduced to role and text.

    Raises UserError, naming the message, for a message without a role or a text, or with a field of UNREAD.
    """
    if not isinstance(every, list) or not every:
        raise UserError(f'{where}: "messages" must be a list of messages')
    return [_message(f"{where}, message {number}", message) for number, message in enumerate(every, 1)]


def refuse_unread(where: str, fields: Mapping[str, object], unread: Sequence[str]) -> None:
    """Raises UserError for the first of the `unread` fields that is set."""
    for name in unread:
        if fields.get(name) not in EMPTY:
            raise UserError(f'{where}: "{name}" is not supported; write it into the text, or remove the record')


def _message(where: str, message: object) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f'{where}: "role" and "content" must be texts')
    refuse_unread(where, message, UNREAD)
    return {"role": message["role"], "content": _text(where, message.get("content"))}


def _text(where: str, content: object) -> str:
    """The text of a content: the content itself, or its parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise UserError(f'{where}: "role" and "content" must be texts, or "content" a list of parts that are')
    return "".join(_part(f"{where}, part {number}", part) for number, part in enumerate(content, 1))


def _part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    fields = part if isinstance(part, dict) else {"type": None}
    kind = fields.get("type", "text")
    if kind not in TEXT_PARTS:
        raise UserError(f"{where}: type {kind!r} is not read; only text is")
    if not isinstance(text := fields.get("text"), str):
        raise UserError(f'{where}: "text" must be a text')
    return text
