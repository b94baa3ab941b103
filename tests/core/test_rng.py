"""Philox against the published known answers, and the distributions made from it."""

import math

import pytest
import torch
from scipy import stats

from robbench.core import rng

# Random123 distribution, kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(counter, key, expected):
    words = rng.philox4x32(*(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def lanes(n):
    return torch.arange(n), torch.zeros(n, dtype=torch.int64)


def test_a_number_depends_on_its_counter_alone():
    sample, trial = lanes(50)
    key = rng.make_key(3, "PGD")
    together = rng.uniform(key, sample, trial, 0, 13)
    alone = torch.cat([rng.uniform(key, sample[i : i + 1], trial[i : i + 1], 0, 13) for i in range(50)])
    assert torch.equal(together, alone)
    assert torch.equal(rng.uniform(key, sample, trial, 0, 64)[:, :13], together), "elements do not depend on n"


@pytest.mark.parametrize("change", ["seed", "stage", "sample", "trial", "step"])
def test_every_part_of_the_counter_matters(change):
    sample, trial = lanes(4)
    base = rng.bits(rng.make_key(0, "a"), sample, trial, 0, 8)
    other = {
        "seed": lambda: rng.bits(rng.make_key(1, "a"), sample, trial, 0, 8),
        "stage": lambda: rng.bits(rng.make_key(0, "b"), sample, trial, 0, 8),
        "sample": lambda: rng.bits(rng.make_key(0, "a"), sample + 4, trial, 0, 8),
        "trial": lambda: rng.bits(rng.make_key(0, "a"), sample, trial + 1, 0, 8),
        "step": lambda: rng.bits(rng.make_key(0, "a"), sample, trial, 1, 8),
    }[change]()
    assert not (base == other).any()


def test_uniform_and_normal_draws_have_their_distributions():
    sample, trial = lanes(100)
    u = rng.uniform((1, 2), sample, trial, 0, 1000)
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    z = rng.normal((1, 2), sample, trial, 0, 999)
    assert z.shape == (100, 999)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    assert math.isfinite(float(z.abs().max()))


def test_lanes_at_their_own_steps_get_the_numbers_of_those_steps():
    sample, trial = lanes(6)
    step = torch.tensor([0, 3, 3, 2**31, 2**32 + 5, 7])
    for draw in (rng.bits, rng.uniform, rng.normal):
        together = draw((1, 2), sample, trial, step, 5)
        alone = [draw((1, 2), sample[i : i + 1], trial[i : i + 1], int(step[i]), 5) for i in range(6)]
        assert torch.equal(together, torch.cat(alone))


def test_integers_below_a_bound():
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert rng.below(torch.tensor(10), words).tolist() == [0, 0, 5, 9]
    assert rng.below(torch.tensor([1, 2, 3, 4]), words).tolist() == [0, 0, 1, 3]
    sample, trial = lanes(100)
    drawn = rng.below(torch.tensor(7), rng.bits((1, 2), sample, trial, 0, 700))
    assert stats.chisquare(drawn.flatten().bincount().numpy()).pvalue > 1e-3
