"""The suite `thorough`: no scale, width or interruption changes what it finds. It breaks all that `fast` breaks."""

from __future__ import annotations

import pytest
import torch

import robbench as rb
from robbench.suite import load_suite
from support.models import hyperplane, labelled, network


class Scaled(torch.nn.Module):
    """Multiplies the logits of a network by a factor, and adds a number."""

    def __init__(self, net, factor, offset):
        super().__init__()
        self.net, self.factor, self.offset = net, factor, offset

    def forward(self, x):
        return self.factor * self.net(x) + self.offset


def run(tmp_path, model, x, y, eps, **options):
    result = rb.evaluate(
        model, "thorough", x=x, y=y, dataset="made", name="net", norm="Linf", eps=eps, results=tmp_path, progress=False,
        **options,
    )  # fmt: skip
    rows = result.records
    return result, (rows["status"] != "broken").groupby(rows["sample"]).all().to_dict()


def test_no_scale_or_offset_changes_a_verdict(tmp_path):
    net = network(torch.float64)
    x, y = labelled(net, 24, torch.float64)
    base, robust = run(tmp_path / "base", net, x, y, 0.2)
    assert 0 < sum(robust.values()) < 24
    for factor, offset in (*((10.0**k, 0.0) for k in (-3, -1, 1, 3)), (1.0, 100.0)):
        other, verdicts = run(tmp_path / f"{factor}{offset}", Scaled(net, factor, offset).eval(), x, y, 0.2)
        assert verdicts == robust, (factor, offset)
        assert other.forwards + other.backwards == pytest.approx(base.forwards + base.backwards, rel=0.1)


def test_width_and_a_run_in_two_parts_leave_the_records_as_they_are(tmp_path):
    net = network(torch.float64)
    x, y = labelled(net, 24, torch.float64)
    base = run(tmp_path / "base", net, x, y, 0.2)[0]
    kept = base.records.drop(columns="seconds")
    narrow = run(tmp_path / "narrow", net, x, y, 0.2, lanes=5)[0]
    assert narrow.records.drop(columns="seconds").equals(kept)
    run(tmp_path / "parts", net, x, y, 0.2, samples=9)
    whole = run(tmp_path / "parts", net, x, y, 0.2)[0]
    assert whole.records.drop(columns="seconds").equals(kept)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_an_image_is_broken_within_its_exact_radius_alone(norm, tmp_path):
    model, x, y, radius = hyperplane(norm, seed=3, n=3)
    for share in (0.999, 1.01):
        for i in range(3):  # the images of one run share eps
            result = rb.evaluate(
                model.eval(), "thorough", x=x[i : i + 1], y=y[i : i + 1], dataset="made", name="net", norm=norm,
                eps=float(radius[i]) * share, results=tmp_path / f"{share}{i}", progress=False,
            )  # fmt: skip
            assert (result.robust_accuracy.value == 1.0) == (share < 1)


def test_what_fast_breaks_is_broken(tmp_path):
    """The first attacks are those of `fast`, by names and so by random numbers."""
    fast, thorough = load_suite("fast"), load_suite("thorough")
    assert thorough.attacks[: len(fast.attacks)] == fast.attacks
    net = network(torch.float64)
    x, y = labelled(net, 24, torch.float64)
    found = {}
    for suite in ("fast", "thorough"):
        result = rb.evaluate(
            net, suite, x=x, y=y, dataset="made", name="net", norm="Linf", eps=0.2, results=tmp_path, progress=False
        )
        found[suite] = set(result.records.query("status == 'broken'")["sample"])
    assert found["fast"] <= found["thorough"]
