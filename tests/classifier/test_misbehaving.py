"""Models that misbehave: each kind has its outcome (docs/misbehaving.md), and no sample counts as robust unsaid."""

import mmap

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from robbench.classifier.guard import Guarded
from robbench.classifier.prepare import prepare
from robbench.core.errors import ModelError
from robbench.core.machine import Growth
from robbench.evaluation.run import evaluate
from support.models import small

SUITE = """
version = 1
title = "t"
mode = "full"
[[attack]]
name = "PGD"
kind = "pgd"
steps = 6
[[attack]]
name = "Square"
kind = "square"
steps = 20
"""


class Around(nn.Module):
    """A well-behaved network, and what is done around it."""

    def __init__(self, forward):
        super().__init__()
        self.net, self.around, self.calls = small(), forward, 0

    def forward(self, x):
        self.calls += 1
        return self.around(self.net, x, self)


@pytest.fixture
def call(problem, tmp_path):
    """Evaluate `Around(forward)` on 60 images; returns the result and its records."""
    _, x, y = problem
    (tmp_path / "s.toml").write_text(SUITE)

    def evaluated(forward, root="r", which=slice(None), text=None, **options):
        if text:
            (tmp_path / "s.toml").write_text(text)
        options = {"eps": 0.05, "lanes": 16, "results": tmp_path / root, **options}
        result = evaluate(
            Around(forward).eval(), str(tmp_path / "s.toml"), x=x[which], y=y[which], name="it", **options
        )  # fmt: skip
        (place,) = (tmp_path / root / "custom/it").iterdir()
        return result, pd.read_parquet(place / "outcomes.parquet")

    return evaluated


def honest(net, x, self):
    return net(x)


def only_square():
    return SUITE.replace(SUITE[SUITE.index("[[attack]]") : SUITE.rindex("[[attack]]")], "")


def ids(text):
    """Sample numbers at the end of a sentence: "… samples 3, 5." """
    return [int(i) for i in text.split("sample")[-1].removeprefix("s").strip(" .").split(",")]


def test_nan_to_clean_images_counts_as_misclassified_and_is_told(problem, call):
    _, x, _ = problem
    bad = (x[:, 0, 0, 0] > 0.9).nonzero().flatten().tolist()
    assert 2 < len(bad) < 15

    def forward(net, z, self):
        return torch.where((z[:, :1, 0, 0] > 0.9), torch.nan, net(z))

    result, rows = call(forward)
    lost = rows[rows["sample"].isin(bad)]
    assert (lost["status"] == "misclassified").all() and (lost["prediction"] == -1).all()
    assert ids(result.flags["nonfinite_clean"]) == bad
    assert result.clean_accuracy.value == 1 - len(set(bad) | set(range(0, 60, 10))) / 60


def test_nan_under_attack_is_no_break_and_the_survivors_are_named(problem, call):
    _, x, _ = problem
    clean = {tuple(image.flatten().tolist()) for image in x}

    def forward(net, z, self):
        known = torch.tensor([tuple(image.flatten().tolist()) in clean for image in z.detach()])
        return torch.where(known[:, None], net(z), torch.nan)

    result, rows = call(forward, text=only_square())
    attacked = rows[rows["status"] != "misclassified"]
    assert (attacked["status"] == "robust").all() and (attacked["nonfinite"] > 0).all()
    told = result.flags["nonfinite"]
    assert f"{len(attacked)} images that got such answers count as robust" in told
    assert str(int(attacked["sample"].iloc[0])) in told.split("samples")[1]


@pytest.mark.parametrize(
    ("extra", "is_dead"),
    [
        (lambda z: (z - z).pow(2).flatten(1).sum(1).sqrt(), True),  # NaN everywhere
        (lambda z: z[:, 0, 0, 0].mul(0).sqrt(), False),  # NaN at one pixel
        (lambda z: torch.where(z > 0.5, z.sub(0.5).sqrt(), 0).mul(0).flatten(1).sum(1), False),  # NaN where x < 0.5
        (lambda z: (z - z.detach())[:, 0, 0, 0].sqrt(), False),  # infinity at one pixel
    ],
)  # fmt: skip
def test_a_gradient_of_nan_is_told_from_one_that_vanishes(call, extra, is_dead):
    result, _ = call(lambda net, z, self: net(z) + extra(z)[:, None])
    assert "the logits are finite" in result.flags["nonfinite_gradients"] and "nonfinite" not in result.flags
    assert ("zero_gradients" in result.flags) == is_dead
    again, _ = call(lambda net, z, self: net(z) + extra(z)[:, None])
    assert again.flags == result.flags


def test_gradients_that_vanish_and_answers_of_nan_have_their_own_flags(call):
    flat, _ = call(lambda net, z, self: net(z).detach() + 0 * z.flatten(1).sum(1, keepdim=True), "flat")
    assert "zero_gradients" in flat.flags and "nonfinite_gradients" not in flat.flags
    lost, _ = call(lambda net, z, self: net(z) * torch.where(z.amax((1, 2, 3)) > 0.9999, torch.nan, 1)[:, None], "lost")
    assert "nonfinite" in lost.flags and "nonfinite_gradients" not in lost.flags
    assert "nonfinite_gradients" not in call(honest, "plain")[0].flags


@pytest.mark.parametrize("clean", [True, False])
def test_an_exception_names_the_samples_and_costs_what_was_in_flight(problem, call, tmp_path, clean):
    _, x, _ = problem

    def forward(net, z, self):
        like = (z.detach() - x[33]).abs().flatten(1).amax(1)
        if ((like < 0.06) & ((like == 0) == clean)).any():
            raise ValueError("no such image")
        return net(z)

    with pytest.raises(ModelError, match=r"no such image.*fails on sample 33\b"):
        call(forward)
    if not clean:
        assert list(tmp_path.glob("r/custom/it/*/.partial/*/*.parquet"))
        _, rows = call(honest)
        assert rows.equals(call(honest, "whole")[1])


def test_an_exception_that_does_not_repeat_says_so(problem, call):
    _, x, _ = problem
    raised = []

    def forward(net, z, self):
        distance = (z.detach() - x[33]).abs().flatten(1).amax(1)
        if not raised and ((distance > 0) & (distance < 0.06)).any():  # an attack is under way
            raised.append(True)
            raise ValueError("once")
        return net(z)

    with pytest.raises(ModelError, match="none of them fails alone"):
        call(forward)


def test_an_exception_in_the_gradient_names_the_samples(problem, call):
    _, x, _ = problem

    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            (z,) = ctx.saved_tensors
            if ((z - x[33]).abs().flatten(1).amax(1) < 0.06).any():
                raise RuntimeError("no gradient here")
            return grad

    with pytest.raises(ModelError, match=r"gradient .* cannot be computed: no gradient here.*fails on sample 33\b"):
        call(lambda net, z, self: net(Refuse.apply(z)))


def test_coarse_answers_are_flagged_and_fine_ones_are_not(call):
    result, rows = call(honest)
    coarse, _ = call(lambda net, z, self: net(z).half(), "half")
    assert "float16" in coarse.flags["dtype"]
    fine, same = call(lambda net, z, self: net(z).double(), "double")
    assert fine.flags == result.flags == {} and same.equals(rows)
    with pytest.raises(ModelError, match=r"torch.int64; expected floating-point logits"):
        call(lambda net, z, self: net(z).long(), "int")
    with pytest.raises(ModelError, match="device meta"):
        call(lambda net, z, self: net(z).to("meta"), "meta")


@pytest.mark.gpu
def test_answers_on_another_device_are_moved_back():
    guarded = Guarded(Around(lambda net, z, self: net(z).cpu())).cuda()
    x = torch.rand(4, 1, 8, 8, device="cuda")
    assert guarded(x).device == x.device and "device" in guarded.flags


def test_a_tensor_of_five_dimensions_beside_convolutions_is_no_obstacle():
    """PyTorch refuses to bring such a module into the channels-last layout."""
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    module.register_buffer("levels", torch.zeros(1, 2, 3, 4, 5))
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(prepare(module.eval(), torch.device("cpu"), x)(x), module(x), atol=1e-6)


def test_a_changed_input_changes_no_record(call):
    _, rows = call(honest)

    def forward(net, z, self):
        out = net(z)
        z.mul_(0).add_(0.5)
        return out

    result, same = call(forward, "changing")
    assert "in place" in result.flags["input_changed"] and same.equals(rows)

    def through_data(net, z, self):
        out = net(z)
        z.data.zero_()  # not seen by autograd's counter of versions
        return out

    result, same = call(through_data, "data")
    assert "input_changed" in result.flags and same.equals(rows)


def test_an_input_that_is_changed_now_and_then_is_refused(call):
    def forward(net, z, self):
        out = net(z)
        if self.calls > 60 and not z.requires_grad:  # when the attacks have begun
            z.zero_()
        return out

    with pytest.raises(ModelError, match=r"in place, and did not when it was tried out.*while attacking sample"):
        call(forward)


def test_a_model_without_gradients_is_left_to_queries(call):
    def forward(net, z, self):
        return net(z.detach()).detach()

    with pytest.raises(ModelError, match=r"through autograd.*--suite queries"):
        call(forward)
    result, rows = call(forward, "queries", text=only_square())
    assert (rows["status"] == "broken").any() and result.n == 60


@pytest.mark.parametrize("at", [30, 80])  # before the attacks begin, and after
def test_state_that_changes_between_calls_is_flagged(call, at):
    def forward(net, z, self):
        return net(z) * (1 if self.calls < at else -1)

    result, _ = call(forward)
    assert "before" in result.flags["state"] and "60" not in result.flags["state"].split("predictions")[0][:20]
    assert "state" not in call(honest, "honest")[0].flags


def test_what_an_earlier_run_noticed_stays_with_an_extension(call):
    def forward(net, z, self):
        return net(z) * (1 if self.calls != 30 else -1) + (self.calls > 30) * torch.arange(10.0)

    first, _ = call(forward, samples=20)
    assert "state" in first.flags
    assert "state" in call(honest, samples=40)[0].flags


def test_a_slow_leak_is_flagged(call):
    kept, leak = [], 4 * 2**20  # bytes per answer

    def forward(net, z, self):
        kept.append(mmap.mmap(-1, leak))  # not from the heap, which may have room from earlier tests
        kept[-1].write(b"1" * leak)
        return net(z)

    result, _ = call(forward)
    assert "grew steadily" in result.flags["memory"]
    kept.clear()
    assert "memory" not in call(honest, "honest")[0].flags


@pytest.mark.parametrize(
    ("held", "leaked"),
    [
        ([100] * 30, False),
        ([100 + i for i in range(30)], True),
        ([100] * 10 + [200] * 20, False),  # buffers that grew once
        ([100 - i for i in range(30)], False),
        ([100, 200], False),
        ([None] * 30, False),
    ],
)
def test_growth_tells_a_leak_from_what_a_run_needs(held, leaked):
    growth = Growth()
    for value in held:
        growth.look(None if value is None else value * 2**23)
    assert bool(growth.leaked) == leaked
    kept = Growth()
    for value in held:
        kept.look(None if value is None else value * 2**23, kept=2**23)
    assert not kept.leaked, "what the run itself keeps is no leak"


def test_memory_that_goes_up_and_down_is_no_leak():
    def flagged(rise, seed):
        growth, noise = Growth(), np.random.default_rng(seed).uniform(0, 200, 200)
        for i, extra in enumerate(noise):
            growth.look(int((1000 + rise * i + extra) * 2**20))
        return bool(growth.leaked)

    assert sum(flagged(0, seed) for seed in range(500)) <= 2
    assert all(flagged(10, seed) for seed in range(500))
