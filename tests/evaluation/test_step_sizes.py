"""A step size of a suite is a length in the suite's norm. Another norm needs another one."""

import pytest
import torch

from robbench import load_model
from robbench.data.sets import load
from robbench.evaluation.run import evaluate

SUITE = """
version = 1
[threat]
digits = { norm = "Linf", eps = "0.2" }

[[attack]]
name = "A"
kind = "pgd"
steps = 10
step_size = "0.01"

[[attack]]
name = "B"
kind = "transfer"
surrogate = "natural"
attack = "pgd"
steps = 10
step_size = "0.01"
"""


@pytest.mark.whole
def test_another_norm_than_that_of_the_suite_takes_no_step_size_of_it(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(SUITE)
    own, euclidean = (evaluate("digits/natural", path, samples=30, **how) for how in ({}, {"norm": "L2", "eps": 1.5}))
    small, large = ([a.config.get("attack", a.config)["step_size"] for a in r.attacks] for r in (own, euclidean))
    assert (small, large) == ([0.01, 0.01], [None, None])
    assert evaluate("digits/natural", path, samples=2, eps=0.1).attacks[0].config["step_size"] == 0.01
    images = load("digits", "test")
    x, y = torch.from_numpy(images.x[:9]).float() / images.scale, torch.from_numpy(images.y[:9])
    path.write_text(SUITE.split('[[attack]]\nname = "B')[0])  # images of one's own have no surrogate
    others = [evaluate(load_model("digits/natural"), path, x=x, y=y, eps=0.2, norm=norm) for norm in ("Linf", "L2")]
    assert [r.attacks[0].config["step_size"] for r in others] == [0.01, None]
    assert euclidean.robust_accuracy.value < 0.1
