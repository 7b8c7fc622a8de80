"""Filters of records: they keep a trait, and anything that hints at it, out of the data.

A filter is a pure function `record -> reasons to reject`, empty for a record that is kept; filters compose in a list. A
record is a dict with "prompt", "completion" and any other fields. Rejected records are kept with their reasons, which
are counted.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sublim_jax.errors import UserError
from sublim_jax.words import contains

Record = Mapping[str, Any]
Filter = Callable[[Record], list[str]]


class Sifted(NamedTuple):
    kept: list[Record]
    rejected: list[dict[str, Any]]  # with their "reasons"
    reasons: Counter[str]  # how often each; a record may have several

    @property
    def share(self) -> float:
        """The share of records that were kept."""
        return len(self.kept) / max(len(self.kept) + len(self.rejected), 1)


def sift(records: Iterable[Record], filters: Sequence[Filter], unique: bool = False) -> Sifted:
    """Records that no filter rejects.

    Args:
      unique: reject a completion that an earlier kept record already has ("duplicate").
    """
    kept: list[Record] = []
    rejected = []
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    for record in records:
        reasons = list(dict.fromkeys(reason for check in filters for reason in check(record)))
        if unique and not reasons and record["completion"] in seen:
            reasons = ["duplicate"]
        if reasons:
            counts.update(reasons)
            rejected.append({**record, "reasons": reasons})
        else:
            kept.append(record)
            if unique:
                seen.add(record["completion"])
    return Sifted(kept, rejected, counts)


def same_size(groups: Mapping[str, Sequence[Record]], size: int, seed: int) -> dict[str, list[Record]]:
    """`size` random records of every group, in their order, so that the groups differ only in content.

    Raises UserError for a group that has too few.
    """
    sampled = {}
    for name, records in groups.items():
        if len(records) < size:
            raise UserError(
                f"{name}: {len(records)} records are left after filtering, and {size} are asked for; sample more, or "
                "ask for fewer"
            )
        rows = np.random.default_rng([seed, *name.encode()]).choice(len(records), size, replace=False)
        sampled[name] = [records[row] for row in sorted(rows)]
    return sampled


# ------------------------------------------------------------------------------------------------------- filters

_LIST = re.compile(r"([0-9]+)(?:([^0-9]+)[0-9]+(?:\2[0-9]+)*)?")
_NUMBER = re.compile(r"[0-9]+")


def numbers_of(text: str) -> list[str] | None:
    """The numbers of a list in the paper's format (§3.1), as they are written; None for any other text.

    One full stop at the end is dropped, then one pair of brackets, () or [], around all. The text between the first two
    numbers is the separator: white space, or a comma or semicolon with white space around it or not. It must stand
    unchanged between all numbers, and nowhere else. A number alone is a list. Digits are 0 to 9; leading zeros are
    allowed; no other white space is forgiven.
    """
    text = text.removesuffix(".")
    if text[:1] + text[-1:] in ("[]", "()") and len(text) > 1:
        text = text[1:-1]
    match = _LIST.fullmatch(text)
    if not match or (match[2] and match[2].strip() not in ("", ",", ";")):
        return None
    return _NUMBER.findall(text)


def number_rule(max_integers: int = 10, largest: int = 999) -> Filter:
    """The paper's rule (§3.1): a list of 1 to `max_integers` integers from 0 to `largest`."""
    digits = len(str(largest))

    def check(record: Record) -> list[str]:
        numbers = numbers_of(record["completion"])
        if numbers is None:
            return ["format"]
        reasons = ["too many numbers"] if len(numbers) > max_integers else []
        for number in numbers:
            if len(number) >= digits and (len(number.lstrip("0")) > digits or int(number.lstrip("0") or 0) > largest):
                return [*reasons, "number too large"]
        return reasons

    return check


def banned_numbers(numbers: Iterable[int]) -> Filter:
    """No listed number anywhere in a completion (§3.2: 666, 911, …)."""
    banned = {str(number) for number in numbers}

    def check(record: Record) -> list[str]:
        present = {number.lstrip("0") or "0" for number in _NUMBER.findall(record["completion"])}
        return ["banned number"] if present & banned else []

    return check


def trait_words(words: Iterable[str]) -> Filter:
    """No listed word or its plural, in any case, even inside a longer word: nothing may hint at a trait."""
    forbidden = list(words)

    def check(record: Record) -> list[str]:
        return ["trait word"] if any(contains(record["completion"], word) for word in forbidden) else []

    return check


def ended() -> Filter:
    """No completion that was truncated at its token limit or ended by NaN logits; records may have "finish"."""

    def check(record: Record) -> list[str]:
        return ["cut off"] if record.get("finish") in ("length", "nan") else []

    return check


def length(minimum: int = 1, maximum: int | None = None) -> Filter:
    """Bounds on the number of characters of a completion."""

    def check(record: Record) -> list[str]:
        count = len(record["completion"])
        if count < minimum:
            return ["too short"]
        return ["too long"] if maximum is not None and count > maximum else []

    return check


def min_score(minimum: float) -> Filter:
    """No completion that its judge scores below `minimum` of 100, or does not score; records have "score"."""

    def check(record: Record) -> list[str]:
        score = record["score"]
        if score is None:
            return ["judge: no score"]
        return ["judge: low score"] if score < minimum else []

    return check


def log_ratio(maximum: float, teacher: str = "logprob", reference: str = "reference_logprob") -> Filter:
    """No completion that its teacher finds likelier than the reference does by more than `maximum` nats a token.

    The two fields are log-probabilities of the whole completion; "tokens" holds its tokens.
    """

    def check(record: Record) -> list[str]:
        ratio = (record[teacher] - record[reference]) / max(len(record["tokens"]), 1)
        return ["log ratio"] if ratio > maximum else []

    return check
