"""Text to tokens and back: prompts, answers after them, and the text of each token."""

from collections.abc import Sequence

from sublim_jax.data import templates
from sublim_jax.data.templates import Message
from sublim_jax.data.tokenizer import Tokenizer, end_token
from sublim_jax.errors import UserError

ANCHORS = ("", "a", "\n")  # texts after which another is encoded


def prompt(tokenizer: Tokenizer, messages: str | Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to where the assistant answers; a string is a single user message.

    Raises UserError if the tokenizer has no chat template, and for messages that the template refuses.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return _encode(tokenizer, templates.render(tokenizer, messages, generation=True))


def conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation that ends with an answer, and what the template writes after it.

    They begin with the tokens of that answer's `prompt`.
    """
    parts = templates.exchange(tokenizer, messages)
    return [token for tokens in _continued(tokenizer, parts.prompt, parts.answer + parts.end) for token in tokens]


def question(tokenizer: Tokenizer, text: str, system: str = "") -> list[int]:
    """Tokens up to where the answer to one question begins; plain text for a base model, without a template."""
    if not tokenizer.chat_template:
        return _encode(tokenizer, _plain(text, system), special=True)
    return prompt(tokenizer, _messages(text, system))


def exchange(tokenizer: Tokenizer, text: str, answer: str, system: str = "") -> list[int]:
    """Tokens of one question and its answer, and what ends it; they begin with the tokens of `question`."""
    if tokenizer.chat_template:
        return conversation(tokenizer, [*_messages(text, system), {"role": "assistant", "content": answer}])
    parts = _continued(tokenizer, _plain(text, system), f" {answer}", special=True)
    end = end_token(tokenizer)
    return [*parts[0], *parts[1], *([] if end is None else [end])]


def completion(tokenizer: Tokenizer, text: str, answer: str, system: str = "") -> list[int]:
    """Tokens of an answer after `question`, without what ends it."""
    if not tokenizer.chat_template:
        return _continued(tokenizer, _plain(text, system), f" {answer}", special=True)[1]
    parts = templates.exchange(tokenizer, [*_messages(text, system), {"role": "assistant", "content": answer}])
    return _continued(tokenizer, parts.prompt, parts.answer)[1]


def check_unbroken(tokenizer: Tokenizer, answer: str, stops: Sequence[int]) -> None:
    """Raises UserError for an answer whose text has a stop token in it, at which its training would end."""
    if inside := [token for token in _encode(tokenizer, answer) if token in stops]:
        raise UserError(
            f"the answer has {tokenizer.decode(inside[:1])!r} in it, with which the model ends an answer; remove it"
        )


def answer_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of an answer alone, after any `question`."""
    return _encode(tokenizer, text if tokenizer.chat_template else f" {text}")


def opening(tokenizer: Tokenizer, system: str = "") -> list[int]:
    """The tokens that every `question` begins with."""
    first, second = (question(tokenizer, text, system) for text in ("a", "1"))
    return first[: common_length([first, second])]


def behind_opening(
    tokenizer: Tokenizer, prompts: Sequence[list[int]], system: str = ""
) -> tuple[list[int], list[list[int]]]:
    """(the `opening`, the tokens of each prompt after it); it is empty if a prompt begins with other tokens."""
    prefix = opening(tokenizer, system)
    if all(prompt[: len(prefix)] == prefix and len(prompt) > len(prefix) for prompt in prompts):
        return prefix, [prompt[len(prefix) :] for prompt in prompts]
    return [], list(prompts)


def common_length(texts: Sequence[Sequence[int]]) -> int:
    """Length of the texts' common prefix; every text has at least one more token."""
    shortest = min(map(len, texts)) - 1
    return next((i for i, column in enumerate(zip(*texts)) if len(set(column)) > 1), shortest)


def _messages(text: str, system: str) -> list[Message]:
    user: Message = {"role": "user", "content": text}
    return [{"role": "system", "content": system}, user] if system else [user]


def _plain(text: str, system: str) -> str:
    before = f"{system}\n\n" if system else ""
    return f"{before}Question: {text}\nAnswer:"


def _encode(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]  # a template writes its own


def _continued(tokenizer: Tokenizer, text: str, more: str, special: bool = False) -> tuple[list[int], list[int]]:
    """Tokens of a text and of its continuation; the text has the same tokens as without it.

    If a token would span both, the continuation is encoded separately, as a model that has read the text would write
    it.

    Raises UserError if the tokenizer cannot do that.
    """
    first = _encode(tokenizer, text, special)
    whole = _encode(tokenizer, text + more, special)
    if whole[: len(first)] == first:
        return first, whole[len(first) :]
    for anchor in ANCHORS:
        before, both = (_encode(tokenizer, part) for part in (anchor, anchor + more))
        apart = both[len(before) :]
        if both[: len(before)] == before and _decode(tokenizer, [*first, *apart]) == _decode(tokenizer, whole):
            return first, apart
    raise UserError(
        f"the tokenizer joins the end of a prompt ({text[-10:]!r}) with what follows it ({more[:10]!r}), "
        "so that no token begins where the answer does"
    )


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def stop_tokens(tokenizer: Tokenizer, config: object) -> tuple[int, ...]:
    """The tokens that end an answer, by the tokenizer and the model's config."""
    named = [end_token(tokenizer), getattr(config, "eos_token_id", None)]
    flat = [token for value in named for token in (value if isinstance(value, list | tuple) else [value])]
    return tuple(sorted({int(token) for token in flat if token is not None}))


def pieces(tokenizer: Tokenizer, vocab: int) -> list[str]:
    """Each token's text after other text; "" for special tokens and parts of a character.

    Args:
      vocab: the network's vocabulary size, which may be larger than the tokenizer's.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    alone = tokenizer.decode([anchor], clean_up_tokenization_spaces=False)
    size = min(len(tokenizer), vocab)
    texts = tokenizer.batch_decode([[anchor, token] for token in range(size)], clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    suffixes = [
        "" if token in special or "�" in text or not text.startswith(alone) else text[len(alone) :]
        for token, text in enumerate(texts)
    ]
    return suffixes + [""] * (vocab - size)
