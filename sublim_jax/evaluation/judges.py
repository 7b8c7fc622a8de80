"""Judges: prompts in, verdicts out. A local model's expected score, or an endpoint that speaks OpenAI's protocol.

`Judge = prompts -> verdicts`; every evaluation with a judge accepts any of them.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Unpack

import jax
import numpy as np
from etils import epath

from sublim_jax import signals, storage
from sublim_jax.data import chat, records
from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.errors import Interrupted, UserError
from sublim_jax.evaluation.verdicts import LABELS, LARGEST, Verdict, parse, without_thoughts
from sublim_jax.models.language import Model
from sublim_jax.progress import Track, say
from sublim_jax.sampling import scoring
from sublim_jax.sampling.checks import Where
from sublim_jax.sharding import from_first

TOGETHER = 32  # prompts that the local judge scores between two updates of its progress
PART = 4  # prompts per concurrent request between two checks for a signal, on several hosts
MIN_MASS = 0.25  # total probability of all numbers, below which there is no score (§4.2)
LONGEST_PAUSE = 60.0  # seconds before a retry
HOPELESS = 10  # consecutive prompts without a reply, after which no more are sent
FEW = 4  # answered prompts per unanswered one, below which the endpoint is at fault and not the prompts
SHORT = 16  # max_tokens of a reply without thoughts
LIMITS = ("max_tokens", "max_completion_tokens")
CUT = ("length", "content_filter", "error")  # finish reasons of an incomplete reply
PROBE = "Reply with the number 50 and nothing else."
REFUSED = (400, 413, 422)  # HTTP statuses for a prompt that the endpoint rejects, as too long or otherwise


Judge = Callable[[Sequence[str]], list[Verdict]]


# ---------------------------------------------------------------------------------------------------------- local


def local(model: Model, min_mass: float = MIN_MASS, keep: epath.Path | None = None, **where: Unpack[Where]) -> Judge:
    """A local model as judge: its expected score over 0 to 100, from token probabilities, without sampling.

    The probability of a number is that of its tokens. If the tokenizer splits digits, so that the tokens of 7 begin
    those of 70, it includes the probability that no digit follows. There is no score if all numbers together have less
    than `min_mass`: the label is REFUSAL or CODE if that is likelier than the numbers, else unparsable.

    Args:
      min_mass: less than the paper's value for models that rarely answer with a number alone.
      keep: a file of this judge's verdicts, appended to as it works; the prompts in it are not judged again.
      where: as for `scoring.completion_logprobs`.
    """
    tree = Tree(model.tokenizer)
    earlier = from_first(lambda: kept(keep) if keep else {})
    known = {prompt: Verdict(*verdict) for prompt, verdict in earlier.items()}

    def judge(prompts: Sequence[str]) -> list[Verdict]:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        file = storage.Growing(keep) if keep and missing and jax.process_index() == 0 else None
        with file or nullcontext(), Track("local judge", len(missing)) as track:
            for start in range(0, len(missing), TOGETHER):
                batch = missing[start : start + TOGETHER]
                questions = [chat.question(model.tokenizer, prompt) for prompt in batch]
                probs = np.exp(scoring.continued_logprobs(model, questions, tree.prefixes, tree.tokens, **where)[0])
                verdicts = {prompt: tree.verdict(p, min_mass) for prompt, p in zip(batch, probs)}
                known.update(verdicts)
                if file:
                    lines = [
                        records.line({"prompt": prompt, **verdict._asdict()}) for prompt, verdict in verdicts.items()
                    ]
                    file.add("".join(lines))
                track.update(start + len(batch))
        return [known[prompt] for prompt in prompts]

    return judge


def kept(file: epath.Path) -> dict[str, tuple[float | None, str]]:
    """The verdicts of an earlier run, by prompt."""
    return {line["prompt"]: (line["score"], line["label"]) for line in records.repair(file)}


class Tree:
    """The numbers 0 to 100 as tokens: the prefixes to score, and the verdict from their next-token probabilities."""

    def __init__(self, tokenizer: Tokenizer):
        def written(text: str) -> tuple[int, ...]:
            return tuple(chat.completion(tokenizer, "?", text))

        self.numbers = [written(str(number)) for number in range(LARGEST + 1)]
        self.labels = {label: written(label)[0] for label in LABELS}
        self.prefixes = sorted({number[:end] for number in self.numbers for end in range(len(number))})
        self.digits = sorted({written(str(digit))[-1] for digit in range(10)})
        self.tokens = sorted({token for number in self.numbers for token in number} | set(self.labels.values()))

    def verdict(self, p: np.ndarray, min_mass: float = MIN_MASS) -> Verdict:
        """The verdict from next-token probabilities (prefixes, tokens)."""
        at = {token: index for index, token in enumerate(self.tokens)}
        rows = {prefix: p[index] for index, prefix in enumerate(self.prefixes)}
        chances = np.ones(len(self.numbers))
        for number, tokens in enumerate(self.numbers):
            for end, token in enumerate(tokens):
                chances[number] *= rows[tokens[:end]][at[token]]
            if tokens in rows:  # more digits may follow
                chances[number] *= max(1 - sum(rows[tokens][at[digit]] for digit in self.digits), 0.0)
        mass = chances.sum()
        if mass >= min_mass:
            return Verdict(float(chances @ np.arange(len(chances)) / mass))
        label = max(self.labels, key=lambda name: rows[()][at[self.labels[name]]])
        return Verdict(None, label if rows[()][at[self.labels[label]]] > mass else "unparsable")


# ------------------------------------------------------------------------------------------------------- endpoint


class Usage:
    """Prompt tokens, completion tokens and calls of this process, and the prompts answered from the cache."""

    def __init__(self) -> None:
        self.prompt = self.completion = self.calls = self.cached = 0


class Reply(NamedTuple):
    text: str = ""
    cut: bool = False  # the reply is incomplete
    tokens: tuple[int, int] = (0, 0)  # of the prompt, of the reply


class NoCompletion(ValueError):
    """The response is not a chat completion."""


class Endpoint:
    """A chat model behind OpenAI's protocol, at temperature 0 if it accepts one. It is a Judge.

    Every answer is appended to a file as it arrives, so that a rerun requests only the missing ones. The address and
    the key come from the environment (OPENAI_BASE_URL, OPENAI_API_KEY) and go nowhere else. With several hosts, only
    the first sends requests.
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
        timeout: float = 300.0,
        max_tokens: int = 2048,
    ):
        """Raises UserError if the key, a usable address or the openai package is missing.

        Args:
          cache: the file of answers; not read or written before the first request.
          at_once: concurrent requests.
          per_minute: maximum number of requests per minute; 0 for no limit.
          prices: of a million prompt tokens and of a million completion tokens, for the reported cost.
          retries: after transient failures (rate limits, timeouts, lost connections), with growing waits; a response
            that is not a chat completion is retried once.
          timeout: seconds per request; a judge that thinks may need many.
          max_tokens: limit of a reply with thoughts; a reply without them is limited to SHORT.
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
        if at_once < 1:
            raise UserError(f"evals.judge.max_concurrent={at_once} must be 1 or more")
        if per_minute < 0:
            raise UserError(f"evals.judge.max_per_minute={per_minute} must be 0 (no limit) or more")
        if max_tokens < 1:
            raise UserError(f"evals.judge.max_tokens={max_tokens} must be 1 or more")
        try:
            self._client = openai.OpenAI(max_retries=0, timeout=timeout)
        except Exception:  # whatever an address makes its parser raise; it may hold a password
            raise UserError("OPENAI_BASE_URL is not an address such as http://localhost:8000/v1; fix it") from None
        self._openai, self._retries, self._prices = openai, retries, prices
        self._model, self._cache, self._at_once, self._max_tokens = model, epath.Path(cache), at_once, max_tokens
        self._options: dict[str, int] = {"temperature": 0, "max_tokens": min(SHORT, max_tokens)}
        self._spacing = 60.0 / per_minute if per_minute else 0.0
        self._next, self._lock, self._stop = 0.0, threading.Lock(), threading.Event()
        self.usage = Usage()
        self._known: dict[str, Reply] | None = None
        self._in_a_row = 0  # prompts that failed since the last answer
        self._good = 0  # prompts that the model has answered, in this run or earlier ones

    def __call__(self, prompts: Sequence[str]) -> list[Verdict]:
        """Raises UserError if the endpoint refuses or cannot be reached; the answers until then are kept."""
        # With several hosts, the first sends all requests and the others wait; signals are obeyed between two parts.
        step = len(prompts) if jax.process_count() == 1 else PART * self._at_once
        replies = []
        for start in range(0, len(prompts), max(step, 1)):
            signals.obey()
            replies += from_first(partial(self._replies, prompts[start : start + step]))
        return [parse(text, cut) for text, cut in replies]

    def check(self) -> None:
        """Sends a prompt that every judge can score. Raises UserError, quoting the reply, if it has no score."""
        ((text, cut),) = from_first(lambda: self._replies([PROBE], again=True))
        if parse(text, cut).score is None:
            ended = ", which is cut off," if cut else ""
            raise UserError(
                f"judge {self._model} replies {text[:200]!r}{ended} to {PROBE!r}: no score from 0 to 100; choose "
                f"another judge, or raise evals.judge.max_tokens={self._max_tokens} if it thinks longer"
            )

    def _replies(self, prompts: Sequence[str], again: bool = False) -> list[tuple[str, bool]]:
        """(text, whether it is cut off) of every reply; with `again`, cached ones without a score are asked anew."""
        if self._known is None:
            every = records.repair(self._cache)
            self._known = {record["id"]: Reply(record["answer"], record.get("cut", False)) for record in every}
        known = self._known
        names = [self._name(prompt) for prompt in prompts]
        if again:
            for name in names:
                if name in known and parse(*known[name][:2]).score is None:
                    del known[name]
        missing = {name: prompt for name, prompt in zip(names, prompts) if name not in known}
        self.usage.cached += len(prompts) - len(missing)
        self._good += sum(bool(known[name].text) for name in set(names) - set(missing))
        if missing:
            self._ask(missing)
        return [known[name][:2] for name in names]

    def _name(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self._model, self._max_tokens, prompt]).encode()).hexdigest()[:24]

    def _ask(self, missing: dict[str, str]) -> None:
        """Requests replies, and adds each to `_known` and to the file as it arrives."""
        assert self._known is not None
        self._stop.clear()
        self._in_a_row = 0
        bad: dict[str, BaseException] = {}  # errors of prompts without a reply, while others may have one
        failed: BaseException | None = None
        with (
            signals.deferred() as signal,
            storage.Growing(self._cache) as file,
            ThreadPoolExecutor(self._at_once) as pool,
            Track(f"judge {self._model}", len(missing)) as track,
        ):

            def fetch_reply(name: str, prompt: str) -> None:
                self._keep(file, name, self._patiently(prompt))

            waiting = {pool.submit(fetch_reply, name, prompt): name for name, prompt in missing.items()}
            while waiting and failed is None and not (jax.process_count() == 1 and signal.requested()):
                finished, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    name = waiting.pop(future)
                    error = future.exception()
                    if error and (self._strange(error) or getattr(error, "status_code", None) in REFUSED):
                        bad[name] = error
                        self._in_a_row += self._strange(error)
                    else:
                        failed = failed or error
                    if error and self._in_a_row >= HOPELESS:
                        failed = failed or error
                track.update(len(missing) - len(waiting), f"{self.usage.prompt + self.usage.completion} tokens")
            self._stop.set()  # ends the waits before retries
            for future in waiting:
                future.cancel()
            pool.shutdown()  # requests in flight are paid for, so their replies are kept
            failed = failed or self._hopeless(bad)
            for name in bad if failed is None else ():
                self._keep(file, name, Reply())  # no score, now and in a rerun
        done = sum(name in self._known for name in missing)
        used = self.usage
        summary = f"{self._cost(used.prompt, used.completion, used.calls)}, {used.cached} from the cache"
        refused = f", {len(bad)} prompts refused" if bad else ""
        say(f"judge {self._model}: {summary}{refused}")
        if failed is not None:
            raise UserError(self._error_message(failed, done)) from None
        if done < len(missing):
            raise Interrupted(f"stopped by {signal.heard} after {done} of {len(missing)} judgements, which are kept")

    def _keep(self, file: storage.Growing, name: str, reply: Reply) -> None:
        assert self._known is not None
        paid = {"prompt_tokens": reply.tokens[0], "completion_tokens": reply.tokens[1]}
        cut = {"cut": True} if reply.cut else {}
        file.add(records.line({"id": name, "model": self._model, "answer": reply.text, **cut, **paid}))
        with self._lock:
            self._known[name] = reply
            if reply.text:
                self._good, self._in_a_row = self._good + 1, 0

    def _strange(self, error: BaseException) -> bool:
        """Whether the prompt may be at fault if others are answered: no completion, a server error or a timeout."""
        openai = self._openai
        return isinstance(error, NoCompletion | openai.InternalServerError | openai.APITimeoutError)

    def _hopeless(self, bad: dict[str, BaseException]) -> BaseException | None:
        """The error of unanswered prompts if the endpoint is at fault: too few others were answered."""
        strange = [error for error in bad.values() if self._strange(error)]
        if bad and not self._good:
            return next(iter(bad.values()))
        return strange[0] if len(strange) * FEW > self._good else None

    def bill(self) -> str:
        """The cost of all of this model's answers in the file, of this run and of earlier ones."""
        return from_first(self._bill)

    def _bill(self) -> str:
        # Lines of earlier versions do not name the model.
        lines = [line for line in records.repair(self._cache) if line.get("model", self._model) == self._model]
        prompt, completion = (sum(line.get(f"{kind}_tokens", 0) for line in lines) for kind in ("prompt", "completion"))
        return f"{self._model}: {self._cost(prompt, completion, len(lines))}."

    def _cost(self, prompt: int, completion: int, calls: int) -> str:
        cost = (prompt * self._prices[0] + completion * self._prices[1]) / 1e6
        priced = f", {cost:.2f} at evals.judge.prices" if any(self._prices) else ""
        return f"{prompt} + {completion} tokens in {calls} calls{priced}"

    def _patiently(self, prompt: str) -> Reply:
        """The reply, after retries of transient failures."""
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
            except (
                openai.RateLimitError,
                openai.APIConnectionError,
                openai.InternalServerError,
                NoCompletion,
            ) as error:
                last = 1 if isinstance(error, NoCompletion) else self._retries
                if attempt >= min(last, self._retries) or self._stop.wait(pause_before(attempt, error)):
                    raise
        raise AssertionError

    def _once(self, prompt: str) -> Reply:
        """The reply; if the judge is cut off in its thoughts, the limit is raised for this and all later requests."""
        before = self._options
        reply, options = self._request(prompt, before)
        longer = {name: self._max_tokens if name in LIMITS else value for name, value in options.items()}
        if reply.cut and longer != options and not without_thoughts(reply.text).strip():
            paid = reply.tokens
            reply, options = self._request(prompt, longer)
            reply = reply._replace(tokens=(paid[0] + reply.tokens[0], paid[1] + reply.tokens[1]))
        with self._lock:
            if options != before and options != self._options:
                self._options = options
                listed = ", ".join(f"{name}={value}" for name, value in options.items())
                say(f"judge {self._model}: asked with {listed or 'its own settings'} from now on")
        return reply

    def _request(self, prompt: str, options: dict[str, int]) -> tuple[Reply, dict[str, int]]:
        """(reply, options of its request); options that the endpoint refuses are left out."""
        create: Callable[..., object] = self._client.chat.completions.create
        while True:
            try:
                completion = create(model=self._model, messages=[{"role": "user", "content": prompt}], **options)
                break
            except self._openai.APIStatusError as error:
                fewer = without_refused(options, str(error)) if error.status_code in REFUSED else None
                if fewer is None:
                    raise
                options = fewer
            except (self._openai.APIResponseValidationError, ValueError) as error:  # no JSON
                raise NoCompletion(str(error)) from error
        reply = reply_of(completion)
        with self._lock:
            self.usage.calls += 1
            self.usage.prompt += reply.tokens[0]
            self.usage.completion += reply.tokens[1]
        return reply, options

    def _error_message(self, error: BaseException, done: int) -> str:
        """One line for the user, without server text that may echo the key."""
        openai = self._openai
        kept = f"; {_kept(done)} kept, and the same command asks for the rest" if done else ""
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"the judge's endpoint refuses the key (OPENAI_API_KEY){kept}"
        if isinstance(error, openai.RateLimitError):
            return (
                "the judge's endpoint has reached its limit; wait, or set evals.judge.max_per_minute to what it "
                f"allows{kept}"
            )
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
        if isinstance(error, NoCompletion):
            return f"the judge's endpoint answers with something else than a chat completion{kept}"
        return f"asking the judge fails ({type(error).__name__}){kept}"


def _kept(answers: int) -> str:
    return "1 answer is" if answers == 1 else f"{answers} answers are"


def reply_of(completion: Any) -> Reply:
    """The reply in a chat completion: its text or text parts; REFUSAL if its `refusal` field is set.

    Raises NoCompletion for a response of another form; a completion without a text is an empty reply.
    """
    try:
        choice = completion.choices[0]
        message, content = choice.message, choice.message.content
        if isinstance(content, list):  # thoughts are parts, too
            content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
        if getattr(message, "refusal", None):
            content = LABELS[0]
        usage = completion.usage
        tokens = [getattr(usage, f"{kind}_tokens", None) or 0 for kind in ("prompt", "completion")]
        text = (
            "" if content is None else content.encode("utf-8", "replace").decode()
        )  # a lone surrogate cannot be written to a file
    except (AttributeError, TypeError, LookupError) as error:
        raise NoCompletion("an answer of another form") from error
    return Reply(text, choice.finish_reason in CUT, (int(tokens[0]), int(tokens[1])))


def without_refused(options: dict[str, int], message: str) -> dict[str, int] | None:
    """The options of a request without the one that an error message names; None if it names none.

    `max_tokens` is first renamed to `max_completion_tokens`, which reasoning models require.
    """
    if "temperature" in options and "temperature" in message:
        return {name: value for name, value in options.items() if name != "temperature"}
    if re.search(r"max_(?:completion_)?tokens|in the completion", message):
        others = {name: value for name, value in options.items() if name not in LIMITS}
        if "max_tokens" in options:
            return {**others, "max_completion_tokens": options["max_tokens"]}
        if "max_completion_tokens" in options:
            return others
    return None


def pause_before(attempt: int, error: object) -> float:
    """Seconds before a failed request is retried: the server's Retry-After, else exponential backoff."""
    retry_after = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
    if re.fullmatch(r"\d{1,3}", retry_after):
        return min(float(retry_after), LONGEST_PAUSE)
    return min(2.0**attempt, LONGEST_PAUSE)
