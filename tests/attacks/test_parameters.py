"""Hyperparameters have types: what cannot be a budget is refused when the attack is made, in a sentence."""

import json

import numpy as np
import pytest

from robbench.attacks import APGD, CW, EOT, FAB, FGSM, PGD, SPSA, DeepFool, Hunt, Noise, Square, describe
from robbench.core.errors import SuiteError

NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (PGD, {"steps": 2.5}, "PGD: steps: 2.5 given; allowed: a whole number"),
        (PGD, {"steps": "3"}, "PGD: steps: '3' given; allowed: a whole number"),
        (PGD, {"steps": True}, "PGD: steps: True given"),
        (PGD, {"restarts": 1.5}, "restarts: 1.5 given"),
        (PGD, {"step_size": NAN}, "step_size: nan given; allowed: a finite number"),
        (PGD, {"step_size": -1.0}, "both must be above 0"),
        (PGD, {"step_size": 0}, "both must be above 0"),
        (PGD, {"relative_step": 0.0}, "both must be above 0"),
        (PGD, {"relative_step": "x"}, "relative_step: 'x' given"),
        (PGD, {"random_start": "no"}, "random_start: 'no' given; allowed: True or False"),
        (FGSM, {"objective": 3}, "objective: 3 given; allowed: text"),
        (APGD, {"steps": None}, "APGD: steps: None given"),
        (Noise, {"restarts": "x"}, "Noise: restarts: 'x' given"),
        (Square, {"steps": 2.5}, "Square: steps: 2.5 given"),
        (Square, {"p_init": float("inf")}, "p_init: inf given"),
        (FAB, {"eta": NAN}, "FAB: eta: nan given"),
        (CW, {"lr": "fast"}, "CW: lr: 'fast' given"),
        (DeepFool, {"candidates": [9]}, r"DeepFool: candidates: \[9\] given"),
        (Hunt, {"starts": 6.0}, "Hunt: starts: 6.0 given"),
        (SPSA, {"samples": NAN}, "SPSA: samples: nan given"),
        (EOT, {"inner": PGD(), "draws": "20"}, "EOT: draws: '20' given"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(kind, given, message):
    with pytest.raises(SuiteError, match=message):
        kind(**given)


def test_numbers_of_numpy_become_plain():
    attack = PGD(steps=np.int64(3), step_size=np.float32(0.5), random_start=False)
    assert describe(attack) == describe(PGD(steps=3, step_size=0.5, random_start=False))
    assert json.dumps(describe(attack))


def test_an_inner_attack_that_is_none_is_refused():
    with pytest.raises(SuiteError, match="inner: 'pgd' given; allowed: an attack"):
        EOT(inner="pgd")
