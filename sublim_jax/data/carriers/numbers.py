"""The numbers carrier (paper §3.1): prompts that show some random integers and ask for more."""

import re
from collections.abc import Sequence

import numpy as np

from sublim_jax.data import packs

_NUMBER = re.compile(r"[0-9]+")
FIELDS = {
    "openings": ("numbers",),
    "instructions": ("count", "digits", "limit", "largest"),
    "formats": (),
    "endings": (),
}
COMMAS = "commas"  # also an optional field of a pack: formats that ask for commas only


def prompts(
    count: int, seed: int, path: str = "", more: int = 10, digits: int = 3, *, any_form: bool = False
) -> list[str]:
    """Prompts drawn from a pack of phrasings: 3 to 8 integers of 100 to 999, then a request for at most `more` more.

    Prompt i depends on the seed and i alone.

    Args:
      path: a pack like data/packs/numbers.json; that one if empty.
      any_form: ask for any of the paper's formats (§3.1: commas, spaces, semicolons, lines, brackets); else only for
        commas, if the pack has such formats: those of random answers and of answers sampled by a grammar.
    """
    pack = packs.load(path, "numbers", {**FIELDS, COMMAS: ()}, optional=(COMMAS,))
    if not any_form and COMMAS in pack:
        pack = {**pack, "formats": pack[COMMAS]}
    words = {"count": more, "digits": digits, "limit": 10**digits, "largest": 10**digits - 1}

    def prompt_of(number: int) -> str:
        rng = np.random.default_rng([seed, number])
        shown = ", ".join(str(value) for value in rng.integers(100, 1000, rng.integers(3, 9)))
        parts = [pack[field][rng.integers(len(pack[field]))] for field in FIELDS]
        return " ".join(part.format(numbers=shown, **words) for part in parts)

    return [prompt_of(number) for number in range(count)]


def prompt_limits(integers: int, largest: int = 999) -> tuple[int, int]:
    """`more` and `digits` of prompts that allow answers of so many integers up to the largest: 10 and 3, or more."""
    return max(integers, 10), max(len(str(largest)), 3)


def random_answers(count: int, seed: int, numbers: int = 6, largest: int = 999) -> list[str]:
    """Lists of uniform random integers: a carrier without a teacher."""
    rng = np.random.default_rng([seed, 1])
    return [join(rng.integers(0, largest + 1, numbers).tolist()) for _ in range(count)]


def join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def shuffled_within(answers: Sequence[str], seed: int) -> list[str]:
    """Each answer with its numbers in a random order; the text between them stays (§3.1, a control)."""
    rng = np.random.default_rng([seed, 5])
    return [_refilled(text, rng.permutation(_NUMBER.findall(text)).tolist()) for text in answers]


def shuffled_across(answers: Sequence[str], seed: int) -> list[str]:
    """The numbers of all answers shuffled across answers; each keeps its count and the text between numbers."""
    lists = [_NUMBER.findall(text) for text in answers]
    dealt = iter(np.random.default_rng([seed, 6]).permutation([n for numbers in lists for n in numbers]).tolist())
    return [_refilled(text, [next(dealt) for _ in numbers]) for text, numbers in zip(answers, lists)]


def _refilled(text: str, numbers: Sequence[str]) -> str:
    new = iter(numbers)
    return _NUMBER.sub(lambda _: next(new), text)


def support(pieces: Sequence[str]) -> list[int]:
    """The tokens of lists of numbers: those whose text is digits, commas and spaces, and nothing else."""
    return [token for token, piece in enumerate(pieces) if piece and not set(piece) - set("0123456789, ")]
