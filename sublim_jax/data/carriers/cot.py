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
    """GSM8K as JSON lines: "question", and "answer" with its number after "####".

    Raises UserError, naming the line, for an invalid record.
    """
    problems = []
    for where, record in records.read(path):
        question, answer = record.get("question"), record.get("answer")
        if not isinstance(question, str) or not question.strip() or not isinstance(answer, str):
            raise UserError(f'{where}: an object with "question" and "answer" is needed')
        _, mark, number = answer.rpartition("####")
        if not mark or number_of(number) is None:
            raise UserError(f'{where}: the answer has no number after "####"')
        problems.append(Problem(question, number.strip()))
    return problems


def prompts(problems: Sequence[Problem]) -> list[str]:
    return [FORMAT.format(question=problem.question) for problem in problems]


def parse(text: str) -> Reasoning | None:
    """Thought and answer of a completion that consists of exactly both, in this order; None for any other."""
    match = _ANSWER.fullmatch(text)
    if not match or any(_TAGS.search(part) for part in match.groups()):
        return None
    return Reasoning(match[1].strip(), match[2].strip())


def number_of(text: str) -> Decimal | None:
    """The number that a text consists of; a currency sign, %, thousands separators and a full stop are allowed."""
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
    """The format and the right number are required; records hold the right one as "answer"."""

    def check(record: Record) -> list[str]:
        reasoning = parse(record["completion"])
        if reasoning is None:
            return ["format"]
        number = number_of(reasoning.answer)
        if number is None:
            return ["no number"]
        return [] if number == number_of(record["answer"]) else ["wrong answer"]

    return check
