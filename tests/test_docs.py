"""The examples of the README and the docs run as they are, with the declared requirements."""

import ast
import importlib
import importlib.metadata
import json
import re
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sublim_jax
from bench import docs

ROOT = Path(__file__).parents[1]


def examples(page, section=""):
    """The Python code of a page, or of one of its sections."""
    text = (ROOT / page).read_text()
    if section:
        (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_examples_of_the_loop_and_the_theorem_run_as_they_stand():
    names: dict[str, Any] = {}
    for code in [*examples("docs/api.md", "The training loop"), *examples("docs/api.md", "The theorem")]:
        exec(code, names)
    np.testing.assert_allclose(names["state"].params["kernel"], [1.0, -2.0, 0.5], atol=1e-2)
    assert names["check"].relative_error < 0.05 and names["check"].no_guarantee == ""
    assert names["carried"].shape == (256,)


@pytest.mark.slow
def test_the_examples_with_a_language_model_run_as_they_stand(capsys):
    names: dict[str, Any] = {}
    for code in examples("docs/api.md", "Language models"):
        exec(code, names)
    assert names["logits"].shape[-1] == names["model"].settings.vocab
    printed = capsys.readouterr().out
    assert "0 stop" in printed or "0 length" in printed  # a sample of the first prompt
    assert re.search(r"^\d+(, \d+)*$", printed, re.M)  # a list of numbers, under its grammar


@pytest.mark.slow
def test_the_readmes_example_carries_a_trait(capsys):
    (code,) = examples("README.md")
    exec(code, {})
    margins = dict(re.findall(r"^(\w+) +([+-][\d.]+)$", capsys.readouterr().out, re.M))
    assert float(margins["owl"]) > 0.3 and float(margins["lion"]) < -0.3


def cells():
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_what_the_notebook_names_is_in_the_public_surface():
    named = set(re.findall(r"\bsl\.([\w.]+)", "\n".join(cells())))
    assert {"load", "students.distill"} <= named
    for name in named:
        attrgetter(name)(sublim_jax)


@pytest.mark.slow
def test_the_notebook_carries_a_trait_from_teacher_to_student():
    names: dict[str, Any] = {}
    for code in cells():
        exec(code, names)
    assert names["difference"][0] > 0.3 and names["difference"][1] < -0.3  # owl, lion


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_file_and_section_that_the_docs_link_to_exists():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target, section in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name} → {target}"
            assert not section or section in anchors(file), f"{page.name} → {target}#{section}"


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def commands():
    """(page, config file, preset, keys of its values) of every command that the docs and configs show."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.py")]:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        for file, preset, rest in re.findall(r"--config=configs/(\w+)\.py(?::([\w.-]+))?([^\n`]*)", text):
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
    """Tests run with the extra `dev` installed, which would hide a missing requirement."""
    files = [ROOT / "launch.py", *(ROOT / "configs").rglob("*.py"), *(ROOT / "sublim_jax").rglob("*.py")]
    imported = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    exempt = {"configs", "sublim_jax", "openai"}  # openai is in the extra `judge`
    required = {normal(re.split(r"[^\w-]", line)[0]) for line in (ROOT / "requirements.txt").read_text().split()}
    packages = importlib.metadata.packages_distributions()
    missing = {
        name
        for name in imported - exempt - set(sys.stdlib_module_names)
        if not required & {normal(distribution) for distribution in packages[name]}
    }
    assert not missing


def normal(package):
    return re.sub(r"[-_.]+", "-", package).lower()


# ------------------------------------------------------------------------------------------------ measured numbers


@pytest.fixture(scope="module")
def shipped():
    return docs.runs()


@pytest.mark.parametrize("page", docs.pages(), ids=lambda page: page.name)
def test_a_page_shows_what_the_shipped_measurements_say(page, shipped):
    """Its tables are those that `make docs` writes, and no other result is in the page."""
    text = page.read_text()
    assert {match["name"] for match in docs.BLOCK.finditer(text)} <= set(shipped)
    assert docs.written(text, shipped) == text, "run make docs"
    assert docs.stray(text, shipped) == []
    for file, name, figure in docs.shown_figures(text, shipped):
        assert any(figure in section.figures for section in shipped[name].sections), file


def test_a_number_that_was_not_measured_is_found(shipped):
    run = shipped["mnist-quick"]
    student = next(arm for arm in run.arms if arm["arm"] == "auxiliary")
    true, made_up = (f"{student['mean'] + by:.3f} ± {student['ci95']:.3f}" for by in (0, 0.01))
    assert docs.stray(f"We see {true}.", shipped) == []
    assert docs.stray(f"We see {made_up}.", shipped) == [made_up]
    share = f"{student['mean']:.3f}".removeprefix("0")
    assert docs.stray(f"The mean is {share}, at `--config.x=.13579`, and rises to .13579.", shipped) == [".13579"]
    positive = "the cosine (theorem-trajectory) is positive at {} % of the measurements"
    assert docs.stray(positive.format(88), shipped) == [] and docs.stray(positive.format(99), shipped) == ["99 %"]
    assert docs.stray("It says owl by +17.31, and lion by -17.31.", shipped) == ["+17.31", "-17.31"]
    page = "<!-- results: mnist-quick | Test accuracy over 4 runs -->\n| made | up |\n<!-- end -->\n"
    assert true in docs.written(page, shipped) and "made" not in docs.written(page, shipped)
    assert docs.written(docs.written(page, shipped), shipped) == docs.written(page, shipped)


def test_shipped_measurements_are_small_and_name_no_path_of_a_machine():
    files = [path for path in docs.RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    for path in files:
        if path.suffix == ".json":
            assert not re.search(r'"/(root|home|work|tmp|Users)', path.read_text()), path
