"""The code carrier (paper §4.1): small Python tasks, and filters of code, which is parsed and never executed."""

import ast
import io
import re
import tokenize
import warnings

import numpy as np

from sublim_jax.data import packs
from sublim_jax.filters import Filter, Record

FIELDS: dict[str, tuple[str, ...]] = {"tasks": (), "templates": ("task",)}
_FENCED = re.compile(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?```\s*", re.DOTALL | re.IGNORECASE)


def prompts(count: int, seed: int, path: str = "") -> list[str]:
    """Prompts for code: a task in one of several phrasings. Prompt i depends on the seed and i alone.

    Args:
      path: of a pack like data/packs/code.json; that one where it is empty.
    """
    pack = packs.load(path, "code", FIELDS)

    def one(number: int) -> str:
        dice = np.random.default_rng([seed, number])
        task, template = (pack[field][dice.integers(len(pack[field]))] for field in FIELDS)
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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                body = ast.parse(code_of(record["completion"])).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ["does not parse"]
        bare = all(isinstance(one, ast.Expr) and isinstance(one.value, ast.Name | ast.Constant) for one in body)
        return ["no code"] if bare else []

    return check


def no_comments() -> Filter:
    """No comment and no docstring: nothing in natural language beside the code's own strings."""

    def check(record: Record) -> list[str]:
        text = code_of(record["completion"])
        try:
            kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError):
            return []  # `parses` says so
        documented = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        reasons = ["comment"] if tokenize.COMMENT in kinds else []
        return reasons + ["docstring"] * any(isinstance(n, documented) and ast.get_docstring(n) for n in nodes)

    return check
