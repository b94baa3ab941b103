"""Compute the numbers of a result from per-sample records. Pure functions; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from robbench.core.chance import find_chance_flag
from robbench.core.files import digest
from robbench.core.stats import wilson
from robbench.core.types import Status, Threat, format_ids
from robbench.results.grid import Grid
from robbench.results.schema import Accuracy, AttackResult, ResultFile, ThreatResult
from robbench.suite import PEERS, Mode, Suite

__all__ = [
    "MEASURED_FLAGS", "find_measured_flags", "find_robust_samples", "make_accuracy", "summarize", "summarize_attacks",
]  # fmt: skip

MEASURED_FLAGS = ("chance", "zero_gradients", "refuted", "weak_peer", "nonfinite")
"""Flags that follow from the records. Other flags are found before the attacks."""

_FEW = 5  # an attack of another library breaks at least so many images fewer, and at most half, before a flag names it
_ZERO_SHARE = 0.01  # above this share of exactly zero gradients, a flag warns the reader


def make_accuracy(successes: int, n: int) -> Accuracy:
    """Make an accuracy with its interval from counts."""
    low, high = wilson(successes, n)
    return Accuracy(value=successes / n if n else 0.0, low=low, high=high)


def find_robust_samples(rows: pd.DataFrame) -> pd.Series[bool]:
    """Return per sample whether it is classified correctly and no attack in `rows` breaks it; indexed by sample."""
    lost = rows["status"].isin([Status.MISCLASSIFIED, Status.BROKEN])
    return ~lost.groupby(rows["sample"]).any()


def summarize(
    rows: pd.DataFrame,
    *,
    attacks: dict[str, dict[str, Any]],
    flags: dict[str, str],
    identity: dict[str, Any],
    threat: Threat,
    suite: Suite,
    **described: Any,
) -> ResultFile:
    """Make a result from the records of its samples.

    An attack's robust accuracy counts the samples that the attack does not break. In a cascade, earlier stages must not
    break them either; in a challenge, the first stage must not break them either.

    Args:
        rows: one row per sample and attack, for all samples and attacks.
        attacks: name -> configuration, in the order of the suite.
        flags: the flags found before the attacks.
        identity: the identity of the run.
        threat: the threat model.
        suite: gives name, judge and mode.
        **described: the remaining fields of `ResultFile`.
    """
    grid = Grid.of(rows, list(attacks))
    n, lost = len(grid.samples), grid.lost
    results = summarize_attacks(grid, rows, attacks, suite.mode)
    return ResultFile(
        schema_version=2,
        run_id=digest(identity),
        identity=identity,
        threat=ThreatResult(norm=threat.norm, eps=threat.eps_text),
        suite=suite.name,
        judge=suite.judge,
        mode=suite.mode,
        n=n,
        clean_accuracy=make_accuracy(n - int(grid.has(Status.MISCLASSIFIED).any(axis=1).sum()), n),
        robust_accuracy=make_accuracy(n - int(lost.any(axis=1).sum()), n),
        attacks=results,
        flags={**flags, **find_measured_flags(rows, results)},
        forwards=sum(r.forwards for r in results),
        backwards=sum(r.backwards for r in results),
        seconds=round(sum(r.seconds for r in results), 3),
        **described,
    )


def summarize_attacks(
    grid: Grid, rows: pd.DataFrame, attacks: Mapping[str, dict[str, Any]], mode: Mode
) -> list[AttackResult]:
    """Add up the records of each attack.

    Args:
        grid: the records, arranged by sample and attack.
        rows: the same records.
        attacks: name -> configuration, in the order of the suite.
        mode: full, cascade or challenge; see `summarize`.
    """
    n, lost = len(grid.samples), grid.lost
    sums = {column: grid.sum(rows[column]) for column in ("forwards", "backwards", "seconds", "zero_gradients")}
    refuted = grid.sum(rows["claimed"] & (rows["status"] == Status.ROBUST))
    results: list[AttackResult] = []
    for i, (name, config) in enumerate(attacks.items()):
        counted = {"full": [i], "cascade": list(range(i + 1)), "challenge": [0, i]}[mode]
        backwards, zero = int(sums["backwards"][i]), int(sums["zero_gradients"][i])
        results.append(
            AttackResult(
                name=name,
                robust_accuracy=make_accuracy(n - int(lost[:, counted].any(axis=1).sum()), n),
                forwards=int(sums["forwards"][i]),
                backwards=backwards,
                seconds=round(float(sums["seconds"][i]), 3),
                config=config,
                refuted=int(refuted[i]),
                zero_gradient_share=zero / backwards if backwards else 0.0,
            )
        )
    return results


def _find_weak_peers(rows: pd.DataFrame, results: Sequence[AttackResult]) -> Iterator[str]:
    """Name the attacks of other libraries that break far fewer images than another attack, on the images of both.

    Records of `Peer.version` 1 were made before this flag. Attacks that skipped images are not compared, because
    earlier attacks chose the images that they got.
    """
    broken = rows.assign(broken=rows["status"] == Status.BROKEN).groupby("attack")["broken"].sum()
    skipping = set(rows.loc[rows["status"] == Status.SKIPPED, "attack"])
    count = {r.name: int(broken[r.name]) for r in results if r.name not in skipping}
    best = max(count, key=lambda name: count[name], default="")
    for r in results:
        is_peer = str(r.config.get("kind", "")).partition(":")[0] in PEERS and r.config.get("version", 1) > 1
        if is_peer and r.name in count and count[best] >= max(count[r.name] + _FEW, 2 * count[r.name]):
            yield f"{r.name} {count[r.name]}, {best} {count[best]}"


def find_measured_flags(rows: pd.DataFrame, results: Sequence[AttackResult]) -> dict[str, str]:
    """Find the flags that follow from records: name of the problem -> sentence.

    Args:
        rows: one row per sample and attack.
        results: the sums over these rows, of each attack.
    """
    # Stored results hold these sentences, and `robbench verify` compares them: another wording would be a mismatch.
    first = rows.drop_duplicates("sample")
    lost = first["status"] == Status.MISCLASSIFIED  # of other images, the clean prediction is the label
    label = first["label"].to_numpy()
    flags = find_chance_flag(label, first["prediction"].where(lost, label).to_numpy())
    flagged = [r for r in results if r.zero_gradient_share > _ZERO_SHARE]
    if flagged:
        worst = max(flagged, key=lambda r: r.zero_gradient_share)
        flags["zero_gradients"] = (
            f"{worst.zero_gradient_share:.2%} of the gradients of {worst.name} were exactly zero (seen under "
            f"{len(flagged)} of {len(results)} attacks): where the gradient is dead, the attack stood still."
        )
    if refuted := [f"{r.refuted} of {r.name}" for r in results if r.refuted]:
        flags["refuted"] = (
            f"Breaks that another library claims and that do not hold (outside ball or box, or predicted right by this "
            f"run's forward pass): {', '.join(refuted)}. They count as robust here."
        )
    if weak := list(_find_weak_peers(rows, results)):
        flags["weak_peer"] = (
            f"Attacks of other libraries that break far fewer images than another attack here: {', '.join(weak)}. "
            "Their numbers say little about the model. Look at their parameters, and at docs/peers.md."
        )
    if answers := int(rows["nonfinite"].sum()):
        flags["nonfinite"] = f"{answers} queries were answered with NaN or infinity; none of them counts as a break."
        asked = rows.loc[rows["nonfinite"] > 0, "sample"].unique()
        robust = find_robust_samples(rows)
        if standing := sorted(s for s in asked if robust[s]):
            flags["nonfinite"] += (
                f" {len(standing)} images that got such answers count as robust, though the attack could not see there "
                f"what it did: {format_ids(standing)}."
            )
    return flags
