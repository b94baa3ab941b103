"""The ledger: every sample's trials count in their order, however many run beside each other and whoever runs them."""

import threading
from collections import Counter

import numpy as np
import pytest

from robbench.engine.trials import Ledger, Trial


def end(broken=False, step=0):
    return Trial(broken, 0, step, 1, 0, 0.0, 0, 0, None)


def test_samples_come_first_and_once():
    ledger = Ledger(range(5), 5, 3)
    assert ledger.wanted() == 5
    assert ledger.take(3) == [(0, 0), (1, 0), (2, 0)]
    assert ledger.file(0, 0, end()) == []
    assert ledger.go_on(0) == 1
    assert ledger.take(99) == [(3, 0), (4, 0), (0, 2)]
    assert ledger.take(99) == []
    assert ledger.wanted() == 6


def test_a_sample_with_one_trial_is_done_when_it_ends():
    ledger = Ledger(range(2), 2, 1)
    ledger.take(2)
    assert ledger.file(1, 0, end(step=7)) == [end(step=7)]
    assert ledger.go_on(1) is None
    assert ledger.wanted() == 1


def test_the_lowest_trial_that_breaks_counts():
    ledger = Ledger([0], 1, 9)
    ledger.take(1)
    ledger.file(0, 0, end())
    assert ledger.go_on(0) == 1
    assert ledger.take(9) == [(0, 2), (0, 3)]
    assert ledger.file(0, 2, end(broken=True)) == [], "trial 1 may still break it"
    assert ledger.winner[0] == 2
    assert ledger.go_on(0) is None and ledger.take(9) == [], "what comes after trial 2 counts no more"
    assert ledger.file(0, 1, end(broken=True)) == [end(), end(broken=True)]
    assert ledger.winner[0] == 1
    ledger.drop(1)
    assert ledger.wanted() == 0


def test_what_ends_too_late_is_ignored():
    ledger = Ledger([0], 1, 9)
    ledger.take(1)
    ledger.file(0, 0, end())
    ledger.go_on(0)
    ledger.take(9)
    assert len(ledger.file(0, 1, end(broken=True))) == 2
    assert ledger.file(0, 2, end(broken=True)) == ledger.file(0, 3, end()) == [], "another crew was faster"
    assert ledger.wanted() == 0 and not ledger.rest()


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_any_interleaving_gives_the_same_and_begins_less_than_thrice_what_counts(seed, ahead):
    rng = np.random.default_rng(seed)
    n, trials = 12, 10
    breaks = rng.random((n, trials)) < rng.choice([0.02, 0.1, 0.4], size=(n, 1))
    ledger, running, begun, found = Ledger(range(n), n, trials, ahead=ahead), [], Counter(), {}
    while True:
        taken = ledger.take(int(rng.integers(0, 6)))
        running += taken
        begun.update(position for position, _ in taken)
        if not running:
            if not ledger.wanted():
                break
            continue
        position, trial = running.pop(int(rng.integers(len(running))))
        if trial > ledger.winner[position]:
            ledger.drop(1)
            continue
        if done := ledger.file(position, trial, end(bool(breaks[position, trial]), trial)):
            assert position not in found
            found[position] = done
        if (following := ledger.go_on(position)) is not None:
            running.append((position, following))
            begun[position] += 1
    assert sorted(found) == list(range(n))
    for position, done in found.items():
        hits = np.flatnonzero(breaks[position])
        counts = int(hits[0]) + 1 if len(hits) else trials
        assert [t.step for t in done] == list(range(counts))
        assert [t.broken for t in done] == [False] * (counts - 1) + [bool(len(hits))]
        assert begun[position] < 3 * counts if ahead else begun[position] == counts


def test_in_turn_hands_out_no_further_trial():
    ledger = Ledger([0], 1, 9, ahead=False)
    ledger.take(1)
    ledger.file(0, 0, end())
    assert ledger.go_on(0) == 1
    assert ledger.take(9) == []
    assert ledger.wanted() == 1


def test_who_rests_is_woken_by_work_by_the_end_and_by_a_stop():
    ledger, found = Ledger(range(2), 2, 4), []

    def rests():
        while ledger.rest():
            found.extend(ledger.take(9))
        found.append("over")

    def started():
        thread = threading.Thread(target=rests, daemon=True)
        thread.start()
        return thread

    ledger.take(2)
    other = started()
    ledger.file(0, 0, end())  # its other trials may begin
    ledger.file(1, 0, end(broken=True))
    for trial in (1, 2, 3):
        while (0, trial) not in found:
            other.join(0.01)
        ledger.file(0, trial, end())
    other.join(60)
    assert found == [(0, 1), (0, 2), (0, 3), "over"]

    ledger = Ledger(range(2), 2, 4)
    ledger.take(2)
    found.clear()
    other = started()
    ledger.close()
    other.join(60)
    assert found == ["over"]
