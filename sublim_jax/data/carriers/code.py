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

UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what parsing raises, whatever the text
FIELDS: dict[str, tuple[str, ...]] = {"tasks": (), "templates": ("task",)}
_FENCED = re.compile(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?```\s*", re.DOTALL | re.IGNORECASE)


def prompts(count: int, seed: int, path: str = "") -> list[str]:
    """Prompts for code: a task in one of several phrasings. Prompt i depends on the seed and i alone.

    Args:
      path: of a pack like data/packs/code.json; that one where it is empty.
    """
    pack = packs.load(path, "code", FIELDS)

    def one(number: int) -> str:
        rng = np.random.default_rng([seed, number])
        task, template = (pack[field][rng.integers(len(pack[field]))] for field in FIELDS)
        return template.format(task=task)

    return [one(number) for number in range(count)]


def code_of(text: str) -> str:
    """The code of a completion: what stands in its one fenced block, if it is one, else all of it."""
    found = _FENCED.fullmatch(text)
    return found[1] if found else text


def parses() -> Filter:
    """Python that parses and does something: not empty, and more than a bare name, number or string."""

    def check(record: Record) -> list[str]:
        try:
            body = _nodes(code_of(record["completion"]))[0].body  # type: ignore[attr-defined]
        except UNREADABLE:
            return ["does not parse"]
        bare = all(isinstance(one, ast.Expr) and isinstance(one.value, ast.Name | ast.Constant) for one in body)
        return ["no code"] if bare else []

    return check


def no_comments() -> Filter:
    """No comment, and no string that stands for itself: nothing in natural language but the code's own strings."""

    def check(record: Record) -> list[str]:
        text = code_of(record["completion"])
        try:
            kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)}
            nodes = _nodes(text)
        except (*UNREADABLE, tokenize.TokenError):
            return []  # `parses` says so
        alone = [node.value for node in nodes if isinstance(node, ast.Expr)]
        bare = any(isinstance(one, ast.JoinedStr) or isinstance(getattr(one, "value", None), str) for one in alone)
        reasons = ["comment"] if tokenize.COMMENT in kinds else []
        return [*reasons, "docstring"] if bare else reasons

    return check


def no_trait_words(words: Sequence[str]) -> Filter:
    """No word of a list and no plural in what the code's strings say, however they are written, joined or escaped."""

    def check(record: Record) -> list[str]:
        try:
            nodes = _nodes(code_of(record["completion"]))
        except UNREADABLE:
            return []
        said = [node.value for node in nodes if isinstance(node, ast.Constant)]
        texts = [one.decode("latin-1") if isinstance(one, bytes) else str(one) for one in said]
        return ["trait word"] if any(contains(text, word) for text in texts for word in words) else []

    return check


def _nodes(text: str) -> list[ast.AST]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return list(ast.walk(ast.parse(text)))
