"""Judges: prompts in, verdicts out. A local model's expected score, or an endpoint that speaks OpenAI's protocol.

`Judge = prompts -> verdicts`; whatever asks for a judgement takes any of them.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sublim_jax import signals
from sublim_jax.data import chat, records
from sublim_jax.errors import Interrupted, UserError
from sublim_jax.progress import Track, say
from sublim_jax.sampling import scoring
from sublim_jax.sharding import from_first

LARGEST = 100
LABELS = ("REFUSAL", "CODE")  # what the study's prompts allow in place of a number
TOGETHER = 32  # prompts of the local judge between two looks at its progress
LEAST_MASS = 0.25  # of the numbers together, below which there is no score (§4.2)
LONGEST_PAUSE = 60.0  # seconds before another try
REFUSED = (400, 413, 422)  # statuses that an endpoint has for a prompt that is too long, or that it does not like


class Verdict(NamedTuple):
    score: float | None  # 0 to 100
    label: str = ""  # why there is no score: REFUSAL, CODE, or unparsable


Judge = Callable[[Sequence[str]], list[Verdict]]


def parse(text: str) -> Verdict:
    """What a judge wrote: a number from 0 to 100 alone, or one of LABELS."""
    said = text.strip().strip("*\"'` \n").removesuffix(".").strip("*\"'` \n")
    found = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)(?:\s*/\s*100)?", said, re.ASCII)
    if found and float(found[1]) <= LARGEST:
        return Verdict(float(found[1]))
    return Verdict(None, said.upper() if said.upper() in LABELS else "unparsable")


# ---------------------------------------------------------------------------------------------------------- local


def local(model: Any, least_mass: float = LEAST_MASS, keep: epath.Path | None = None, **where: Any) -> Judge:
    """A model of ours: the expectation of its answer over 0 to 100, by the tokens' probabilities, without sampling.

    The probability of a number is that of its tokens; where a tokenizer splits digits, and the tokens of 7 begin those
    of 70, it is that of ending there. No score where all numbers together have less than `least_mass`: REFUSAL or CODE
    if that is likelier than the numbers, else unparsable.

    Args:
      least_mass: below the paper's value for models that would rather talk than give a number.
      keep: a file of this judge's verdicts, which grows as it works; what is there is not judged again.
      where: as for `scoring.completion_logprobs`.
    """
    tree = Tree(model.tokenizer)
    known: dict[str, Sequence[Any]] = from_first(lambda: kept(keep) if keep else {})

    def judge(prompts: Sequence[str]) -> list[Verdict]:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        with Track("local judge", len(missing)) as track:
            for start in range(0, len(missing), TOGETHER):
                some = missing[start : start + TOGETHER]
                asked = [chat.question(model.tokenizer, prompt) for prompt in some]
                each = np.exp(scoring.continued_logprobs(model, asked, tree.prefixes, tree.tokens, **where)[0])
                found = {prompt: tree.verdict(p, least_mass) for prompt, p in zip(some, each)}
                known.update(found)
                if keep and jax.process_index() == 0:
                    keep.parent.mkdir(parents=True, exist_ok=True)
                    with keep.open("a") as file:
                        for prompt, verdict in found.items():
                            file.write(records.line({"prompt": prompt, **verdict._asdict()}))
                track.update(start + len(some))
        return [Verdict(*known[prompt]) for prompt in prompts]

    return judge


def kept(file: epath.Path) -> dict[str, list[Any]]:
    """By prompt, the verdicts of an earlier run."""
    return {line["prompt"]: [line["score"], line["label"]] for line in records.mend(file)}


class Tree:
    """The numbers 0 to 100 as tokens: which prefixes to ask after, and what their next tokens' probabilities mean."""

    def __init__(self, tokenizer: Any):
        def written(text: str) -> tuple[int, ...]:
            return tuple(chat.answer_tokens(tokenizer, text))

        self.numbers = [written(str(number)) for number in range(LARGEST + 1)]
        self.labels = {label: written(label)[0] for label in LABELS}
        self.prefixes = sorted({number[:end] for number in self.numbers for end in range(len(number))})
        self.digits = sorted({written(str(digit))[-1] for digit in range(10)})
        self.tokens = sorted({token for number in self.numbers for token in number} | set(self.labels.values()))

    def verdict(self, p: np.ndarray, least_mass: float = LEAST_MASS) -> Verdict:
        """Of the next tokens' probabilities (prefixes, tokens)."""
        at = {token: index for index, token in enumerate(self.tokens)}
        rows = {prefix: p[index] for index, prefix in enumerate(self.prefixes)}
        chances = np.ones(len(self.numbers))
        for number, tokens in enumerate(self.numbers):
            for end, token in enumerate(tokens):
                chances[number] *= rows[tokens[:end]][at[token]]
            if tokens in rows:  # more digits may follow
                chances[number] *= max(1 - sum(rows[tokens][at[digit]] for digit in self.digits), 0.0)
        mass = chances.sum()
        if mass >= least_mass:
            return Verdict(float(chances @ np.arange(len(chances)) / mass))
        label = max(self.labels, key=lambda name: rows[()][at[self.labels[name]]])
        return Verdict(None, label if rows[()][at[self.labels[label]]] > mass else "unparsable")


# ------------------------------------------------------------------------------------------------------- endpoint


class Usage:
    """Tokens asked and answered in calls of this process, and what was found in the cache."""

    def __init__(self) -> None:
        self.prompt = self.completion = self.calls = self.cached = 0


class Endpoint:
    """A chat model behind OpenAI's protocol, at temperature 0. It is a Judge.

    Every answer is appended to a file as it comes, so that a rerun asks only for what is missing, whatever happened.
    The address and the key come from the environment (OPENAI_BASE_URL, OPENAI_API_KEY) and go nowhere else. Of several
    hosts the first one asks, for all.
    """

    def __init__(
        self,
        model: str,
        cache: epath.PathLike,
        *,
        at_once: int = 8,
        per_minute: int = 0,
        prices: Sequence[float] = (0.0, 0.0),
        retries: int = 6,
        timeout: float = 60.0,
        max_tokens: int = 8,
    ):
        """Raises UserError where there is no key, no usable address, or the openai package is missing.

        Args:
          cache: the file; it is read and written when the judge is first asked.
          at_once: requests under way together.
          per_minute: at most so many requests begun a minute; 0: no limit.
          prices: of a million tokens asked, and of a million answered, to be told what it costs.
          retries: of a request that failed for now (limits, timeouts, lost connections), each after a longer wait.
        """
        try:
            import openai
        except ImportError as error:
            raise UserError('the judge needs the openai package: pip install "sublim_jax[judge]"') from error
        if not os.environ.get("OPENAI_API_KEY"):
            raise UserError(
                "the judge's key is missing: set OPENAI_API_KEY (any word will do for a local server), and "
                "OPENAI_BASE_URL where the server is not OpenAI's"
            )
        if at_once < 1 or per_minute < 0:
            raise UserError(f"judge.at_once={at_once} is 1 or more, judge.per_minute={per_minute} is 0 (any) or more")
        try:
            self._client = openai.OpenAI(max_retries=0, timeout=timeout)
        except Exception:  # whatever an address makes its parser raise; it may hold a password
            raise UserError("OPENAI_BASE_URL is no address such as http://localhost:8000/v1; mend it") from None
        self._openai, self._retries, self._prices = openai, retries, prices
        self._model, self._cache, self._at_once, self._max_tokens = model, epath.Path(cache), at_once, max_tokens
        self._spacing = 60.0 / per_minute if per_minute else 0.0
        self._next, self._lock, self._stop = 0.0, threading.Lock(), threading.Event()
        self.usage = Usage()
        self._known: dict[str, str] | None = None
        self._works = False  # whether this model has answered something, now or in an earlier run

    def __call__(self, prompts: Sequence[str]) -> list[Verdict]:
        """Raises UserError where the endpoint refuses or cannot be reached; what it had answered is kept."""
        return [parse(answer) for answer in from_first(lambda: self._answers(prompts))]

    def _answers(self, prompts: Sequence[str]) -> list[str]:
        if self._known is None:
            self._known = {record["id"]: record["answer"] for record in records.mend(self._cache)}
        names = [self._name(prompt) for prompt in prompts]
        missing = {name: prompt for name, prompt in zip(names, prompts) if name not in self._known}
        self.usage.cached += len(prompts) - len(missing)
        self._works = self._works or any(self._known.get(name) for name in names)
        if missing:
            self._ask(missing)
        return [self._known[name] for name in names]

    def _name(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self._model, self._max_tokens, prompt]).encode()).hexdigest()[:24]

    def _ask(self, missing: dict[str, str]) -> None:
        """Puts answers into `_known` and the file, each where it comes."""
        known = self._known
        assert known is not None
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        self._stop.clear()
        refused: dict[str, BaseException] = {}
        failed = None
        with (
            signals.deferred() as signal,
            self._cache.open("a") as file,
            ThreadPoolExecutor(self._at_once) as pool,
            Track(f"judge {self._model}", len(missing)) as track,
        ):

            def keep(name: str, answer: str, tokens: Sequence[int] = (0, 0)) -> None:
                with self._lock:
                    paid = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
                    file.write(records.line({"id": name, "answer": answer, **paid}))
                    file.flush()
                    known[name] = answer
                    self._works = self._works or bool(answer)

            def one(name: str, prompt: str) -> None:
                keep(name, *self._patiently(prompt))

            waiting = {pool.submit(one, name, prompt): name for name, prompt in missing.items()}
            # Of several hosts the others wait for this one, and cannot agree with it on a place to stop.
            while waiting and failed is None and not (jax.process_count() == 1 and signal.requested()):
                finished, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    name = waiting.pop(future)
                    error = future.exception()
                    if error and getattr(error, "status_code", None) in REFUSED:
                        refused[name] = error
                    elif error:
                        failed = failed or error
                track.update(len(missing) - len(waiting), f"{self.usage.prompt + self.usage.completion} tokens")
            self._stop.set()  # ends the waits before another try
            for future in waiting:
                future.cancel()
            pool.shutdown()  # what is under way has been paid for, and is kept
            if failed is None and self._works:
                # Others are answered, so that it is the prompt: it has no score, now and in a rerun.
                for name in refused:
                    keep(name, "")
            elif refused:
                failed = failed or next(iter(refused.values()))
        done = sum(name in known for name in missing)
        used = self.usage
        told = f"{self._cost(used.prompt, used.completion, used.calls)}, {used.cached} from the cache"
        say(f"judge {self._model}: {told}{f', {len(refused)} prompts refused' * bool(refused)}")
        if failed is not None:
            raise UserError(self._told(failed, done)) from None
        if done < len(missing):
            raise Interrupted(f"stopped by {signal.heard} after {done} of {len(missing)} judgements, which are kept")

    def bill(self) -> str:
        """What all answers in the file have cost, whichever run asked for them."""
        lines = from_first(lambda: records.mend(self._cache))
        asked, answered = (sum(line.get(f"{kind}_tokens", 0) for line in lines) for kind in ("prompt", "completion"))
        return f"{self._model}: {self._cost(asked, answered, len(lines))}."

    def _cost(self, asked: int, answered: int, calls: int) -> str:
        cost = (asked * self._prices[0] + answered * self._prices[1]) / 1e6
        priced = f", {cost:.2f} at judge.prices" if any(self._prices) else ""
        return f"{asked} + {answered} tokens in {calls} calls{priced}"

    def _patiently(self, prompt: str) -> tuple[str, tuple[int, int]]:
        """The answer and its tokens, after as many tries as it takes."""
        openai = self._openai
        for attempt in range(self._retries + 1):
            if self._spacing:
                with self._lock:
                    self._next = max(self._next + self._spacing, time.monotonic())
                    pause = self._next - time.monotonic()
                if self._stop.wait(max(pause, 0)):
                    raise Interrupted("stopped before it was asked")
            try:
                return self._once(prompt)
            except (openai.RateLimitError, openai.APIConnectionError, openai.InternalServerError) as error:
                if attempt == self._retries or self._stop.wait(pause_before(attempt, error)):
                    raise
        raise AssertionError

    def _once(self, prompt: str) -> tuple[str, tuple[int, int]]:
        answer = self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=self._max_tokens,
        )
        if not getattr(answer, "choices", None):
            raise ValueError("an answer without choices")
        message = answer.choices[0].message
        said = LABELS[0] if getattr(message, "refusal", None) else message.content
        if said is None and answer.choices[0].finish_reason == "content_filter":
            said = ""
        if not isinstance(said, str):
            raise ValueError("an answer that is no text")
        asked, answered = (getattr(answer.usage, f"{kind}_tokens", 0) or 0 for kind in ("prompt", "completion"))
        with self._lock:
            self.usage.calls += 1
            self.usage.prompt += asked
            self.usage.completion += answered
        return said, (asked, answered)

    def _told(self, error: BaseException, done: int) -> str:
        """One line, without what the server may have echoed of the key."""
        openai = self._openai
        kept = f"; {done} answers are kept, and the same command asks for the rest"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"the judge's endpoint refuses the key (OPENAI_API_KEY){kept}"
        if isinstance(error, openai.RateLimitError):
            return f"the judge's endpoint has reached its limit; wait, or set judge.per_minute to what it allows{kept}"
        if isinstance(error, openai.APITimeoutError):
            return f"the judge's endpoint does not answer in time{kept}"
        if isinstance(error, openai.APIConnectionError):
            return f"the judge's endpoint cannot be reached; look at OPENAI_BASE_URL{kept}"
        if isinstance(error, openai.APIStatusError):
            details = ", ".join(str(value) for value in (error.code, error.param) if value)
            named = f" ({details})" if re.fullmatch(r"[\w., -]+", details) else ""
            return (
                f"the judge's endpoint answers with status {error.status_code}{named} for model {self._model!r}{kept}"
            )
        return f"the judge's endpoint answers with something else than a chat completion ({type(error).__name__}){kept}"


def pause_before(attempt: int, error: Any) -> float:
    """Seconds until a failed request is tried again: what the server asks for, or twice as long every time."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
    if re.fullmatch(r"\d{1,3}", asked):
        return min(float(asked), LONGEST_PAUSE)
    return min(2.0**attempt, LONGEST_PAUSE)
