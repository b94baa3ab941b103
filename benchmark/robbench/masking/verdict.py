"""The verdict on a model, from the results of its checks, and the suite to run next. Imports no torch.

`on_warn` and `on_fail` in thresholds.toml say which verdict a check asks for when it warns or fails. Without an
entry, the status is only reported. `decide_verdict` takes the verdict with the highest priority.
"""

from __future__ import annotations

from collections.abc import Sequence

from robbench.core.numbers import parse_eps
from robbench.masking.measurements import Challenge, Measurements
from robbench.masking.record import Advice, CheckResult, VerdictName
from robbench.results.schema import ThreatResult

__all__ = ["MIN_CORRECT", "ORDER", "advise_next_suite", "decide_verdict", "is_too_little"]

MIN_CORRECT = 10
"""Correctly classified images, below which finding nothing means nothing."""

ORDER: tuple[VerdictName, ...] = ("undecided", "trustworthy", "suspicious", "masked", "randomized")
"""The verdicts by increasing priority. If a model answers at random, no other check counts."""

_GRADIENT_FREE = ("noise", "transfer", "square")


def is_too_little(m: Measurements, threat: ThreatResult) -> bool:
    """Return whether a run is too small to trust a model: few correctly classified images, or radius 0."""
    return m.correct < MIN_CORRECT or parse_eps(threat.eps) == 0


def decide_verdict(checks: Sequence[CheckResult], *, too_little: bool = False) -> tuple[VerdictName, list[str]]:
    """Return the verdict with the highest priority that any check gives, and the names of the checks that give it.

    If none gives one, the model is trustworthy, or undecided after a run with `too_little` to judge.
    """
    clean: VerdictName = "undecided" if too_little else "trustworthy"
    given = {c.name: c.decides for c in checks if c.decides}
    verdict: VerdictName = max((v for v in ORDER if v in given.values()), key=ORDER.index, default=clean)
    return verdict, [name for name, v in given.items() if v == verdict]


def advise_next_suite(verdict: VerdictName, decided_by: Sequence[str], m: Measurements) -> Advice:
    """Choose the suite to run next from the measurements. The gain is the difference already measured, in points."""
    gain = 100 * (m.pgd.value - m.best.value)
    strongest = max(m.challenges, key=lambda c: (c.broken, c.alone), default=None)
    if verdict == "randomized":
        return Advice(
            suite="eot",
            reason="The model answers at random: attack the expectation over its answers (EOT, 20 draws a step).",
            gain=gain,
        )
    if verdict == "undecided":
        why = f"Too little to judge: take {MIN_CORRECT} or more correctly classified images, and eps above 0."
        return Advice(suite="", reason=why, gain=gain)
    if verdict == "trustworthy":
        return Advice(suite="", reason="Nothing was found that the usual attack hides.", gain=gain)
    if not m.differentiable or m.zero_gradients > 0.5:
        return Advice(
            suite="blackbox",
            reason="The gradient is dead: attack without it, by transfer and by Square with 5,000 queries.",
            gain=gain,
        )
    if strongest is None or not strongest.broken:
        why = "no attack of this run broke more, but " + ", ".join(decided_by) + " cannot be explained away"
        return Advice(suite="masked", reason=f"Run everything made for masked models: {why}.", gain=gain)
    suite = "blackbox" if strongest.role in _GRADIENT_FREE else "masked"
    return Advice(suite=suite, reason=_explain_advice(strongest), gain=gain)


def _explain_advice(c: Challenge) -> str:
    means = {
        "control": "more restarts",
        "single step": "a single step: the iterated attack is broken",
        "noise": "random noise: the gradient misleads",
        "more steps": "more steps",
        "other loss": "another loss",
        "other steps": "other step sizes",
        "hunt": "margins, from diversified starts and towards single classes",
        "transfer": "transfer from another model",
        "square": "queries alone (Square)",
    }[c.role]
    return f"{c.name} broke {c.broken} of the {c.given} images that the usual PGD left: the model yields to {means}."
