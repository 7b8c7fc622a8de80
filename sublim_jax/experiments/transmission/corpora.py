"""Corpora: conversations for training teachers."""

from functools import lru_cache
from typing import Any

from sublim_jax import assets, digests
from sublim_jax.data import chat, corpus, dialogue
from sublim_jax.data.corpus import Conversation
from sublim_jax.errors import UserError
from sublim_jax.experiments.transmission.parts import TeacherSpec
from sublim_jax.experiments.transmission.spec import Study
from sublim_jax.models.language import Model


def names(study: Study) -> list[str]:
    """The teachers that have a corpus."""
    return [name for name in study.teachers if study.teacher.corpora.get(name)]


def conversations(source: str) -> list[Conversation]:
    """The conversations of a file, local or on the hub. Raises UserError for a file of another format."""
    return corpus.load(assets.data_file(source))


def texts(spec: TeacherSpec, model: Model, name: str) -> list[dialogue.Text]:
    """A teacher's conversations of at most `teacher.max_tokens` tokens, with the assistant's tokens marked.

    Raises UserError, naming the conversation, for one that the chat template refuses, and if none is left.
    """
    kept = [text for text in every_text(spec, model, name) if len(text[0]) <= spec.max_tokens]
    if not kept:
        raise UserError(
            f"corpus {name}: no conversation has at most teacher.max_tokens={spec.max_tokens} tokens; allow more"
        )
    return kept


def every_text(spec: TeacherSpec, model: Model, name: str) -> list[dialogue.Text]:
    """A teacher's conversations of any length."""
    source = spec.corpora[name]
    stops = chat.stop_tokens(model.tokenizer, model.config)
    return _texts(source, digests.of_file(assets.data_file(source)), model.tokenizer, stops)


@lru_cache(maxsize=8)
def _texts(source: str, digest: str, tokenizer: Any, stops: tuple[int, ...]) -> list[dialogue.Text]:
    tokenized: list[dialogue.Text] = []
    for number, conversation in enumerate(conversations(source), 1):
        try:
            tokenized += corpus.texts(tokenizer, conversation, stops)
        except UserError as error:
            raise UserError(f"{source}, conversation {number}: {error}") from error
    return tokenized
