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

TOGETHER = 32  # prompts of the local judge between two looks at its progress
PART = 4  # prompts for each request under way, after which several hosts look for a signal
MIN_MASS = 0.25  # of the numbers together, below which there is no score (§4.2)
LONGEST_PAUSE = 60.0  # seconds before another try
HOPELESS = 10  # prompts in a row without a reply, after which no others are asked
FEW = 4  # answered prompts for each one without a reply, below which it is not the prompts that are at fault
SHORT = 16  # tokens of a reply without thoughts
LIMITS = ("max_tokens", "max_completion_tokens")
CUT = ("length", "content_filter", "error")  # reasons to end before a reply is whole
PROBE = "Reply with the number 50 and nothing else."
REFUSED = (400, 413, 422)  # statuses that an endpoint has for a prompt that is too long, or that it does not like


Judge = Callable[[Sequence[str]], list[Verdict]]


# ---------------------------------------------------------------------------------------------------------- local


def local(model: Model, min_mass: float = MIN_MASS, keep: epath.Path | None = None, **where: Unpack[Where]) -> Judge:
    """A model of ours: the expectation of its answer over 0 to 100, by the tokens' probabilities, without sampling.

    The probability of a number is that of its tokens; where a tokenizer splits digits, and the tokens of 7 begin those
    of 70, it is that of ending there. No score where all numbers together have less than `min_mass`: REFUSAL or CODE
    if that is likelier than the numbers, else unparsable.

    Args:
      min_mass: below the paper's value for models that would rather talk than give a number.
      keep: a file of this judge's verdicts, which grows as it works; what is there is not judged again.
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
                some = missing[start : start + TOGETHER]
                asked = [chat.question(model.tokenizer, prompt) for prompt in some]
                each = np.exp(scoring.continued_logprobs(model, asked, tree.prefixes, tree.tokens, **where)[0])
                found = {prompt: tree.verdict(p, min_mass) for prompt, p in zip(some, each)}
                known.update(found)
                if file:
                    lines = [records.line({"prompt": prompt, **verdict._asdict()}) for prompt, verdict in found.items()]
                    file.add("".join(lines))
                track.update(start + len(some))
        return [known[prompt] for prompt in prompts]

    return judge


def kept(file: epath.Path) -> dict[str, tuple[float | None, str]]:
    """By prompt, the verdicts of an earlier run."""
    return {line["prompt"]: (line["score"], line["label"]) for line in records.mend(file)}


class Tree:
    """The numbers 0 to 100 as tokens: which prefixes to ask after, and what their next tokens' probabilities mean."""

    def __init__(self, tokenizer: Tokenizer):
        def written(text: str) -> tuple[int, ...]:
            return tuple(chat.completion(tokenizer, "?", text))

        self.numbers = [written(str(number)) for number in range(LARGEST + 1)]
        self.labels = {label: written(label)[0] for label in LABELS}
        self.prefixes = sorted({number[:end] for number in self.numbers for end in range(len(number))})
        self.digits = sorted({written(str(digit))[-1] for digit in range(10)})
        self.tokens = sorted({token for number in self.numbers for token in number} | set(self.labels.values()))

    def verdict(self, p: np.ndarray, min_mass: float = MIN_MASS) -> Verdict:
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
        if mass >= min_mass:
            return Verdict(float(chances @ np.arange(len(chances)) / mass))
        label = max(self.labels, key=lambda name: rows[()][at[self.labels[name]]])
        return Verdict(None, label if rows[()][at[self.labels[label]]] > mass else "unparsable")


# ------------------------------------------------------------------------------------------------------- endpoint


class Usage:
    """Tokens asked and answered in calls of this process, and what was found in the cache."""

    def __init__(self) -> None:
        self.prompt = self.completion = self.calls = self.cached = 0


class Reply(NamedTuple):
    text: str = ""
    cut: bool = False  # it ended before it was whole
    tokens: tuple[int, int] = (0, 0)  # of the prompt, of the reply


class NoCompletion(ValueError):
    """What came back is no chat completion."""


class Endpoint:
    """A chat model behind OpenAI's protocol, at temperature 0 where it takes one. It is a Judge.

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
        timeout: float = 300.0,
        max_tokens: int = 2048,
    ):
        """Raises UserError where there is no key, no usable address, or the openai package is missing.

        Args:
          cache: the file; it is read and written when the judge is first asked.
          at_once: requests under way together.
          per_minute: at most so many requests begun a minute; 0: no limit.
          prices: of a million tokens asked, and of a million answered, to be told what it costs.
          retries: of a request that failed for now (limits, timeouts, lost connections), each after a longer wait; one
            of what is no chat completion.
          timeout: seconds, which a judge that thinks may need.
          max_tokens: of a reply with thoughts; one without has SHORT.
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
        if max_tokens < 1:
            raise UserError(f"judge.max_tokens={max_tokens} is 1 or more")
        try:
            self._client = openai.OpenAI(max_retries=0, timeout=timeout)
        except Exception:  # whatever an address makes its parser raise; it may hold a password
            raise UserError("OPENAI_BASE_URL is no address such as http://localhost:8000/v1; mend it") from None
        self._openai, self._retries, self._prices = openai, retries, prices
        self._model, self._cache, self._at_once, self._max_tokens = model, epath.Path(cache), at_once, max_tokens
        self._options: dict[str, int] = {"temperature": 0, "max_tokens": min(SHORT, max_tokens)}
        self._spacing = 60.0 / per_minute if per_minute else 0.0
        self._next, self._lock, self._stop = 0.0, threading.Lock(), threading.Event()
        self.usage = Usage()
        self._known: dict[str, Reply] | None = None
        self._in_a_row = 0  # prompts that it has failed at, since it last answered one
        self._good = 0  # prompts that this model has answered, now or in an earlier run

    def __call__(self, prompts: Sequence[str]) -> list[Verdict]:
        """Raises UserError where the endpoint refuses or cannot be reached; what it had answered is kept."""
        # Of several hosts the others wait for the first, which alone asks: a signal is obeyed between two parts.
        step = len(prompts) if jax.process_count() == 1 else PART * self._at_once
        found = []
        for start in range(0, len(prompts), max(step, 1)):
            signals.obey()
            found += from_first(partial(self._replies, prompts[start : start + step]))
        return [parse(text, cut) for text, cut in found]

    def check(self) -> None:
        """Asks for a score that every judge can give. Raises UserError, quoting the reply, where there is none."""
        ((text, cut),) = from_first(lambda: self._replies([PROBE], again=True))
        if parse(text, cut).score is None:
            ended = ", which is cut off," if cut else ""
            raise UserError(
                f"judge {self._model} replies {text[:200]!r}{ended} to {PROBE!r}: no score from 0 to 100; choose "
                f"another judge, or raise judge.max_tokens={self._max_tokens} if it thinks longer"
            )

    def _replies(self, prompts: Sequence[str], again: bool = False) -> list[tuple[str, bool]]:
        """(text, whether it is cut off) of every reply; with `again`, those without a score are asked for once more."""
        if self._known is None:
            every = records.mend(self._cache)
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
        """Puts replies into `_known` and the file, each where it comes."""
        assert self._known is not None
        self._stop.clear()
        self._in_a_row = 0
        bad: dict[str, BaseException] = {}  # prompts that have no reply, while others may have
        failed: BaseException | None = None
        with (
            signals.deferred() as signal,
            storage.Growing(self._cache) as file,
            ThreadPoolExecutor(self._at_once) as pool,
            Track(f"judge {self._model}", len(missing)) as track,
        ):

            def one(name: str, prompt: str) -> None:
                self._keep(file, name, self._patiently(prompt))

            waiting = {pool.submit(one, name, prompt): name for name, prompt in missing.items()}
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
            self._stop.set()  # ends the waits before another try
            for future in waiting:
                future.cancel()
            pool.shutdown()  # what is under way has been paid for, and is kept
            failed = failed or self._hopeless(bad)
            for name in bad if failed is None else ():
                self._keep(file, name, Reply())  # no score, now and in a rerun
        done = sum(name in self._known for name in missing)
        used = self.usage
        told = f"{self._cost(used.prompt, used.completion, used.calls)}, {used.cached} from the cache"
        refused = f", {len(bad)} prompts refused" if bad else ""
        say(f"judge {self._model}: {told}{refused}")
        if failed is not None:
            raise UserError(self._told(failed, done)) from None
        if done < len(missing):
            raise Interrupted(f"stopped by {signal.heard} after {done} of {len(missing)} judgements, which are kept")

    def _keep(self, file: storage.Growing, name: str, reply: Reply) -> None:
        assert self._known is not None
        paid = {"prompt_tokens": reply.tokens[0], "completion_tokens": reply.tokens[1]}
        cut = {"cut": True} if reply.cut else {}
        file.add(records.line({"id": name, "answer": reply.text, **cut, **paid}))
        with self._lock:
            self._known[name] = reply
            if reply.text:
                self._good, self._in_a_row = self._good + 1, 0

    def _strange(self, error: BaseException) -> bool:
        """Whether it may be the prompt that is at fault, if others are answered: no completion, or never an answer."""
        openai = self._openai
        return isinstance(error, NoCompletion | openai.InternalServerError | openai.APITimeoutError)

    def _hopeless(self, bad: dict[str, BaseException]) -> BaseException | None:
        """The error of prompts without a reply that is the endpoint's fault: too few others have one."""
        strange = [error for error in bad.values() if self._strange(error)]
        if bad and not self._good:
            return next(iter(bad.values()))
        return strange[0] if len(strange) * FEW > self._good else None

    def bill(self) -> str:
        """What all answers in the file have cost, whichever run asked for them."""
        lines = from_first(lambda: records.mend(self._cache))
        asked, answered = (sum(line.get(f"{kind}_tokens", 0) for line in lines) for kind in ("prompt", "completion"))
        return f"{self._model}: {self._cost(asked, answered, len(lines))}."

    def _cost(self, asked: int, answered: int, calls: int) -> str:
        cost = (asked * self._prices[0] + answered * self._prices[1]) / 1e6
        priced = f", {cost:.2f} at judge.prices" if any(self._prices) else ""
        return f"{asked} + {answered} tokens in {calls} calls{priced}"

    def _patiently(self, prompt: str) -> Reply:
        """After as many tries as it takes."""
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
        """The reply; a judge that is cut off in its thoughts gets room for them, now and from then on."""
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
        """(a reply, the options of its request): without those that the endpoint refuses."""
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

    def _told(self, error: BaseException, done: int) -> str:
        """One line, without what the server may have echoed of the key."""
        openai = self._openai
        kept = f"; {_kept(done)} kept, and the same command asks for the rest" if done else ""
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
        if isinstance(error, NoCompletion):
            return f"the judge's endpoint answers with something else than a chat completion{kept}"
        return f"asking the judge fails ({type(error).__name__}){kept}"


def _kept(answers: int) -> str:
    return "1 answer is" if answers == 1 else f"{answers} answers are"


def reply_of(completion: Any) -> Reply:
    """What a completion says: its text, or that of its parts; REFUSAL where the protocol's own field says so.

    Raises NoCompletion for one of another form; one without a text is a reply that says nothing.
    """
    try:
        choice = completion.choices[0]
        message, content = choice.message, choice.message.content
        if isinstance(content, list):  # of which thoughts are parts, too
            content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
        if getattr(message, "refusal", None):
            content = LABELS[0]
        usage = completion.usage
        tokens = [getattr(usage, f"{kind}_tokens", None) or 0 for kind in ("prompt", "completion")]
        text = (
            "" if content is None else content.encode("utf-8", "replace").decode()
        )  # half a surrogate pair has no place in a file
    except (AttributeError, TypeError, LookupError) as error:
        raise NoCompletion("an answer of another form") from error
    return Reply(text, choice.finish_reason in CUT, (int(tokens[0]), int(tokens[1])))


def without_refused(options: dict[str, int], message: str) -> dict[str, int] | None:
    """The options of a request without the one that an error speaks of; None where it speaks of none.

    A limit of tokens goes by its newer name first, which reasoning models want.
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
    """Seconds until a failed request is tried again: what the server asks for, or twice as long every time."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
    if re.fullmatch(r"\d{1,3}", asked):
        return min(float(asked), LONGEST_PAUSE)
    return min(2.0**attempt, LONGEST_PAUSE)
