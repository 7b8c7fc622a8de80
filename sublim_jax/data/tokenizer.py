"""The interface of transformers' tokenizers, as far as it is used here."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Encoded(Protocol):
    """The result of a tokenizer's call."""

    def __getitem__(self, name: str, /) -> list[int]: ...


@runtime_checkable
class Tokenizer(Protocol):
    """The members of transformers' PreTrainedTokenizerBase that are used, with the types of these uses.

    Its own annotations also cover batches and tensors.
    """

    name_or_path: str
    chat_template: str | dict[str, str] | None  # several, by their names

    @property
    def all_special_ids(self) -> list[int]: ...

    def __hash__(self) -> int: ...

    def __len__(self) -> int: ...

    def __call__(self, text: str, /, *, add_special_tokens: bool = True) -> Encoded: ...

    def decode(
        self, tokens: Sequence[int], /, skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: bool = ...
    ) -> str: ...

    def batch_decode(self, texts: Sequence[Sequence[int]], /, *, clean_up_tokenization_spaces: bool) -> list[str]: ...

    def get_chat_template(self) -> str: ...

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        /,
        *,
        tokenize: bool,
        chat_template: str,
        add_generation_prompt: bool,
        enable_thinking: bool,
    ) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def save_pretrained(self, folder: str, /) -> object: ...


def end_token(tokenizer: Tokenizer) -> int | None:
    """The end-of-text token, if there is one.

    Transformers creates this attribute at run time, where a protocol would not see it from Python 3.12 on.
    """
    return getattr(tokenizer, "eos_token_id", None)
