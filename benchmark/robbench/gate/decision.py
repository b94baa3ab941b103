"""The gate's decision: is a model less robust than its baseline, or an attack weaker? Pure; imports no torch.

Two runs of a suite on the same images are compared image by image with McNemar's exact test, one-sided:

* **drop**, for clean accuracy and for the worst case: more images are lost than chance explains, and the net loss is
  above `max_drop` points.
* **rise**, for each attack: it breaks fewer of the images that both runs gave it than chance explains. Weights that
  did not change cannot have become more robust, so the attack is weaker. With new weights an unchanged attack is not
  tested for this: the weights explain it.

The p-values of one check, over all models and attacks, are adjusted by Holm's method, so that a check of unchanged
models fails with a probability of at most alpha, whatever seeds the two runs had. The worst case is what a gate is
for, so it has eight times the weight of any other test. Which tests there are and what they weigh does not depend on
verdicts.

A sequential check looks several times, after a growing share of the images (in random order). It may fail at a look
with that look's part of alpha; the parts add up to alpha, so the bound holds for all looks together. A model passes
early once each of its tests has an exact upper bound, from sampling without replacement, at or below `max_drop`: that
this happens although all of the images would show more has a probability of at most alpha again, shared out in the same
way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from robbench.core.errors import ResultError
from robbench.core.stats import holm, hypergeometric_upper, least_discordant
from robbench.gate.baseline import Run
from robbench.gate.changes import Change
from robbench.gate.paired import CLEAN, WORST, Comparison, Question, compare

__all__ = ["Decision", "Finding", "Outcome", "Policy", "certain_to_pass", "check", "decide"]

_WEIGHT = 8.0  # of the worst case in Holm's method, beside 1 for every other test
_SHARES = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Parts of alpha that the looks of a sequential check spend; half is left for the last."""
_LOOKS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Shares of the images after which they happen."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a check tolerates.

    Attributes:
        max_drop: points (percent of the images) that an accuracy may fall, even where the fall is certain.
        alpha: probability with which an unchanged model may fail the whole check.
    """

    max_drop: float = 1.0
    alpha: float = 0.01

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if not 0 <= self.max_drop <= 100:
            raise ResultError(f"max_drop: {self.max_drop} given; allowed: points from 0 to 100.")
        if not 0 < self.alpha < 1:
            raise ResultError(f"alpha: {self.alpha} given; allowed: above 0 and below 1.")


class Outcome(StrEnum):
    """What became of a question."""

    PASSED = "passed"
    FAILED = "failed"
    TOLERATED = "tolerated"  # a certain drop of no more than max_drop
    UNCERTAIN = "uncertain"  # a drop above max_drop that chance explains
    EXPLAINED = "explained"  # fewer breaks, of other weights


@dataclass(frozen=True)
class Finding:
    """A question with its answer.

    Attributes:
        question: what was asked.
        p: of the exact test, adjusted for all tests of the check (Holm).
        outcome: the answer.
        because: what changed that can be the cause; empty where nothing is recorded.
    """

    question: Question
    p: float
    outcome: Outcome
    because: tuple[Change, ...] = ()


@dataclass(frozen=True, eq=False)
class Decision:
    """The outcome of a check.

    Attributes:
        policy: what was tolerated.
        comparisons: one per model.
        findings: one per question, in order.
        resolution: images that a model must lose in the worst case, and gain none, before it can fail.
        early: why a sequential check ended before the last image; None where all were measured.
    """

    policy: Policy
    comparisons: list[Comparison]
    findings: list[Finding]
    resolution: int
    early: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the gate is closed."""
        return any(f.outcome is Outcome.FAILED for f in self.findings) or any(c.removed for c in self.comparisons)


def decide(comparisons: Sequence[Comparison], policy: Policy, share: float = 1.0) -> Decision:
    """Answer all questions of a check.

    Args:
        comparisons: one per model.
        policy: what is tolerated.
        share: part of alpha that may be spent.
    """
    questions = [q for c in comparisons for q in c.questions]
    counted = [q for q in questions if q.counted]
    alpha = policy.alpha * share
    weights = [_WEIGHT if q.what == WORST else 1.0 for q in counted]
    adjusted = dict(zip(map(id, counted), holm([q.p for q in counted], weights), strict=True))
    findings = []
    for c in comparisons:
        for q in c.questions:
            p = adjusted.get(id(q), q.p)
            outcome = _outcome(q, p, alpha, policy.max_drop)
            told = outcome in (Outcome.FAILED, Outcome.EXPLAINED)
            findings.append(Finding(q, p, outcome, tuple(_causes(q, c.changes)) if told else ()))
    return Decision(policy, list(comparisons), findings, least_discordant(alpha * _WEIGHT / sum(weights)))


def _outcome(q: Question, p: float, alpha: float, max_drop: float) -> Outcome:
    certain = p <= alpha
    if q.kind == "rise":
        if not certain:
            return Outcome.PASSED
        return Outcome.FAILED if q.counted else Outcome.EXPLAINED
    # Counted in images: the same division on both sides would leave the tie to rounding.
    beyond = 100 * (len(q.lost) - len(q.gained)) > max_drop * q.n
    if certain:
        return Outcome.FAILED if beyond else Outcome.TOLERATED
    return Outcome.UNCERTAIN if beyond else Outcome.PASSED


def _causes(q: Question, found: list[Change]) -> Iterator[Change]:
    """Name what can have caused an answer: a clean accuracy is no matter of attacks, nor one attack of another."""
    for c in found:
        if q.what == CLEAN and c.field in ("attack", "suite", "seed"):
            continue
        if q.what not in (CLEAN, WORST) and c.attack not in (None, q.what):
            continue
        yield c


def certain_to_pass(comparison: Comparison, policy: Policy, share: float) -> bool:
    """Tell whether the rest of a model's images can be left out, but for a probability of `share` times alpha.

    Every test must pass for that, so none of them needs an adjustment for their number. The images not measured yet may
    hold as many changes as the exact bound for sampling without replacement allows, and none to the good.
    """
    if comparison.removed:
        return False
    total, drawn = comparison.before.n, comparison.n
    for q in comparison.questions:
        if not q.counted:
            continue
        bad = hypergeometric_upper(len(q.bad), drawn, total, policy.alpha * share)
        good = len(q.lost) + len(q.gained) - len(q.bad)
        if 100 * (bad - good) > policy.max_drop * total:
            return False
    return True


def check(
    runs: Sequence[Run], measure: Callable[[Run, int], Run], policy: Policy, sequential: bool = False
) -> Decision:
    """Measure models again and compare them with their baseline.

    Args:
        runs: of the baseline.
        measure: what measures the first n images of a run again; called with a growing n when sequential.
        policy: what is tolerated.
        sequential: stop as soon as the answer is certain.

    Raises:
        ResultError: the runs cannot be compared, or a sequential check is asked for on images in official order.
    """
    if not sequential:
        return decide([compare(run, measure(run, run.n)) for run in runs], policy)
    for run in runs:
        if run.sample_seed is None:
            raise ResultError(
                f"{run.name}: its baseline has the images in official order ({run.selection}); a sequential check "
                "concludes from the first of them, so their order must be random. Write it with --sample-seed N."
            )
    found: dict[str, Comparison] = {}
    undecided = list(runs)
    for where, share in zip(_LOOKS, _SHARES, strict=True):
        for run in undecided:
            found[run.name] = compare(run, measure(run, max(1, round(where * run.n))), partial=True)
        decision = decide(list(found.values()), policy, share)
        if not decision.failed:
            undecided = [r for r in undecided if not certain_to_pass(found[r.name], policy, share)]
        if decision.failed or not undecided:
            break
    measured, total = sum(c.n for c in found.values()), sum(run.n for run in runs)
    stopped = f"the answer was certain after {measured} of {total} images" if measured < total else None
    return replace(decision, early=stopped)
