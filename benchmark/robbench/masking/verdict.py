"""Checks → a verdict, and what to run next. Pure functions; no torch."""

from __future__ import annotations

from collections.abc import Sequence

from robbench.masking.measurements import Challenge, Measurements
from robbench.masking.record import Advice, CheckResult, VerdictName

__all__ = ["ORDER", "advise", "decide"]

ORDER: tuple[VerdictName, ...] = ("trustworthy", "suspicious", "masked", "randomized")
"""From the mildest to the one that goes before all others: of a model that answers at random, no other check counts."""

_GRADIENT_FREE = ("noise", "transfer", "square")


def decide(checks: Sequence[CheckResult]) -> tuple[VerdictName, list[str]]:
    """Take the gravest verdict that any check asks for, and the checks that ask for it."""
    asked = {c.name: c.decides for c in checks if c.decides}
    verdict: VerdictName = max((v for v in ORDER if v in asked.values()), key=ORDER.index, default="trustworthy")
    return verdict, [name for name, v in asked.items() if v == verdict]


def advise(verdict: VerdictName, decided_by: Sequence[str], m: Measurements) -> Advice:
    """Say which suite to run next, why, and how much lower it is expected to come out, from what was measured."""
    gain = 100 * (m.pgd.value - m.best.value)
    strongest = max(m.challenges, key=lambda c: (c.broken, c.alone), default=None)
    if verdict == "randomized":
        return Advice(
            suite="eot",
            reason="The model answers at random: attack the expectation over its answers (EOT, 20 draws a step).",
            gain=gain,
        )
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
    return Advice(suite=_suite(strongest), reason=_reason(strongest), gain=gain)


def _suite(strongest: Challenge) -> str:
    return "blackbox" if strongest.role in _GRADIENT_FREE else "masked"


def _reason(c: Challenge) -> str:
    what = {
        "control": "more restarts",
        "single step": "a single step: the iterated attack is broken",
        "noise": "random noise: the gradient misleads",
        "more steps": "more steps",
        "other loss": "another loss",
        "other steps": "other step sizes",
        "transfer": "transfer from another model",
        "square": "queries alone (Square)",
    }[c.role]
    return f"{c.name} broke {c.broken} of the {c.given} images that the usual PGD left: the model yields to {what}."
