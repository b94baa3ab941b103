"""The interval of the truth: `[certified, attacked]`, and images that are both, which is an error. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from robbench.certify.record import Certificates, read_certified_files
from robbench.core.errors import ResultError
from robbench.core.numbers import parse_threat
from robbench.core.types import Status
from robbench.results.places import locate_result
from robbench.results.reader import Damage, read_results, read_vouched_robust, read_vouched_rows
from robbench.results.schema import Accuracy, ResultFile
from robbench.results.summary import make_accuracy

__all__ = ["CertificateIndex", "Interval", "find_contradictions"]

_STRENGTH = {"Linf": 0, "L2": 1, "L1": 2}
"""A point within a distance in one norm is within it in every earlier one. L0 says nothing about another norm."""
_SLACK = 1e-6  # what the judge allows beyond the radius, and proofs cover


class Interval(NamedTuple):
    """Where the robust accuracy of a model lies, on the first n images of a result.

    Attributes:
        low: share of images that are proven.
        high: share of images that are classified correctly and broken neither by an attack nor by a certifier.
        n: number of images that both know.
    """

    low: Accuracy
    high: Accuracy
    n: int

    def format(self, whole: int) -> str:
        """Print as `[41.0, 52.0]`, with n if the result has more images (`whole`)."""
        text = f"[{100 * self.low.value:.1f}, {100 * self.high.value:.1f}]"
        return text if self.n == whole else f"{text} of {self.n}"


def _is_same_function(a: dict[str, object], b: dict[str, object]) -> bool:
    return all(a.get(key) == b.get(key) for key in ("model", "weights", "data", "dtype"))


class CertificateIndex:
    """The certificates of a results tree, to be found by result. Files are read when asked for."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._by_model: dict[str, tuple[list[Certificates], list[Damage]]] = {}

    def _read(self, model: str) -> tuple[list[Certificates], list[Damage]]:
        if self.root is None:
            return [], []
        if model not in self._by_model:
            self._by_model[model] = read_certified_files(self.root, model)
        return self._by_model[model]

    def list_damaged(self, model: str = "*/*") -> list[Damage]:
        """List the certificates that are damaged."""
        return self._read(model)[1]

    def find(self, result: ResultFile) -> Interval | None:
        """Return the interval of a result; None if nothing is known about the same function, images and threat."""
        if self.root is None:
            return None
        proven, broken, known = set[int](), set[int](), set[int]()
        threat = parse_threat(result.threat.norm, result.threat.eps)
        for file, rows in self._read(f"{result.dataset}/{result.model}")[0]:
            if file.method == "smoothing" or not file.is_current:
                continue  # a smoothed classifier is another function; an earlier version may have proven too much
            if not _is_same_function(file.identity, result.identity):
                continue
            if parse_threat(file.identity["threat"]["norm"], file.identity["threat"]["eps"]) != threat:
                continue
            known |= set(rows["sample"])
            proven |= set(rows.loc[rows["verdict"] == "proven", "sample"])
            broken |= set(rows.loc[rows["verdict"] == "broken", "sample"])
        if not known:
            return None
        robust = read_vouched_robust(locate_result(self.root, result))
        common = robust[robust.index.isin(known)]
        if common.empty:
            return None
        standing = common & ~common.index.isin(broken)
        low, high = int(common.index.isin(proven).sum()), int(standing.sum())
        return Interval(make_accuracy(low, len(common)), make_accuracy(high, len(common)), len(common))


def find_contradictions(root: Path, model: str = "*/*") -> list[str]:
    """List the images of a results tree that are both proven and broken, one sentence each. There must be none.

    A break counts if its point lies within the radius of the proof, whatever the radius of the attack.
    """
    index, found = CertificateIndex(root), []
    names = sorted({"/".join(path.relative_to(root).parts[:2]) for path in root.glob(f"{model}/certified")})
    for name in names:
        certificates = [pair for pair in index._read(name)[0] if pair[0].method != "smoothing"]
        breaks = _list_breaks(root, name, certificates)
        for file, rows in certificates:
            if not file.is_current:
                continue
            norm, eps = file.identity["threat"]["norm"], file.identity["threat"]["eps"]
            reach = float(parse_threat(norm, eps).eps) + _SLACK
            proven = rows.loc[rows["verdict"] == "proven", "sample"]
            for identity, other, broken in breaks:
                if not _is_same_function(identity, file.identity) or _STRENGTH[other] < _STRENGTH[norm]:
                    continue
                both = broken[broken["sample"].isin(proven) & (broken["distance"] <= reach)]
                found += [
                    f"ERROR OF ROBBENCH: sample {s} of {name} is proven in {norm} {eps} ({file.method}) and broken "
                    f"by {attack} at {other} {distance:.6g}. One of the two is wrong. Trust neither. Report it."
                    for s, attack, distance in both.itertuples(index=False)
                ]
    return found


def _list_breaks(
    root: Path, model: str, certificates: list[Certificates]
) -> list[tuple[dict[str, object], str, pd.DataFrame]]:
    """List what was broken: identity of the function, norm, and a frame with sample, attack and distance."""
    breaks: list[tuple[dict[str, object], str, pd.DataFrame]] = []
    for result in read_results(root, model).results:
        if result.threat.norm not in _STRENGTH:
            continue
        try:
            rows = read_vouched_rows(locate_result(root, result))
        except ResultError:
            continue
        rows = rows.loc[rows["status"] == Status.BROKEN, ["sample", "attack", "distance"]]
        breaks.append((result.identity, result.threat.norm, rows))
    for file, rows in certificates:
        norm, eps = file.identity["threat"]["norm"], file.identity["threat"]["eps"]
        samples = rows.loc[rows["verdict"] == "broken", "sample"]
        distance = np.full(len(samples), float(parse_threat(norm, eps).eps))
        about = pd.DataFrame({"sample": samples, "attack": f"certify {file.method}", "distance": distance})
        breaks.append((file.identity, norm, about))
    return breaks
