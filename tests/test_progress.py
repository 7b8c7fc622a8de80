"""Progress lines in a log."""

import time

import pytest

from sublim_jax import progress


@pytest.mark.parametrize(
    ("start", "step", "seconds", "line"),
    [
        (0, 48, 12.0, "rows: 48/256, 4.0 steps/s, 0:00:52 left, loss 0.5"),
        (10, 12, 88.0, "rows: 12/256, 44.0 s a step, 2:58:56 left, loss 0.5"),  # resumed at 10: 2 steps
        (10, 10, 20.0, "rows: 10/256, loss 0.5"),
    ],
)
def test_lines_of_a_pipe_give_the_pace_and_the_time_left(monkeypatch, capsys, start, step, seconds, line):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.Track("rows", 256, start) as track:
        now[0] += seconds
        track.update(step, "loss 0.5")
        track.update(step + 1, "too soon after the last line")
    assert capsys.readouterr().out.splitlines() == [line, f"rows: {step + 1}/256 in {seconds:.1f} s"]


def test_the_pace_is_counted_from_the_first_step_on(monkeypatch, capsys):
    """The first step includes compilation."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.Track("rows", 100) as track:
        for step, at in ((1, 60.0), (11, 70.0)):
            now[0] = at
            track.update(step)
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first == "rows: 1/100, 60.0 s a step, 1:39:00 left" and second == "rows: 11/100, 1.0 steps/s, 0:01:29 left"


@pytest.mark.parametrize(("seconds", "count"), [(4.0, 0), (30.0, 2)])
def test_brief_work_is_told_only_if_it_takes_long(monkeypatch, capsys, seconds, count):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)  # where other work shows its bar
    with progress.Track("scoring texts", 40, brief=True) as track:
        now[0] = seconds
        track.update(20)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count and all(line.startswith("scoring texts: 20/40") for line in lines)
