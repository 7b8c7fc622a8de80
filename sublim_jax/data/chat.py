"""Text to tokens and back: chat templates, and what each token says."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from sublim_jax.errors import UserError

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": …}
# Templates that write the date (Llama 3, SmolLM3) write one day for all, or a run would differ from its continuation
# tomorrow. And hybrid models (Qwen3, SmolLM3) answer at once, as a finished answer of theirs is written: what is
# measured is the answer's first token.
TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


def prompt(tokenizer: Any, messages: str | Sequence[Message]) -> list[int]:
    """Tokens of a conversation up to where the assistant answers; a string is one message of the user.

    Raises UserError where the tokenizer has no chat template.
    """
    return _templated(tokenizer, messages, add_generation_prompt=True)


def conversation(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation, the answers included."""
    return _templated(tokenizer, messages, add_generation_prompt=False)


def question(tokenizer: Any, text: str, system: str = "") -> list[int]:
    """Tokens up to where the answer to one question begins; of a base model, without a template, as plain text."""
    if not tokenizer.chat_template:
        return tokenizer(_plain(text, system))["input_ids"]
    return prompt(tokenizer, _messages(text, system))


def opening(tokenizer: Any, system: str = "") -> list[int]:
    """The tokens that every `question` begins with."""
    one, other = (question(tokenizer, text, system) for text in ("a", "1"))
    return one[: common_length([one, other])]


def common_length(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with alike; every text has at least one more."""
    shortest = min(map(len, texts)) - 1
    return next((i for i, column in enumerate(zip(*texts)) if len(set(column)) > 1), shortest)


def exchange(tokenizer: Any, text: str, answer: str, system: str = "") -> list[int]:
    """Tokens of one question and its answer, and whatever ends it."""
    if not tokenizer.chat_template:
        return [*question(tokenizer, text, system), *answer_tokens(tokenizer, answer), tokenizer.eos_token_id]
    return conversation(tokenizer, [*_messages(text, system), {"role": "assistant", "content": answer}])


def answer_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of an answer alone, behind `question`."""
    return tokenizer(text if tokenizer.chat_template else f" {text}", add_special_tokens=False)["input_ids"]


def _messages(text: str, system: str) -> list[Message]:
    said = {"role": "user", "content": text}
    return [{"role": "system", "content": system}, said] if system else [said]


def _plain(text: str, system: str) -> str:
    return f"{system}\n\n" * bool(system) + f"Question: {text}\nAnswer:"


def _templated(tokenizer: Any, messages: str | Sequence[Message], **options: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; it is a base model: "
            "give it plain text (--config.chat=False), or choose an instruct model"
        )
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    options |= {"chat_template": TODAY + tokenizer.get_chat_template(), "enable_thinking": False}
    try:
        text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **options)
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses it ({error}); change or remove it") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes its own


def stop_tokens(tokenizer: Any, config: Any) -> tuple[int, ...]:
    """The tokens that end an answer, by the tokenizer and the model's config."""
    named = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    flat = [token for value in named for token in (value if isinstance(value, list | tuple) else [value])]
    return tuple(sorted({int(token) for token in flat if token is not None}))


def pieces(tokenizer: Any, vocab: int) -> list[str]:
    """Each token's text, as it reads behind other text; "" of special tokens and of parts of a character.

    Args:
      vocab: of the network, which may be larger than the tokenizer's.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    alone = tokenizer.decode([anchor], clean_up_tokenization_spaces=False)
    size = min(len(tokenizer), vocab)
    texts = tokenizer.batch_decode([[anchor, token] for token in range(size)], clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    found = [
        "" if token in special or "�" in text or not text.startswith(alone) else text[len(alone) :]
        for token, text in enumerate(texts)
    ]
    return found + [""] * (vocab - size)
