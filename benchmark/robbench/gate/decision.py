"""The gate's decision whether a model is less robust than its baseline, or an attack is weaker. Imports no torch.

The gate compares two runs of a suite on the same images, image by image, with McNemar's exact one-sided test:

* **drop**, for clean accuracy and for the worst case. The test fails if significantly more images are lost than gained,
  and the net loss is above `max_drop` points.
* **rise**, for each attack. The test fails if the attack breaks significantly fewer of the images that it attacked in
  both runs. Unchanged weights cannot have become more robust, so the attack is weaker. With new weights, the test of an
  unchanged attack does not count: new weights can explain the rise.

Holm's method adjusts the p-values of all models and attacks of one check. A check of unchanged models fails with a
probability of at most alpha, for any seeds of the two runs. The worst case is the main purpose of the gate. Its test
therefore has eight times the weight of any other test. The list of tests and their weights do not depend on verdicts.

A sequential check tests several times, after a growing share of the images (in random order). Each of these looks
spends a part of alpha. The parts add up to alpha, so the bound holds for all looks together. A model passes early when
each of its tests has an exact upper bound (sampling without replacement) of at most `max_drop` on the loss over all
images. The probability of a wrong early pass is at most alpha again, divided over the looks in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from robbench.core.errors import ResultError
from robbench.core.stats import holm, hypergeometric_upper, least_discordant
from robbench.core.words import format_count
from robbench.gate.baseline import BaselineEntry
from robbench.gate.changes import Change
from robbench.gate.paired import CLEAN, WORST, Comparison, PairedTest, compare_entries

__all__ = ["Decision", "GateFinding", "GateOutcome", "Policy", "decide_gate", "is_certain_to_pass", "run_gate_check"]

_WORST_WEIGHT = 8.0  # of the worst case in Holm's method; every other test has weight 1
_LOOKS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Shares of the images after which a sequential check tests."""
_ALPHA_SHARES = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""The part of alpha that each look spends. The last look has half of alpha."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a check tolerates.

    Attributes:
        max_drop: largest allowed drop of an accuracy in points (percent of the images). A significant drop passes too.
        alpha: largest allowed probability that a check of unchanged models fails.
    """

    max_drop: float = 1.0
    alpha: float = 0.01

    def __post_init__(self) -> None:
        """Refuse values outside the allowed ranges."""
        if not 0 <= self.max_drop <= 100:
            raise ResultError(f"max_drop: {self.max_drop} given; allowed: points from 0 to 100.")
        if not 0 < self.alpha < 1:
            raise ResultError(f"alpha: {self.alpha} given; allowed: above 0 and below 1.")


class GateOutcome(StrEnum):
    """The outcome of one test."""

    PASSED = "passed"
    FAILED = "failed"
    TOLERATED = "tolerated"  # a significant drop of at most max_drop
    UNCERTAIN = "uncertain"  # a drop above max_drop that is not significant
    EXPLAINED = "explained"  # the attack breaks fewer images, and the weights are new


@dataclass(frozen=True)
class GateFinding:
    """A test with its outcome.

    Attributes:
        test: the paired test.
        p: p-value, adjusted for all tests of the check (Holm); not adjusted if the test does not count.
        outcome: the outcome.
        because: changes that can have caused a failure or an explained rise; empty for other outcomes.
    """

    test: PairedTest
    p: float
    outcome: GateOutcome
    because: tuple[Change, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Decision:
    """The outcome of a whole check.

    Attributes:
        policy: what the check tolerates.
        comparisons: one per model.
        findings: one per test, in order.
        resolution: smallest number of lost images at which the worst case of a model can fail, if no image is gained.
        early: why a sequential check ended before the last image; None if it measured all images.
    """

    policy: Policy
    comparisons: list[Comparison]
    findings: list[GateFinding]
    resolution: int
    early: str | None = None

    @property
    def failed(self) -> bool:
        """Whether a test failed, or an attack of the baseline did not run."""
        return any(f.outcome is GateOutcome.FAILED for f in self.findings) or any(c.removed for c in self.comparisons)

    @property
    def headline(self) -> str:
        """The outcome in one line."""
        removed = sum(len(c.removed) for c in self.comparisons)
        failed = sum(f.outcome is GateOutcome.FAILED for f in self.findings) + removed
        tests = format_count(sum(f.test.counted for f in self.findings) + removed, "test")
        verdict = f"FAILED: {failed} of {tests}" if self.failed else f"passed: {tests}"
        n = format_count(sum(c.n for c in self.comparisons), "image")
        size = f"{format_count(len(self.comparisons), 'model')}, {n}"
        tail = f"; {self.early}" if self.early else ""
        return f"Gate {verdict} ({size}, α = {self.policy.alpha:g}, allowed drop {self.policy.max_drop:g} points{tail})"

    def __repr__(self) -> str:
        """Return the outcome in one line."""
        return f"<Decision {self.headline}>"

    def __str__(self) -> str:
        """Return the outcome, and a line for each test that did not pass and each attack that did not run."""
        lines = [self.headline]
        for f in self.findings:
            if f.outcome is not GateOutcome.PASSED:
                t = f.test
                lines.append(f"{t.model}, {t.what}: {f.outcome}, {t.before} of {t.n} images before, {t.now} now")
        lines += [f"{c.before.name}, {name}: did not run" for c in self.comparisons for name in c.removed]
        return "\n".join(lines)


def decide_gate(comparisons: Sequence[Comparison], policy: Policy, share: float = 1.0) -> Decision:
    """Decide all tests of a check.

    Args:
        comparisons: one per model.
        policy: what the check tolerates.
        share: part of alpha that this decision may spend.
    """
    counted = [t for c in comparisons for t in c.tests if t.counted]
    alpha = policy.alpha * share
    weights = [_WORST_WEIGHT if t.what == WORST else 1.0 for t in counted]
    adjusted = dict(zip(map(id, counted), holm([t.p for t in counted], weights), strict=True))
    findings = []
    for c in comparisons:
        for t in c.tests:
            p = adjusted.get(id(t), t.p)
            outcome = _decide_test(t, p, alpha, policy.max_drop)
            has_causes = outcome in (GateOutcome.FAILED, GateOutcome.EXPLAINED)
            findings.append(GateFinding(t, p, outcome, tuple(_possible_causes(t, c.changes)) if has_causes else ()))
    return Decision(policy, list(comparisons), findings, least_discordant(alpha * _WORST_WEIGHT / sum(weights)))


def _decide_test(t: PairedTest, p: float, alpha: float, max_drop: float) -> GateOutcome:
    significant = p <= alpha
    if t.kind == "rise":
        if not significant:
            return GateOutcome.PASSED
        return GateOutcome.FAILED if t.counted else GateOutcome.EXPLAINED
    # Compare counts of images. A division by n could round a drop of exactly max_drop to more than max_drop.
    too_large = 100 * (len(t.lost) - len(t.gained)) > max_drop * t.n
    if significant:
        return GateOutcome.FAILED if too_large else GateOutcome.TOLERATED
    return GateOutcome.UNCERTAIN if too_large else GateOutcome.PASSED


def _possible_causes(t: PairedTest, changes: list[Change]) -> Iterator[Change]:
    """Yield the changes that can affect a test. Attacks do not affect the clean accuracy, nor each other."""
    for change in changes:
        if t.what == CLEAN and change.field in ("attack", "suite", "seed"):
            continue
        if t.what not in (CLEAN, WORST) and change.attack not in (None, t.what):
            continue
        yield change


def is_certain_to_pass(comparison: Comparison, policy: Policy, share: float) -> bool:
    """Return whether a model passes without its remaining images.

    The answer is wrong with a probability of at most share * alpha. All tests must pass, so their p-values need no
    adjustment for the number of tests. The exact bound for sampling without replacement says how many images may change
    for the worse in total. The remaining images are assumed to contain no change for the better.
    """
    if comparison.removed:
        return False
    total, drawn = comparison.before.n, comparison.n
    for t in comparison.tests:
        if not t.counted:
            continue
        bad = hypergeometric_upper(len(t.bad), drawn, total, policy.alpha * share)
        good = len(t.lost) + len(t.gained) - len(t.bad)
        if 100 * (bad - good) > policy.max_drop * total:
            return False
    return True


def run_gate_check(
    entries: Sequence[BaselineEntry],
    measure: Callable[[BaselineEntry, int], BaselineEntry],
    policy: Policy,
    sequential: bool = False,
) -> Decision:
    """Measure models again and compare them with their baseline.

    Args:
        entries: of the baseline.
        measure: measures the first n images of an entry again. A sequential check calls it with a growing n.
        policy: what the check tolerates.
        sequential: stop as soon as the answer is certain.

    Raises:
        ResultError: the entries cannot be compared, or the check is sequential and the images are in official order.
    """
    if not sequential:
        return decide_gate([compare_entries(entry, measure(entry, entry.n)) for entry in entries], policy)
    for entry in entries:
        if entry.sample_seed is None:
            raise ResultError(
                f"The baseline of {entry.name} has its images in official order ({entry.selection}). A sequential "
                "check concludes from the first images, so the order must be random. Write the baseline with "
                "--sample-seed N."
            )
    comparisons: dict[str, Comparison] = {}
    undecided = list(entries)
    for look, share in zip(_LOOKS, _ALPHA_SHARES, strict=True):
        for entry in undecided:
            n = max(1, round(look * entry.n))
            comparisons[entry.name] = compare_entries(entry, measure(entry, n), partial=True)
        decision = decide_gate(list(comparisons.values()), policy, share)
        if not decision.failed:
            undecided = [e for e in undecided if not is_certain_to_pass(comparisons[e.name], policy, share)]
        if decision.failed or not undecided:
            break
    measured, total = sum(c.n for c in comparisons.values()), sum(entry.n for entry in entries)
    early = f"the answer was certain after {measured} of {total} images" if measured < total else None
    return replace(decision, early=early)
