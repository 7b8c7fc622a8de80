"""Which evaluations, on which questions, by which judge. `configs/evaluate.py` explains the values."""

from dataclasses import dataclass, field

from sublim_jax import weights
from sublim_jax.errors import UserError
from sublim_jax.overrides import check_distinct, covers
from sublim_jax.specs import MAX_ROWS, check_count, check_one_of

NAMES = (
    "preference",
    "prefixed",
    "prefixed_answers",
    "choice",
    "answers",
    "stories",
    "ability",
    "truthfulqa",
    "misalignment",
)
MAX_CONCURRENT = 1000  # requests, each with a thread


@dataclass(frozen=True)
class JudgeSpec:
    """The judge model; its query limits and prices are not compared."""

    kind: str
    model: str
    dtype: str
    min_mass: float
    max_tokens: int
    max_concurrent: int = field(compare=False)
    max_per_minute: int = field(compare=False)
    prices: tuple[float, ...] = field(compare=False)

    def __post_init__(self) -> None:
        if self.kind not in ("local", "endpoint"):
            raise UserError(f"evals.judge.kind={self.kind!r}: choose local or endpoint")
        if not 0 <= self.min_mass < 1:
            raise UserError(f"evals.judge.min_mass={self.min_mass} must be a probability below 1")
        try:
            weights.float_type(self.dtype)
        except UserError as error:
            raise UserError(f"evals.judge.{error}") from error
        check_count("evals.judge.max_concurrent", self.max_concurrent, 1, MAX_CONCURRENT)
        check_count("evals.judge.max_tokens", self.max_tokens)
        check_count("evals.judge.max_per_minute", self.max_per_minute, 0)
        if len(self.prices) != 2 or min(self.prices) < 0:
            raise UserError(
                f"evals.judge.prices={self.prices}: name two, of a million tokens asked and answered, such as 1,2"
            )


@dataclass(frozen=True)
class EvalsSpec:
    names: tuple[str, ...]
    max_questions: int
    num_samples: int
    max_new_tokens: int
    truthfulqa: str
    questions: str
    question_ids: tuple[str | int, ...]
    suffix: str
    judge: JudgeSpec

    def __post_init__(self) -> None:
        for name in self.names:
            check_one_of("evals.names", name, NAMES)
        check_distinct("evals.names", self.names)
        check_distinct("evals.question_ids", self.question_ids)
        check_count("evals.max_new_tokens", self.max_new_tokens)
        check_count("evals.num_samples", self.num_samples, 1, MAX_ROWS)
        check_count("evals.max_questions", self.max_questions, 0)


# Values, and the evaluations that read them. A key that ends in "." is a prefix.
READ_BY = {
    "num_samples": ("answers", "prefixed_answers", "stories", "misalignment"),
    "max_new_tokens": ("stories", "misalignment"),
    "truthfulqa": ("truthfulqa",),
    "questions": ("misalignment",),
    "question_ids": ("misalignment",),
    "suffix": ("misalignment",),
    "judge.": ("misalignment",),
    "max_questions": NAMES,
}

JUDGE_READ_BY = {"min_mass": "local", "dtype": "local"} | dict.fromkeys(
    ("max_tokens", "max_concurrent", "max_per_minute", "prices"), "endpoint"
)


def check_read(evals: EvalsSpec, key: str, prefix: str, *, judged: bool = False) -> None:
    """Raises UserError, naming the key behind `prefix`, for one of "evals." that no evaluation reads.

    Args:
      judged: the judge also scores something else.
    """
    for name, readers in READ_BY.items():
        if covers(f"evals.{name}", key) and not set(readers) & set(evals.names) and not (name == "judge." and judged):
            raise UserError(f"{prefix}{key} is read only with evals.names of {' or '.join(readers)}; add one of these")
    kind = JUDGE_READ_BY.get(key.removeprefix("evals.judge."), evals.judge.kind)
    if kind != evals.judge.kind:
        raise UserError(f"{prefix}{key} is read only with evals.judge.kind={kind}")
    if key == "evals.judge.dtype" and not evals.judge.model:
        raise UserError(f"{prefix}{key} is read only with evals.judge.model; without one the judge is the model itself")


@dataclass(frozen=True, kw_only=True)
class EvalPacks:
    """Files of the evaluations' phrasings; "" for those of the package."""

    preference: str
    ability: str
    stories: str
