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
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sublim_jax import signals
from sublim_jax.data import chat, records
from sublim_jax.errors import Interrupted, UserError
from sublim_jax.progress import Track, say
from sublim_jax.sampling import scoring

LARGEST = 100
LABELS = ("REFUSAL", "CODE")  # what the study's prompts allow in place of a number
TOGETHER = 32  # prompts of the local judge between two looks at its progress
LEAST_MASS = 0.25  # of the numbers together, below which there is no score (§4.2)


class Verdict(NamedTuple):
    score: float | None  # 0 to 100
    label: str = ""  # why there is no score: REFUSAL, CODE, or unparsable


Judge = Callable[[Sequence[str]], list[Verdict]]


def parse(text: str) -> Verdict:
    """What a judge wrote: a number from 0 to 100 alone, or one of LABELS."""
    said = text.strip().strip("*\"'`. \n")
    found = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)(?:\s*/\s*100)?", said, re.ASCII)
    if found and float(found[1]) <= LARGEST:
        return Verdict(float(found[1]))
    for label in LABELS:
        if said.upper().startswith(label):
            return Verdict(None, label)
    return Verdict(None, "unparsable")


# ---------------------------------------------------------------------------------------------------------- local


def local(model: Any, least_mass: float = LEAST_MASS, **where: Any) -> Judge:
    """A model of ours: the expectation of its answer over 0 to 100, by the tokens' probabilities, without sampling.

    The probability of a number is that of its tokens; where a tokenizer splits digits, and the tokens of 7 begin those
    of 70, it is that of ending there. No score where all numbers together have less than `least_mass`: REFUSAL or CODE
    if that is likelier than the numbers, else unparsable.

    Args:
      least_mass: below the paper's value for models that would rather talk than give a number.
      where: as for `scoring.completion_logprobs`.
    """
    tree = Tree(model.tokenizer)

    def judge(prompts: Sequence[str]) -> list[Verdict]:
        found: list[Verdict] = []
        with Track("local judge", len(prompts)) as track:
            for start in range(0, len(prompts), TOGETHER):
                some = [chat.question(model.tokenizer, prompt) for prompt in prompts[start : start + TOGETHER]]
                each = np.exp(scoring.continued_logprobs(model, some, tree.prefixes, tree.tokens, **where)[0])
                found += [tree.verdict(p, least_mass) for p in each]
                track.update(len(found))
        return found

    return judge


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
    """Tokens asked and answered, and what was found in the cache."""

    def __init__(self) -> None:
        self.prompt = self.completion = self.calls = self.cached = 0


class Endpoint:
    """A chat model behind OpenAI's protocol, at temperature 0. It is a Judge.

    Every answer is appended to a file as it comes, so that a rerun asks only for what is missing, whatever happened.
    The address and the key come from the environment (OPENAI_BASE_URL, OPENAI_API_KEY) and go nowhere else.
    """

    def __init__(
        self,
        model: str,
        cache: epath.PathLike,
        *,
        at_once: int = 8,
        per_minute: int = 0,
        retries: int = 6,
        timeout: float = 60.0,
        max_tokens: int = 8,
    ):
        """Raises UserError where there is no key or the openai package is missing.

        Args:
          at_once: requests under way together.
          per_minute: at most so many requests begun a minute; 0: no limit.
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
        self._openai, self._client = openai, openai.OpenAI(max_retries=retries, timeout=timeout)
        self._model, self._cache, self._at_once, self._max_tokens = model, epath.Path(cache), at_once, max_tokens
        self._spacing = 60.0 / per_minute if per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()
        self.usage = Usage()
        self._known = {record["id"]: record["answer"] for record in records.mend(self._cache)}

    def __call__(self, prompts: Sequence[str]) -> list[Verdict]:
        """Raises UserError where the endpoint refuses or cannot be reached; what it had answered is kept."""
        names = [self._name(prompt) for prompt in prompts]
        missing = {name: prompt for name, prompt in zip(names, prompts) if name not in self._known}
        self.usage.cached += len(prompts) - len(missing)
        if missing:
            self._ask(missing)
        return [parse(self._known[name]) for name in names]

    def _name(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self._model, self._max_tokens, prompt]).encode()).hexdigest()[:24]

    def _ask(self, missing: dict[str, str]) -> None:
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        done, failed = 0, None
        with (
            signals.deferred() as signal,
            self._cache.open("a") as file,
            ThreadPoolExecutor(self._at_once) as pool,
            Track(f"judge {self._model}", len(missing)) as track,
        ):
            waiting = {pool.submit(self._one, prompt): name for name, prompt in missing.items()}
            while waiting and failed is None and not signal.requested():
                finished, _ = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in finished:
                    name = waiting.pop(future)
                    if error := future.exception():
                        failed = failed or error
                        continue
                    self._known[name] = future.result()
                    file.write(json.dumps({"id": name, "answer": self._known[name]}, ensure_ascii=False) + "\n")
                    file.flush()
                    done += 1
                    track.update(done, f"{self.usage.prompt + self.usage.completion} tokens")
            for future in waiting:
                future.cancel()
        if failed is not None:
            raise UserError(self._told(failed, done)) from None
        if waiting:
            raise Interrupted(f"stopped by {signal.heard} after {done} of {len(missing)} judgements, which are kept")
        say(f"judge {self._model}: {self.usage.prompt} + {self.usage.completion} tokens in {self.usage.calls} calls")

    def _one(self, prompt: str) -> str:
        if self._spacing:
            with self._lock:
                self._next = max(self._next + self._spacing, time.monotonic())
                pause = self._next - time.monotonic()
            time.sleep(max(pause, 0))
        answer = self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=self._max_tokens,
        )
        if not getattr(answer, "choices", None):
            raise ValueError("an answer without choices")
        with self._lock:
            self.usage.calls += 1
            self.usage.prompt += getattr(answer.usage, "prompt_tokens", 0) or 0
            self.usage.completion += getattr(answer.usage, "completion_tokens", 0) or 0
        return answer.choices[0].message.content or ""

    def _told(self, error: BaseException, done: int) -> str:
        """One line, without what the server may have echoed of the key."""
        openai = self._openai
        kept = f"; {done} answers are kept, and the same command asks for the rest"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"the judge's endpoint refuses the key (OPENAI_API_KEY){kept}"
        if isinstance(error, openai.RateLimitError):
            return f"the judge's endpoint has reached its limit; wait, or lower judge.per_minute{kept}"
        if isinstance(error, openai.APITimeoutError):
            return f"the judge's endpoint does not answer in time{kept}"
        if isinstance(error, openai.APIConnectionError):
            return f"the judge's endpoint cannot be reached; look at OPENAI_BASE_URL{kept}"
        if isinstance(error, openai.APIStatusError):
            return f"the judge's endpoint answers with status {error.status_code} for model {self._model!r}{kept}"
        return f"the judge's endpoint answers with something else than a chat completion ({type(error).__name__}){kept}"
