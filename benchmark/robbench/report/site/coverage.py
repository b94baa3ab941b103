"""What was attacked, and what was not tested, in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from robbench.report.site.standing import Standing
from robbench.results.schema import AttackResult

__all__ = ["list_tested", "list_untested"]

_Config = Mapping[str, Any]
_STEPS = {"pgd", "apgd", "mifgsm", "odi"}


def _runs(config: _Config, objectives: set[str]) -> bool:
    return config.get("kind") in _STEPS and config.get("objective") in objectives


def _has_kind(*kinds: str) -> Callable[[_Config], bool]:
    return lambda config: config.get("kind") in kinds


_FAMILIES: dict[str, Callable[[_Config], bool]] = {
    "One gradient step (FGSM)": _has_kind("fgsm"),
    "Gradient steps on cross-entropy (PGD, APGD-CE)": lambda c: _runs(c, {"ce"}),
    "Gradient steps on a margin (CW, DLR)": lambda c: _runs(c, {"margin", "dlr", "dlr_targeted"}),
    "Gradient steps on rescaled logits, against vanishing gradients": lambda c: _runs(c, {"ce_scaled"}),
    "Targeted attacks, one for each of several wrong classes": lambda c: int(c.get("targets") or 1) > 1,
    "Smallest change that breaks (FAB, DeepFool, C&W)": _has_kind("fab", "deepfool", "cw"),
    "Search from many starts (Hunt, ODI, Relax)": _has_kind("hunt", "odi", "relax"),
    "Without gradients, from logits alone (Square, SPSA)": _has_kind("square", "brief", "spsa"),
    "From predicted classes alone (RayS, HopSkipJump)": _has_kind("rays", "hopskipjump"),
    "Transfer from another model": _has_kind("transfer"),
    "Random noise": _has_kind("noise"),
    "Averages over random answers (EOT)": _has_kind("eot"),
}
_NEVER = (
    "Attacks that a person adapts to this one model.",
    "Changes that no norm bounds: rotation, patches, blur, weather.",
)


def list_tested(standing: Standing) -> Iterator[str]:
    """Yield the kinds of attacks that were run, with their names, and attacks of other kinds."""
    attacks = [a for r in standing.results for a in r.attacks]
    for family, fits in _FAMILIES.items():
        if names := _name_attacks([a for a in attacks if fits(a.config)]):
            yield f"{family}: {names}."
    rest = [a for a in attacks if not any(fits(a.config) for fits in _FAMILIES.values())]
    if names := _name_attacks(rest):
        yield f"Other attacks: {names}."


def _name_attacks(attacks: list[AttackResult]) -> str:
    return ", ".join(dict.fromkeys(a.name for a in attacks))


def list_untested(standing: Standing, other_threats: list[str]) -> Iterator[str]:
    """Yield what is not known about a model under a threat, one sentence each.

    Args:
        standing: the model under the threat.
        other_threats: the other threats that the same weights were attacked under.
    """
    yield f"Other images than those attacked ({standing.base.selection})."
    norms = {threat.split()[0] for threat in other_threats} | {standing.base.threat.norm}
    if unseen := [norm for norm in ("Linf", "L2", "L1") if norm not in norms]:
        yield f"Changes measured in {' or '.join(unseen)}."
    radii = ", ".join(other_threats)
    yield f"Other radii than {standing.threat}" + (f", {radii}." if radii else ".")
    attacks = [a for r in standing.results for a in r.attacks]
    for family, fits in _FAMILIES.items():
        if not any(fits(a.config) for a in attacks) and ("EOT" not in family or "randomized" in standing.base.flags):
            yield f"{family}."
    if standing.autoattack is None:
        yield "AutoAttack as its authors define it (suite autoattack)."
    if standing.sanity is None:
        yield "Whether gradients are masked (robbench sanity)."
    if standing.certified is None:
        yield "Proofs that images are robust (robbench certify)."
    yield from _NEVER
