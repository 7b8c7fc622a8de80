"""`--describe`: every value of every config is listed with the comment of its source."""

import importlib
from pathlib import Path

import pytest

from sublim_jax import describe, overrides

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py"))


def rows(name):
    with describe.traced() as origins:
        config = overrides.load(name)
    return config, describe.rows(config, overrides.load(name), origins)


@pytest.mark.parametrize(
    "file, preset",
    [(file, preset) for file in CONFIGS for preset in importlib.import_module(f"configs.{file}").PRESETS],
)
def test_every_value_has_a_meaning(file, preset):
    _, entries = rows(f"configs/{file}.py:{preset}")
    groups = {row.path for row in entries if row.meaning and not row.value}

    def is_about_all(group):
        return group in groups and not any(row.meaning for row in entries if row.path.startswith(f"{group}."))

    assert [row.path for row in entries if not row.meaning and not is_about_all(row.path.rpartition(".")[0])] == []


@pytest.mark.parametrize("file", CONFIGS)
def test_every_value_and_preset_is_listed_once_in_lines_that_fit(file, command):
    config, entries = rows(f"configs/{file}.py")
    paths = [row.path for row in entries]
    assert len(set(paths)) == len(paths)
    for key in overrides.keys(config):
        name = key.split(".")[-1]
        alike = any(path.endswith(f".NAME.{name}") for path in paths) or f".changes.{name}" in key
        assert key in paths or alike or name in ("experiment", "preset"), key
    code, text, _ = command(f"--config=configs/{file}.py", "--describe")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 120
    for preset in overrides.module(f"configs/{file}.py").PRESETS:
        assert f"\n  {preset} " in text
    assert text.count("(this one)") == 1


def test_a_value_of_this_run_stands_beside_the_presets(command):
    typed = ["--config.runs=3", "--config.teacher.learning_rate=1e-2", "--config.arm.tokens.noise=0.5"]
    code, text, _ = command("--config=configs/numbers.py:smollm2", *typed, "--describe")
    assert code == 0
    text = " ".join(text.split())
    assert "runs 3 (preset: 5) whole replicates" in text
    assert "learning_rate 0.01 (preset: 0.0003)" in text
    assert "noise=0.5 (preset: 0.0)" in text


CONFIG = '''"""My study."""
from ml_collections import ConfigDict

def fresh():
    values = ConfigDict()
    values.rate = 0.1  # of what
    return values

def get_config():
    config = ConfigDict()
    config.experiment = "mnist"
    # First line,
    # second line.
    config.both = (
        1,  # inside
        2,
    )

    config.bare = 3
    config.group = ConfigDict({"a": 1, "b": 2})  # about both
    config.rows = ConfigDict({  # about the group
        "a": 1,  # about a
        # about b
        "b": (2,
              3),
    })
    config.made, config.more = fresh(), fresh()
    config.made.rate = 0.2  # why this one has another
    for name in ("x", "y"):
        config.made[name] = 0  # in a loop
    return config
'''


def test_comments_are_of_the_line_that_first_sets_a_value(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CONFIG)
    _, entries = rows(str(file))
    assert [tuple(row) for row in entries] == [
        ("both", "1, 2", "First line, second line. inside"),
        ("bare", "3", ""),
        ("group", "", "about both"),
        ("group.a", "1", ""),
        ("group.b", "2", ""),
        ("rows", "", "about the group"),
        ("rows.a", "1", "about a"),
        ("rows.b", "2, 3", "about b"),
        ("made.rate", "0.2", "of what"),
        ("made.x", "0", "in a loop"),
        ("made.y", "0", "in a loop"),
        ("more.rate", "0.1", "of what"),
    ]


def test_presets_may_be_a_list_and_comments_empty(command, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        'PRESETS = ("first", "second")\n'
        "def get_config(preset='first'):\n"
        "    config = ConfigDict()\n"
        "    config.experiment, config.preset = 'mnist', preset\n"
        "    #\n"
        "    #\n"
        "    config.runs = 4\n"
        "    return config\n"
    )
    code, printed, _ = command(f"--config={file}", "--describe")
    assert code == 0 and "second" in printed and "runs" in printed
