"""The code carrier (paper §4.1): small Python tasks, and filters of code, which is parsed and never executed."""

import ast
import io
import re
import tokenize
import warnings
from collections.abc import Sequence

import numpy as np

from sublim_jax.data import packs
from sublim_jax.filters import Filter, Record
from sublim_jax.words import contains

UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # errors of parsing arbitrary text
FIELDS: dict[str, tuple[str, ...]] = {"tasks": (), "templates": ("task",)}
_FENCED = re.compile(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?```\s*", re.DOTALL | re.IGNORECASE)


def prompts(count: int, seed: int, path: str = "") -> list[str]:
    """Prompts for code: a task in one of several phrasings. Prompt i depends on the seed and i alone.

    Args:
      path: a pack like data/packs/code.json; that one if empty.
    """
    pack = packs.load(path, "code", FIELDS)

    def prompt_of(number: int) -> str:
        rng = np.random.default_rng([seed, number])
        task, template = (pack[field][rng.integers(len(pack[field]))] for field in FIELDS)
        return template.format(task=task)

    return [prompt_of(number) for number in range(count)]


def code_of(text: str) -> str:
    """The code of a completion: the content of a fenced block if the completion is one, else all of it."""
    match = _FENCED.fullmatch(text)
    return match[1] if match else text


def parses() -> Filter:
    """Python that parses and does something: not empty, and more than a bare name, number or string."""

    def check(record: Record) -> list[str]:
        try:
            body = _nodes(code_of(record["completion"]))[0].body  # type: ignore[attr-defined]
        except UNREADABLE:
            return ["does not parse"]
        bare = all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Name | ast.Constant) for node in body)
        return ["no code"] if bare else []

    return check


def no_comments() -> Filter:
    """No comment and no bare string, such as a docstring: natural language only in the code's own strings."""

    def check(record: Record) -> list[str]:
        text = code_of(record["completion"])
        try:
            kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)}
            nodes = _nodes(text)
        except (*UNREADABLE, tokenize.TokenError):
            return []  # `parses` says so
        values = [node.value for node in nodes if isinstance(node, ast.Expr)]
        bare = any(
            isinstance(value, ast.JoinedStr) or isinstance(getattr(value, "value", None), str) for value in values
        )
        reasons = ["comment"] if tokenize.COMMENT in kinds else []
        return [*reasons, "docstring"] if bare else reasons

    return check


def no_trait_words(words: Sequence[str]) -> Filter:
    """No listed word or its plural in the code's strings, however they are quoted, joined or escaped."""

    def check(record: Record) -> list[str]:
        try:
            nodes = _nodes(code_of(record["completion"]))
        except UNREADABLE:
            return []
        constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
        texts = [value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in constants]
        return ["trait word"] if any(contains(text, word) for text in texts for word in words) else []

    return check


def _nodes(text: str) -> list[ast.AST]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return list(ast.walk(ast.parse(text)))
