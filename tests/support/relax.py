"""Linear models for tests of `relax`, and the states of one trial."""

from __future__ import annotations

import torch

from robbench.core import rng
from robbench.core.threat import Ball
from robbench.core.types import Problem
from robbench.engine.query import query

EPS = {"Linf": 0.1, "L2": 0.3}


class Slopes(torch.nn.Module):
    """Class 0 has logit 0. Pixel k of an image moves the logit of class k from its clean value by a slope."""

    def __init__(self, clean, slopes):
        super().__init__()
        self.clean = torch.tensor([0.0, *clean], dtype=torch.float64)
        self.slopes = torch.tensor([0.0, *slopes], dtype=torch.float64)

    def forward(self, x):
        return (x.flatten(1)[:, : len(self.clean)] - 0.5) * self.slopes + self.clean


def leaves(share):
    """Make a model of which every run leaves this share of the clean margin."""
    return Slopes([-1.0, -2.0, -2.0], [10 * (1 - share), 0.0, 0.0])


def follow(attack, model, norm="Linf", classes=4, later=None):
    """Return the states of one trial on one image in the middle of the box, up to its end.

    With `later`, all runs and cycles but the first one see this model.
    """
    lane = torch.zeros(1, dtype=torch.int64)
    x = torch.full((1, 1, 1, classes), 0.5, dtype=torch.float64)
    p = Problem(x=x, y=lane, sample=lane, trial=lane, key=rng.make_key(0, "test"), logits=model(x))
    ball = Ball(norm, EPS[norm])
    states = [attack.init(p, ball)]
    for t in range(attack.steps):
        seen = model if later is None or states[-1]["at"] == 0 else later
        answer = query(seen, attack, p, states[-1], attack.needs_grad)
        states.append(attack.step(p, ball, states[-1], lane + t, *answer))
        if states[-1]["done"].all():
            break
    return p, ball, states


def list_targets(attack, states):
    """List the class of every cycle, in order. The search is none."""
    first, last = attack.starts + 1, attack.starts + min(attack.targets, states[0]["came"].shape[1] - 1)
    targets = {int(s["at"]): int(s["target"]) for s in states if first <= s["at"] <= last + attack.restarts}
    return [targets[k] for k in sorted(targets)]
