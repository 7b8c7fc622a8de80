"""Figures say what they show."""

import pytest
from etils import epath

from sublim_jax import figures, report


@pytest.mark.parametrize(
    "several, legend",
    [([0.1, 0.3], ["a run (1 or 2 each)", "mean, 95 % interval"]), ([0.1], ["a run (1 each)"])],
)
def test_an_interval_is_promised_only_where_an_arm_has_one(monkeypatch, several, legend):
    texts = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: texts.extend(figure.legends[0].get_texts()))
    arms = [report.arm("the model as it is", "margin", [0.2]), report.arm("student", "margin", several)]
    figures.arms_figure(arms, epath.Path("unused"), xlabel="margin", chance=None)
    assert [text.get_text() for text in texts] == legend
