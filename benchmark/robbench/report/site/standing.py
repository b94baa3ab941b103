"""What all stored results together say of a model under one threat: the best known worst case. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from robbench.certify.interval import CertificateIndex, Interval
from robbench.core.numbers import parse_threat
from robbench.core.types import Status
from robbench.masking.record import SanityFile
from robbench.masking.stored import VerdictIndex, name_verdict
from robbench.report.leaderboard import compute_overestimation, is_about_every_break
from robbench.results.places import locate_result
from robbench.results.reader import read_vouched_robust, read_vouched_rows
from robbench.results.schema import Accuracy, ResultFile
from robbench.results.summary import make_accuracy

__all__ = ["Standing", "list_standings"]

_QUICK = {"quick", "sanity"}  # too weak, or on too few images, to be the base where another suite was run
_FUNCTION = ("model", "weights", "data", "dtype")  # two results with these in common are of one function and images


@dataclass(frozen=True)
class Standing:
    """A model under one threat, over all its results on the same weights, images and threat.

    Attributes:
        base: the result whose images count.
        results: all results, the base first.
        robust: per image of the base, whether no attack of any result breaks it; indexed by sample.
        correct: per image of the base, whether it is classified correctly without an attack.
        labels: true class of each image of the base.
        extra: folder of another result -> number of images that it breaks and the base does not.
        usual: the robust accuracy under PGD on cross-entropy from one start, the usual evaluation, in percent.
        usual_n: number of images of `usual`.
        verdict: verdict of `robbench sanity`.
        sanity: the evidence of the verdict.
        certified: what is proven.
        apart: what tells it apart from another standing of the same model and threat, such as its images; usually "".
    """

    base: ResultFile
    results: tuple[ResultFile, ...]
    robust: pd.Series[bool]
    correct: pd.Series[bool]
    labels: pd.Series[int]
    extra: dict[str, int]
    usual: float | None
    usual_n: int
    verdict: str
    sanity: SanityFile | None
    certified: Interval | None
    apart: str = ""

    @property
    def full_name(self) -> str:
        """The name of the model, such as digits/at."""
        return f"{self.base.dataset}/{self.base.model}"

    @property
    def threat(self) -> str:
        """The threat, such as `Linf 8/255`."""
        return f"{self.base.threat.norm} {self.base.threat.eps}"

    @property
    def title(self) -> str:
        """The threat, with what tells the standing apart from another one of the same threat."""
        return f"{self.threat} ({self.apart})" if self.apart else self.threat

    @property
    def key(self) -> str:
        """A name of this standing in the site; unique, and the same for the same results."""
        return f"{self.full_name} {self.threat} {self.base.run_id[:8]}"

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.robust)

    @cached_property
    def worst(self) -> Accuracy:
        """Share of the images that no stored attack breaks."""
        return make_accuracy(int(self.robust.sum()), self.n)

    @cached_property
    def clean(self) -> Accuracy:
        """Share of the images that are classified correctly without an attack."""
        return make_accuracy(int(self.correct.sum()), self.n)

    @property
    def autoattack(self) -> ResultFile | None:
        """The result of the suite `autoattack` as it is; None if it was not run."""
        return next((r for r in self.results if r.suite == "autoattack" and not r.overrides), None)

    @property
    def named_verdict(self) -> str:
        """The verdict as `name_verdict` writes it."""
        return name_verdict(self.verdict, None if self.sanity is None else self.sanity.n, self.n)

    @property
    def is_quick(self) -> bool:
        """Whether only the suites `quick` and `sanity` were run."""
        return all(r.suite in _QUICK for r in self.results)

    @property
    def date(self) -> str:
        """Date of the latest result."""
        return max(r.date for r in self.results)[:10]

    @property
    def source(self) -> str:
        """Where the worst case comes from, such as `whitebox, and 4 more images by fast`."""
        more = [f"{count} more {'image' if count == 1 else 'images'} by {name}" for name, count in self.extra.items()]
        return ", and ".join([self.base.suite, ", ".join(more)] if more else [self.base.suite])


def list_standings(
    root: Path, results: Iterable[ResultFile], verdicts: VerdictIndex, certificates: CertificateIndex
) -> list[Standing]:
    """Put the results of each model, weights, images and threat together, ordered by name, norm and radius.

    Args:
        root: the results tree.
        results: results that `read_results` vouched for.
        verdicts: the verdicts of the tree.
        certificates: the certificates of the tree.
    """
    groups: dict[str, list[ResultFile]] = {}
    for result in results:
        # What looks for the nearest break breaks all images in the whole box.
        is_standing = result.has_radius and is_about_every_break(result)
        if result.attacks and result.n and is_standing:
            threat = parse_threat(result.threat.norm, result.threat.eps)
            function = [result.identity.get(key) for key in _FUNCTION]
            groups.setdefault(repr((result.dataset, result.model, function, threat)), []).append(result)
    found = [_combine(root, group, verdicts, certificates) for group in groups.values()]
    found = [replace(s, apart=_tell_apart(s, found)) for s in found]
    return sorted(found, key=lambda s: (s.full_name, s.base.threat.norm, _radius(s), s.base.run_id))


def _tell_apart(standing: Standing, standings: Sequence[Standing]) -> str:
    """Name what differs between the standings of one model and threat: images, weights or precision."""
    alike = [s for s in standings if (s.full_name, s.threat) == (standing.full_name, standing.threat)]
    if len(alike) == 1:
        return ""
    origins = [_describe_origin(s.base) for s in alike]
    words = [f"{k} {v}" for k, v in _describe_origin(standing.base).items() if any(o[k] != v for o in origins)]
    return ", ".join(words) or f"run {standing.base.run_id[:8]}"


def _describe_origin(result: ResultFile) -> dict[str, str]:
    digests = {key: str(result.identity.get(key))[:8] for key in ("data", "weights")}
    return {"images": result.selection, **digests, "dtype": str(result.identity.get("dtype"))}


def _radius(standing: Standing) -> float:
    return float(parse_threat(standing.base.threat.norm, standing.base.threat.eps).eps)


def _combine(
    root: Path, results: Sequence[ResultFile], verdicts: VerdictIndex, certificates: CertificateIndex
) -> Standing:
    robust = {r.run_id: read_vouched_robust(locate_result(root, r)) for r in results}
    base = _choose_base(results, robust)
    others = [r for r in results if r is not base]
    standing, extra = robust[base.run_id], {}
    for other in sorted(others, key=lambda r: (r.robust_accuracy.value, r.run_id)):
        held = standing & robust[other.run_id].reindex(standing.index, fill_value=True)
        if new := int(standing.sum() - held.sum()):
            extra[locate_result(root, other).name] = new
        standing = held
    rows = read_vouched_rows(locate_result(root, base))
    wrong = (rows["status"] == Status.MISCLASSIFIED).groupby(rows["sample"]).any()
    usual, usual_n = _find_usual(base, others)
    return Standing(
        base=base,
        results=(base, *others),
        robust=standing,
        correct=~wrong.reindex(standing.index),
        labels=rows.drop_duplicates("sample").set_index("sample")["label"].reindex(standing.index),
        extra=extra,
        usual=usual,
        usual_n=usual_n,
        verdict=verdicts.find(base),
        sanity=verdicts.find_file(base),
        certified=certificates.find(base),
    )


def _choose_base(results: Sequence[ResultFile], robust: dict[str, pd.Series[bool]]) -> ResultFile:
    """Choose the result whose images count: the one on the most images.

    The suites `quick` and `sanity` count only if there is no other. A result also does not count if all stored breaks
    leave more of its images robust than the whole interval of another one. Then its further images met weaker attacks.
    """
    candidates = [r for r in results if r.suite not in _QUICK] or list(results)
    worst = {}
    for r in candidates:
        held = robust[r.run_id]
        for other in robust.values():
            held = held & other.reindex(held.index, fill_value=True)
        worst[r.run_id] = make_accuracy(int(held.sum()), len(held))
    least = min(accuracy.high for accuracy in worst.values())
    agreeing = [r for r in candidates if worst[r.run_id].value <= least]
    return min(agreeing, key=lambda r: (-r.n, r.robust_accuracy.value, r.run_id))


def _find_usual(base: ResultFile, others: Sequence[ResultFile]) -> tuple[float | None, int]:
    """Return the accuracy under the usual PGD in percent, and its n: on the images of the base where that was run.

    Other images count only if their number says so beside the accuracy.
    """
    fit = [r for r in (base, *others) if r.selection == base.selection or r.n != base.n]
    for r in sorted(fit, key=lambda r: (r.n != base.n, r.mode == "challenge", r is not base, r.run_id)):
        points = compute_overestimation(r)
        if points is not None:
            return 100 * r.robust_accuracy.value + points, r.n
    return None, 0
