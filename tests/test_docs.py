"""What the README shows runs as it stands, from what it installs."""

import ast
import importlib
import importlib.metadata
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def test_the_readmes_examples_run_as_they_stand():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        exec(code, names)
    np.testing.assert_allclose(names["state"].params["kernel"], [1.0, -2.0, 0.5], atol=1e-2)
    assert names["check"].relative_error < 0.05 and names["check"].no_guarantee == ""
    assert names["carried"].shape == (256,)


@pytest.mark.slow
def test_the_readmes_language_model_runs_as_it_stands(capsys):
    names = {}
    for block in re.findall(r"(?:^    .*\n)+", (ROOT / "README.md").read_text(), re.M):
        if "import" in block:
            exec(textwrap.dedent(block), names)
    assert names["logits"].shape[-1] == names["model"].settings.vocab
    said = capsys.readouterr().out
    assert "0 stop" in said or "0 length" in said  # a sample of the first prompt
    assert re.search(r"^\d+(, \d+)*$", said, re.M)  # a list of numbers, under its grammar


def test_every_file_that_the_docs_link_to_exists():
    for page in [ROOT / "README.md", ROOT / "BUILD.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} → {target}"


def commands():
    """(page, config file, preset, keys of its values) of every launch.py command that the docs and configs show."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.py")]:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        for file, preset, rest in re.findall(r"launch\.py +--config=configs/(\w+)\.py(?::([\w.-]+))?([^\n`]*)", text):
            yield page.name, file, preset, re.findall(r"--config\.([\w.]+)=", rest.split("#")[0])


def test_every_command_that_is_shown_has_a_config_and_values_that_exist():
    shown = list(commands())
    assert len(shown) > 50
    for page, file, preset, keys in shown:
        make = importlib.import_module(f"configs.{file}").get_config
        config = make(preset) if preset else make()
        for key in keys:
            at = config
            for part in key.split("."):
                assert part in at, f"{page}: configs/{file}.py:{preset} has no {key}"
                at = at[part]


def test_every_package_that_is_imported_is_installed_by_the_requirements():
    """Tests run beside packages of the extra `dev`, which would hide one that is missing."""
    files = [ROOT / "launch.py", *(ROOT / "configs").rglob("*.py"), *(ROOT / "sublim_jax").rglob("*.py")]
    imported = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    ours = {"configs", "sublim_jax", "openai"}  # the last is the extra `judge`, and its absence is told
    required = {normal(re.split(r"[^\w-]", line)[0]) for line in (ROOT / "requirements.txt").read_text().split()}
    packages = importlib.metadata.packages_distributions()
    missing = {
        name
        for name in imported - ours - set(sys.stdlib_module_names)
        if not required & {normal(one) for one in packages[name]}
    }
    assert not missing


def normal(package):
    return re.sub(r"[-_.]+", "-", package).lower()
