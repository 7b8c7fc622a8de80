"""Two processes of one run: where one fails or dies, the other ends as well, and the same command goes on."""

import json

import numpy as np
from launch_kit import finish, run_here, start, start_two, wait_for

MNIST = ("--config=configs/mnist.py:smoke", "--config.arms=auxiliary")
LONG = (*MNIST, "--config.teacher.epochs=400")


def last(output):
    return output.strip().splitlines()[-1]


def test_what_one_process_fails_with_ends_both_with_that_line(tmp_path, mnist_folder):
    """The first finds another run at work in the folder, and the second waits for it."""
    other = start(*LONG, f"--workdir={tmp_path}")
    assert wait_for(other, tmp_path, "checkpoints/teacher*.training/*")
    try:
        for process in start_two(*LONG, f"--workdir={tmp_path}"):
            output = finish(process, 2)
            assert f"another run is at work in {tmp_path}" in last(output) and "Traceback" not in output
    finally:
        other.kill()
        other.communicate()


def test_a_process_that_is_killed_ends_the_other_and_both_go_on(tmp_path, mnist_folder):
    one, two = tmp_path / "one", tmp_path / "two"
    both = start_two(*LONG, f"--workdir={two}")
    assert wait_for(both[0], two, "checkpoints/teacher*.training/*")
    both[1].kill()
    output, _ = both[0].communicate()
    assert both[0].returncode == 1 and "another process of this run has ended" in last(output)
    assert "Traceback" not in output
    both[1].communicate()
    for process in start_two(*MNIST, f"--workdir={two}", "--update"):
        finish(process)
    assert run_here(*MNIST, f"--workdir={one}").returncode == 0
    found, expected = (json.loads((work / "results.json").read_text())["arms"] for work in (two, one))
    for arm, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(arm["runs"], other["runs"], atol=2e-3, err_msg=arm["name"])
