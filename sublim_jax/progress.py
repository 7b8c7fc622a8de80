"""Progress of long work: a bar on a terminal, plain lines in a pipe, nothing on other hosts."""

import sys
import time
from datetime import timedelta
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """One line for the user, from the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def pace(steps: int, seconds: float) -> str:
    """Steps a second, or where one takes longer than that, seconds a step."""
    if not steps:
        return ""
    return f"{steps / seconds:.1f} steps/s" if steps >= seconds else f"{seconds / steps:.1f} s a step"


class Track:
    """Progress of `total` steps; `update(step, note)` moves it to an absolute step.

    Args:
      brief: for work that usually takes seconds, within other work or many times: prints lines, never a bar, and no
        last line unless an earlier one was printed.
    """

    def __init__(self, what: str, total: int, start: int = 0, *, brief: bool = False):
        self._what, self._total, self._start, self._brief = what, total, start, brief
        self._step = start
        self._began = self._last_printed = time.monotonic()
        self._first: tuple[int, float] | None = None  # the first finished step, and when
        self._bar: Progress | None = None
        self._quiet = jax.process_index() != 0

    def __enter__(self) -> "Track":
        if not self._quiet and not self._brief and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(file=sys.stdout),
            )
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._start, rate="", note="")
            self._bar.start()
        return self

    def update(self, step: int, note: str = "") -> None:
        self._step = step
        now = time.monotonic()
        if self._first is None and step > self._start:
            self._first = step, now
        since, began = self._start, self._began
        if self._first and self._first[0] < step:  # the first step includes compilation
            since, began = self._first
        done, seconds = step - since, max(now - began, 1e-9)
        if self._bar:
            self._bar.update(self._task, completed=step, rate=pace(done, seconds), note=note)
        elif not self._quiet and now - self._last_printed >= SECONDS_BETWEEN_LINES:
            self._last_printed = now
            parts = [f"{self._what}: {step}/{self._total}", pace(done, seconds)]
            if done:
                parts.append(f"{timedelta(seconds=round(seconds / done * (self._total - step)))} left")
            print(", ".join(part for part in (*parts, note) if part), flush=True)

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif not self._quiet and not (self._brief and self._last_printed == self._began):
            seconds = time.monotonic() - self._began
            print(f"{self._what}: {self._step}/{self._total} in {seconds:.1f} s", flush=True)
