"""What the README shows runs as it stands."""

import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def test_the_readmes_examples_run_as_they_stand():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        exec(code, names)
    np.testing.assert_allclose(names["state"].params["kernel"], [1.0, -2.0, 0.5], atol=1e-2)
    assert names["check"].relative_error < 0.05 and names["check"].no_guarantee == ""
    assert names["carried"].shape == (256,)


def test_every_file_that_the_docs_link_to_exists():
    for page in [ROOT / "README.md", ROOT / "BUILD.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} → {target}"
