"""The queue of trials: a sample's trials count in their order, however many run at the same time."""

from collections import Counter

import numpy as np
import pytest

from robbench.engine.trials import Trial, TrialQueue


def end(broken=False, step=0):
    return Trial(broken, 0, step, 1, 0, 0.0, 0, 0, None)


def test_samples_come_first_and_once():
    queue = TrialQueue(range(5), 5, 3)
    assert queue.take(3) == [(0, 0), (1, 0), (2, 0)]
    assert queue.record_end(0, 0, end()) == []
    assert queue.next_trial_of(0) == 1
    assert queue.take(0) == []
    assert queue.take(99) == [(3, 0), (4, 0), (0, 2)]
    assert queue.take(99) == []


def test_a_sample_with_one_trial_is_done_when_it_ends():
    queue = TrialQueue(range(2), 2, 1)
    queue.take(2)
    assert queue.record_end(1, 0, end(step=7)) == [end(step=7)]
    assert queue.next_trial_of(1) is None


def test_the_lowest_trial_that_breaks_counts():
    queue = TrialQueue([0], 1, 9)
    queue.take(1)
    queue.record_end(0, 0, end())
    assert queue.next_trial_of(0) == 1
    assert queue.take(9) == [(0, 2), (0, 3)]
    assert queue.record_end(0, 2, end(broken=True)) == [], "trial 1 may still break it"
    assert queue.winner[0] == 2
    assert queue.next_trial_of(0) is None and queue.take(9) == [], "later trials no longer count"
    assert queue.record_end(0, 1, end(broken=True)) == [end(), end(broken=True)]
    assert queue.winner[0] == 1


def test_a_trial_that_ends_after_an_earlier_one_broke_the_sample_is_ignored():
    queue = TrialQueue([0], 1, 9)
    queue.take(1)
    queue.record_end(0, 0, end())
    queue.next_trial_of(0)
    queue.take(9)
    assert len(queue.record_end(0, 1, end(broken=True))) == 2
    assert queue.record_end(0, 2, end(broken=True)) == queue.record_end(0, 3, end()) == []
    assert queue.next_trial_of(0) is None and queue.take(9) == []


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_ends_gives_the_same_and_begins_less_than_thrice_what_counts(seed, ahead):
    rng = np.random.default_rng(seed)
    n, trials = 12, 10
    breaks = rng.random((n, trials)) < rng.choice([0.02, 0.1, 0.4], size=(n, 1))
    queue, running, begun, found = TrialQueue(range(n), n, trials, ahead=ahead), [], Counter(), {}
    while True:
        # With nothing running, at least one trial is asked for: none means that the queue is empty.
        taken = queue.take(int(rng.integers(0, 6)) or not running)
        running += taken
        begun.update(position for position, _ in taken)
        if not running:
            break
        position, trial = running.pop(int(rng.integers(len(running))))
        if trial > queue.winner[position]:
            continue
        if done := queue.record_end(position, trial, end(bool(breaks[position, trial]), trial)):
            assert position not in found
            found[position] = done
        if (following := queue.next_trial_of(position)) is not None:
            running.append((position, following))
            begun[position] += 1
    assert sorted(found) == list(range(n))
    for position, done in found.items():
        hits = np.flatnonzero(breaks[position])
        counts = int(hits[0]) + 1 if len(hits) else trials
        assert [t.step for t in done] == list(range(counts))
        assert [t.broken for t in done] == [False] * (counts - 1) + [bool(len(hits))]
        assert begun[position] < 3 * counts if ahead else begun[position] == counts


def test_without_looking_ahead_no_lane_gets_a_further_trial():
    queue = TrialQueue([0], 1, 9, ahead=False)
    queue.take(1)
    queue.record_end(0, 0, end())
    assert queue.next_trial_of(0) == 1
    assert queue.take(9) == []
