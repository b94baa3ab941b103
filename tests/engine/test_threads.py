"""Crews: batches beside each other change no record, and none of them goes on when one fails."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from robbench.attacks import APGD, PGD, Hunt, Square
from robbench.classifier.batch_width import Widths, twin, using_threads
from robbench.core.errors import ModelError
from robbench.core.threat import Ball
from robbench.engine.threads import muster, work
from robbench.engine.trials import Ledger
from support.attacks import run_attack
from support.models import small

BALL = Ball("Linf", 0.1)
ATTACKS = [
    PGD(objective="ce", steps=5, restarts=20),
    APGD(objective="dlr_targeted", targets=9, steps=6),
    Hunt(starts=2, targets=3, run=10, chase=20, probe=3),
    Square(steps=20),
]


def labelled(net, n):
    """Images, and labels that the model agrees with."""
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, net(x).argmax(1)


class Notes(nn.Module):
    """Keeps what it computes on itself between two lines, as modules of users do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        self.seen = x * 1.0
        self.answer = self.net(self.seen)
        return self.answer


@pytest.fixture(autouse=True)
def two_threads():
    with using_threads(2):
        yield


def records(rows):
    order = np.argsort(rows.sample)
    names = ("sample", "broken", "prediction", "trial", "step", "forwards", "backwards", "distance")
    return [getattr(rows, name)[order] for name in names]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.kind)
def test_the_number_of_crews_changes_no_record(attack):
    net = Notes(small()).eval()
    x, y = labelled(net, 90)
    crews, threads = muster(net, Widths(net, x.shape[1:], 16, x.dtype), len(y), alone=False)
    assert (len(crews), threads) == (2, 1)
    two = records(run_attack(net, attack, x, y, BALL, lanes=16))
    with using_threads(1):
        one = records(run_attack(net, attack, x, y, BALL, lanes=16))
    assert one[1].sum() > 0
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def test_who_works_alone(monkeypatch):
    net = small()
    widths = Widths(net, (1, 8, 8), 32, torch.float32)
    assert len(muster(net, widths, 200, alone=False)[0]) == 2
    assert len(muster(net, widths, 200, alone=True)[0]) == 1  # answers at random: in one order
    with using_threads(1):
        assert muster(net, widths, 200, alone=False)[1] == 1
    monkeypatch.setattr("robbench.engine.threads._PIXELS", 32 * 64 - 1)
    assert len(muster(net, widths, 200, alone=False)[0]) == 1  # large images


def test_a_module_that_cannot_be_copied_works_alone():
    class Single(nn.Module):
        def __deepcopy__(self, memo):
            raise TypeError("no")

        def forward(self, x):
            return x.flatten(1)

    net = Single().eval()
    assert len(muster(net, Widths(net, (1, 8, 8), 32, torch.float32), 200, alone=False)[0]) == 1


def test_a_copy_shares_the_parameters_and_nothing_else():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    other = twin(net)
    assert other[0].weight is net[0].weight
    assert other[1].running_mean is not net[1].running_mean
    assert torch.equal(other[1].running_mean, net[1].running_mean)
    assert list(copy.deepcopy(net).state_dict()) == list(other.state_dict())


def test_what_one_crew_raises_stops_all():
    ledger = Ledger(range(5), 5, 1)
    assert ledger.take(5) == [(i, 0) for i in range(5)]

    def endless():
        assert not ledger.rest(), "nobody said stop"

    def fails():
        raise ModelError("broken")

    with pytest.raises(ModelError, match="broken"):
        work([endless, fails], 1, ledger)
    assert ledger.closed
    assert torch.get_num_threads() == 2


def test_rows_finished_before_a_failure_are_handed_on():
    net = small()
    x, y = labelled(net, 90)
    kept = []

    def on_rows(rows):
        kept.extend(rows.sample.tolist())
        if len(kept) > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_attack(net, PGD(objective="ce", steps=3), x, y, BALL, lanes=16, on_rows=on_rows)
    assert 30 < len(set(kept)) == len(kept) < 90
