"""The GPU scripts on a machine without a GPU: they report what is missing, and the other parts still run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import accelerator_report

ROOT = Path(__file__).parents[1]


def script(*args, **env):
    """Runs a script of bench/."""
    command = ["bash", *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable, **env}, capture_output=True, text=True
    )


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_without_a_gpu_every_part_has_a_row_that_says_so(tmp_path):
    result = script("bench/accelerator.sh", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = (tmp_path / "summary.md").read_text().splitlines()
    for part in accelerator_report.PARTS:
        assert any(row.startswith(f"| {part} | no GPU on this machine |") for row in rows)
    assert len(list(tmp_path.iterdir())) <= 8
    study = script("bench/study.sh", tmp_path, 60)
    assert study.returncode == 1 and "no GPU on this machine; --tiny" in study.stdout


@pytest.mark.parametrize(
    "args, words",
    [
        (["bench/accelerator.sh"], "usage: bash bench/accelerator.sh OUT"),
        (["bench/accelerator.sh", "OUT", "--small"], "--small is not --tiny"),
        (["bench/study.sh", "OUT", "ten"], "SECONDS=ten is not a whole number"),
        (["bench/carry.sh", "DIR", "--half=3"], "--half=3 is neither --half=1 nor --half=2"),
    ],
)
def test_wrong_arguments_are_one_line_and_nothing_is_made(args, words):
    result = script(*args)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (ROOT / "OUT").exists() and not (ROOT / "DIR").exists()


def test_what_was_measured_until_a_part_was_stopped_is_in_the_summary(tmp_path):
    """A part that was stopped, one with a failed row, one that never ran; ratios where both sides have a value."""
    (tmp_path / "status.tsv").write_text("mnist\t110\tstopped after 110 s\nsmall\t90\tdone\n")
    arms = {"teacher": [0.943, 0.001]}
    mnist = [
        {"what": "MNIST, 100 runs, first time", "seconds": 40.0, "share": 0.07, "of": "float32 FLOP/s", "arms": arms}
    ]
    small = [
        {"what": "LoRA step", "seconds": 0.25, "tokens_per_second": 65536.0, "share": 0.412, "of": "FLOP/s"},
        {"what": "8 students, in turn", "seconds": 0.4},
        {"what": "the same in one program", "seconds": 0.1},
        {"what": "full step", "failed": "too little memory (RESOURCE_EXHAUSTED: 70 GB)"},
    ]
    for part, rows in {"mnist": mnist, "small": small}.items():
        about = {"part": part, "date": "2026-11-28", "device": "NVIDIA H200", "versions": {"jax": "0.11.2"}}
        (tmp_path / f"{part}.json").write_text(json.dumps({**about, "rows": rows}))
    text = accelerator_report.summary(tmp_path)
    assert len(accelerator_report.read(tmp_path)) == 2
    assert "| mnist | stopped after 110 s | 110 | 1 |" in text and "| generate | not run |  |  |" in text
    assert "| LoRA step | 250.00 ms | 65,536 tokens/s | 41.2% of FLOP/s |" in text
    assert "| full step | not measured | too little memory (RESOURCE_EXHAUSTED: 70 GB) |  |" in text
    assert "- 1.5B: 8 students in one program / in turn: **0.25**" in text


def test_docs_are_not_written_from_a_tiny_run(tmp_path):
    (tmp_path / "small.json").write_text(json.dumps({"part": "small", "date": "2026-11-28", "tiny": True, "rows": []}))
    with pytest.raises(SystemExit, match="was measured with --tiny"):
        accelerator_report.write(tmp_path)
    with pytest.raises(SystemExit, match="has no part's JSON"):
        accelerator_report.write(tmp_path / "nowhere")
