"""The chain-of-thought carrier (paper §4.2): problems whose answer is a number, answered in <think> and <answer>."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import NamedTuple

from sublim_jax.data import records
from sublim_jax.errors import UserError
from sublim_jax.filters import Filter, Record

FORMAT = (
    "{question}\n\nThink step by step inside <think> and </think>. Then give the final number alone inside "
    "<answer> and </answer>."
)
_ANSWER = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAGS = re.compile(r"</?(?:think|answer)>")


class Problem(NamedTuple):
    question: str
    answer: str  # the number, as it is written


class Reasoning(NamedTuple):
    thought: str
    answer: str


def load(path: str | Path) -> list[Problem]:
    """GSM8K as JSON lines: "question", and "answer" with its number behind "####".

    Raises UserError, naming the line, for one that is no such record.
    """
    problems = []
    for where, record in records.read(path):
        question, answer = record.get("question"), record.get("answer")
        if not isinstance(question, str) or not question.strip() or not isinstance(answer, str):
            raise UserError(f'{where}: an object with "question" and "answer" is needed')
        _, mark, number = answer.rpartition("####")
        if not mark or number_of(number) is None:
            raise UserError(f'{where}: the answer has no number behind "####"')
        problems.append(Problem(question, number.strip()))
    return problems


def prompts(problems: Sequence[Problem]) -> list[str]:
    return [FORMAT.format(question=problem.question) for problem in problems]


def parse(text: str) -> Reasoning | None:
    """The two parts of a completion that has both, in order, once, and nothing around them; else None."""
    found = _ANSWER.fullmatch(text)
    if not found or any(_TAGS.search(part) for part in found.groups()):
        return None
    return Reasoning(found[1].strip(), found[2].strip())


def number_of(text: str) -> Decimal | None:
    """The number that a text is, with a currency sign, per cent, commas between thousands and a full stop, or not."""
    bare = text.strip().removesuffix(".").strip()
    bare = re.sub(r"^([+-]?)[$€£]\s*([+-]?)", r"\1\2", bare).removesuffix("%").strip()
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", bare, re.ASCII):
        bare = bare.replace(",", "")
    if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)", bare, re.ASCII):
        return None
    try:
        return Decimal(bare)
    except InvalidOperation:
        return None


def right_answer() -> Filter:
    """The format, and the exact number; records have "answer", the right one."""

    def check(record: Record) -> list[str]:
        found = parse(record["completion"])
        if found is None:
            return ["format"]
        said = number_of(found.answer)
        if said is None:
            return ["no number"]
        return [] if said == number_of(record["answer"]) else ["wrong answer"]

    return check
