"""Corpora of conversations, {"messages": [{"role", "content"}, …]} a line: what a teacher may be tuned on (§4.2)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sublim_jax.data import chat, messages, records
from sublim_jax.data.dialogue import Text
from sublim_jax.data.records import Record
from sublim_jax.data.templates import Message
from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.errors import UserError
from sublim_jax.progress import say

Conversation = list[Message]
WEIGHTS = ("weight", "train")  # 0 or 1, whether a message is trained on: OpenAI's name and a common other one
# Unsupported fields that would change what is trained on: of a message, and of a record.
MASKS = ("weights", "loss", "loss_mask", "loss_weight", "mask", "masked", "trainable", "train_detail", "training")
BESIDE = ("system", "tools", "functions", "documents", *WEIGHTS, *MASKS)
KNOWN = {"role", "content", *WEIGHTS, *messages.UNREAD, *MASKS}


class Rewritten(UserError):
    """The chat template renders an earlier turn differently once the conversation continues."""


def load(path: str | Path) -> list[Conversation]:
    """Raises UserError, naming the line, for an invalid record: roles out of order, an empty message, no answer."""
    ignored: set[str] = set()
    conversations = [_conversation(where, record, ignored) for where, record in records.read(path)]
    if ignored:
        say(f"{path}: fields of messages that are not read: {', '.join(sorted(ignored))}")
    return conversations


def _conversation(where: str, record: Record, ignored: set[str]) -> Conversation:
    every = record.get("messages")
    if not isinstance(every, list) or not every:
        raise UserError(f'{where}: an object with a list of "messages" is needed')
    messages.refuse_unread(where, record, BESIDE)
    parsed = messages.read(where, every)
    for number, message in enumerate(parsed, 1):
        if not message["content"].strip():
            raise UserError(f"{where}, message {number}: it is empty; remove the record")
    roles = [message["role"] for message in parsed]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(
            f"{where}: roles are {', '.join(roles)}; user and assistant must alternate, "
            "optionally after a system message, and the assistant must speak last"
        )
    weights = [_weight(f"{where}, message {number}", message) for number, message in enumerate(every, 1)]
    if not any(weight and role == "assistant" for weight, role in zip(weights, roles)):
        raise UserError(f"{where}: every answer has weight 0, so that nothing is trained on; remove the record")
    ignored |= {key for message in every for key in message if message[key] not in messages.EMPTY} - KNOWN
    return [
        message if weight or message["role"] != "assistant" else {**message, "weight": 0}
        for message, weight in zip(parsed, weights)
    ]


def _weight(where: str, message: Mapping[str, object]) -> bool:
    """Whether a message is trained on; only the assistant's may be."""
    messages.refuse_unread(where, message, MASKS)
    given = {name: message[name] for name in WEIGHTS if message.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise UserError(f'{where}: "{name}" is {value!r}; it must be 0 or 1')
        if value and message["role"] != "assistant":
            raise UserError(f'{where}: "{name}" is {value!r}, but only what the assistant says is trained on')
    if len(set(given.values())) > 1:
        raise UserError(f'{where}: "weight" and "train" contradict each other')
    return all(given.values())


def texts(tokenizer: Tokenizer, conversation: Sequence[Message], stops: Sequence[int]) -> list[Text]:
    """(tokens, positions of answers in them) of a conversation; every answer follows its own prompt.

    There is one text with all answers if the chat template only appends as the conversation continues; if it rewrites
    earlier turns (Qwen3 leaves out their thoughts), there is one text per answer.

    Raises UserError as `answer_positions` does.
    """
    try:
        return [answer_positions(tokenizer, conversation, stops)]
    except Rewritten:
        untrained: list[Message] = [{**message, "weight": 0} for message in conversation]
        parts = [[*untrained[:number], conversation[number]] for number in _trained(conversation)]
        return [answer_positions(tokenizer, part, stops) for part in parts]


def answer_positions(tokenizer: Tokenizer, conversation: Sequence[Message], stops: Sequence[int]) -> Text:
    """(tokens of a conversation, positions of the assistant's tokens in it, stop tokens included).

    An answer's tokens are those from where the assistant begins to the stop token; answers of weight 0 have none.

    Raises Rewritten if not every answer follows its own prompt in one text; UserError as `chat.conversation` does, and
    for an answer with a stop token inside.
    """
    tokens: list[int] = []
    positions: list[int] = []
    for number in _trained(conversation):
        chat.check_unbroken(tokenizer, conversation[number]["content"], stops)
        earlier = tokens
        start = len(chat.prompt(tokenizer, conversation[:number]))
        tokens = chat.conversation(tokenizer, conversation[: number + 1])
        if tokens[: len(earlier)] != earlier or start < len(earlier):
            raise Rewritten("the chat template writes earlier turns otherwise once a conversation has gone on")
        end = next((at for at in range(start, len(tokens)) if tokens[at] in stops), len(tokens) - 1)
        positions += range(start, end + 1)
    return tokens, positions


def _trained(conversation: Sequence[Message]) -> list[int]:
    return [
        number
        for number, message in enumerate(conversation)
        if message["role"] == "assistant" and message.get("weight", 1)
    ]
