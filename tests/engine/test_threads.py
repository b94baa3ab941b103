"""The number of threads changes no record."""

import numpy as np
import pytest
import torch
from torch import nn

from conftest import run_attack, small
from robbench.attacks import APGD, PGD, Hunt, Square
from robbench.classifier.batch_width import using_threads
from robbench.core.threat import Ball

BALL = Ball("Linf", 0.1)
ATTACKS = [
    PGD(objective="ce", steps=5, restarts=20),
    APGD(objective="dlr_targeted", targets=9, steps=6),
    Hunt(starts=2, targets=3, run=10, chase=20, probe=3),
    Square(steps=20),
]


class Threaded(nn.Module):
    """Notes the number of threads of each query; on `unlike` threads it gives other bits."""

    def __init__(self, net, unlike=0):
        super().__init__()
        self.net, self.unlike, self.seen = net, unlike, []

    def forward(self, x):
        threads = torch.get_num_threads()
        self.seen.append(threads)
        return self.net(x) * (1 + 1e-6 * (threads == self.unlike))


def problem(net):
    x = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, net(x).argmax(1)


def records(rows):
    names = ("sample", "broken", "prediction", "trial", "step", "forwards", "backwards", "distance")
    return [getattr(rows, name) for name in names]


@pytest.mark.parametrize("unlike", [0, 2], ids=["same bits", "other bits"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.kind)
def test_the_number_of_threads_changes_no_record(attack, unlike):
    net = Threaded(small(), unlike).eval()
    x, y = problem(net.net)
    with using_threads(1):
        one = records(run_attack(net, attack, x, y, BALL, lanes=16))
    with using_threads(2):
        two = records(run_attack(net, attack, x, y, BALL, lanes=16))
        assert torch.get_num_threads() == 2, "the number of threads is set back"
    assert one[1].sum() > 0
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def test_several_threads_are_used_only_where_they_change_no_bit():
    class Rowwise(nn.Module):
        """Sums in one order on any number of threads."""

        def forward(self, x):
            return torch.stack([x.flatten(1)[:, k] for k in range(4)], 1)

    for unlike, used in ((0, 2), (2, 1)):
        net = Threaded(Rowwise(), unlike).eval()
        x, y = problem(net)
        with using_threads(2):
            run_attack(net, PGD(objective="ce", steps=2), x, y, BALL, lanes=16)
        assert net.seen[-1] == used
