"""Derives stored certificates again: a random choice of proofs, and every point that breaks an image."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from robbench.certify.decide import decide
from robbench.certify.record import SUMMARY, VERSIONS, CertifiedFile, read_certified, read_tampered
from robbench.certify.run import Balls, Certifier, trace_target
from robbench.certify.smoothing import Smoothing
from robbench.classifier.batch_width import BatchWidths
from robbench.classifier.checks import classify, compute_logits
from robbench.core.errors import ResultError
from robbench.core.numbers import parse_threat
from robbench.core.words import format_count
from robbench.evaluation.inputs import resolve
from robbench.evaluation.options import Options
from robbench.evaluation.transfer import FixedPoints
from robbench.models.spec import ModelSpec
from robbench.recheck.recall import VerifyFields, recall_spec
from robbench.results.adversarials import FILE as POINTS
from robbench.results.adversarials import read
from robbench.results.consistency import Mismatch
from robbench.results.schema import ResultFile

__all__ = ["CertifiedCheck", "verify_certified"]

_MORE_TIME = 2  # a proof is given so many times its limit, for slower machines
_VOTES = 1e-3  # share of the draws that rounding may move to another class


@dataclass(frozen=True, eq=False)
class CertifiedCheck:
    """The outcome of `verify` for certificates.

    Attributes:
        file: the stored summary.
        derived: number of certificates and breaks that were derived again.
        refuted: what does not hold.
        borderline: differences that rounding or time explain.
    """

    file: CertifiedFile
    derived: int
    refuted: list[Mismatch]
    borderline: list[Mismatch]

    def as_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        f = self.file
        about = {"run_id": f.run_id, "dataset": f.dataset, "model": f.model, "method": f.method, "n": f.n}
        return about | {
            "derived": self.derived,
            "refuted": [vars(m) for m in self.refuted],
            "borderline": [vars(m) for m in self.borderline],
        }

    def __str__(self) -> str:
        """Print the verdict in one line."""
        f, tail = self.file, f", {len(self.borderline)} within rounding or time" if self.borderline else ""
        return (
            f"{f.dataset}/{f.model} · {f.method}: {self.derived} of {format_count(f.n, 'image')} derived again, "
            f"{format_count(len(self.refuted), 'mismatch')}{tail}."
        )


def verify_certified(
    folder: Path, model: str | torch.nn.Module | None = None, *, samples: int = 20, **fields: Unpack[VerifyFields]
) -> CertifiedCheck:
    """Derive certificates again.

    Args:
        folder: the folder of the certificates.
        model: the model, given as for `evaluate`; None means the registered model that the summary names.
        samples: how many certificates are derived again, drawn at random. Points are all judged again.
        **fields: as for `recheck.verify`.

    Raises:
        RobbenchError: the files, the model or the data cannot be read.
    """
    refuted, borderline = list[Mismatch](), list[Mismatch]()
    try:
        file, rows = read_certified(folder)
    except ResultError as error:
        refuted.append(Mismatch(str(error)))
        file, rows = read_tampered(folder)
    if not file.is_current:
        made, now = file.identity.get("certify"), VERSIONS[file.method]
        raise ResultError(
            f"{folder / SUMMARY}: made by version {made} of {file.method}; this is version {now}. Certify again."
        )
    # A summary of certificates names its model as a result does.
    spec = recall_spec(cast(ResultFile, file), model, fields)
    checker = _Checker.of(spec, file, rows, Options.take({**fields, "fast_layers": False}))
    if checker.certifier.identity != file.identity:
        here = checker.certifier.identity
        changed = [key for key in here if here[key] != file.identity.get(key)]
        refuted.append(Mismatch(f"{', '.join(changed)}: not what was certified; nothing was derived again"))
        return CertifiedCheck(file, 0, refuted, [])
    derived = checker.choose(samples)
    for mismatch, close in checker.check(derived, folder):
        (borderline if close else refuted).append(mismatch)
    return CertifiedCheck(file, len(derived), refuted, borderline)


@dataclass(eq=False)
class _Checker:
    certifier: Certifier
    rows: pd.DataFrame

    @classmethod
    def of(cls, spec: ModelSpec, file: CertifiedFile, rows: pd.DataFrame, options: Options) -> _Checker:
        target, images = resolve(spec, options)
        method: Balls | Smoothing
        if file.method == "smoothing":
            method = Smoothing(**file.settings)
        else:
            threat = file.identity["threat"]
            method = Balls(file.method, parse_threat(threat["norm"], threat["eps"]), 0.0)
        certifier = Certifier.of(target, images, method, options, lambda text: None)
        return cls(certifier, rows)

    def choose(self, samples: int) -> pd.DataFrame:
        """Choose the rows that are derived again: every break, and some of the others that claim something."""
        claims = self.rows["verdict"] != "open" if isinstance(self.certifier.method, Balls) else self.rows["count"] >= 0
        breaks = self.rows[self.rows["verdict"] == "broken"]
        others = self.rows[claims & (self.rows["verdict"] != "broken")]
        # The choice cannot be known in advance, so no row is safe to forge.
        drawn = np.random.default_rng(secrets.randbits(64)).permutation(len(others))[:samples]
        return pd.concat([breaks, others.iloc[np.sort(drawn)]])

    def find_positions(self, sample: pd.Series[int]) -> NDArray[np.int64]:
        at: NDArray[np.int64] = np.searchsorted(self.certifier.images.index, sample.to_numpy())
        return at

    def check(self, derived: pd.DataFrame, folder: Path) -> Iterator[tuple[Mismatch, bool]]:
        """Yield each difference, and whether rounding or time explains it."""
        images, certifier = self.certifier.images, self.certifier
        known = derived["sample"].isin(images.index)
        for sample in derived.loc[~known, "sample"]:
            yield Mismatch(f"is no sample of {images.dataset}", sample), False
        derived = derived[known]
        at = self.find_positions(derived["sample"])
        labels = images.y[at].numpy()
        for sample, given, true in zip(derived["sample"], derived["label"], labels, strict=True):
            if given != true:
                yield Mismatch(f"label {given} is stored; the data set says {true}", sample), False
        if not len(derived):
            return
        if isinstance(certifier.method, Smoothing):
            yield from self.check_votes(derived, at, certifier.method)
            return
        x = images.x(at)
        now, _ = classify(certifier.target, x, images.y[at], images.num_classes, certifier.lanes)
        for row, clean, label in zip(derived.to_dict("records"), now, labels, strict=True):
            expected = row["prediction"] if row["verdict"] == "misclassified" else label
            if clean != expected or (row["verdict"] == "misclassified" and clean == label):
                yield Mismatch(f"the clean image is predicted as {clean}; {expected} is stored", row["sample"]), False
        yield from self.check_points(derived[derived["verdict"] == "broken"], folder / POINTS)
        yield from self.check_proofs(derived[derived["verdict"] == "proven"], certifier.method)

    def check_votes(
        self, derived: pd.DataFrame, at: NDArray[np.int64], method: Smoothing
    ) -> Iterator[tuple[Mismatch, bool]]:
        """Draw the noise of each image again, and compare the class and its votes."""
        images = self.certifier.images
        for row, i in zip(derived.to_dict("records"), at, strict=True):
            x, label = images.x(np.array([i]))[0], int(images.y[i])
            again = method.decide(self.certifier.target, x, label, row["sample"], self.certifier.lanes)
            if (again["prediction"], again["count"]) == (row["prediction"], row["count"]):
                continue
            close = again["prediction"] == row["prediction"] and (
                abs(again["count"] - row["count"]) <= _VOTES * method.draws
            )
            what = (
                f"{row['count']} votes for class {row['prediction']} are stored; counted again, "
                f"{again['count']} are for class {again['prediction']}"
            )
            yield Mismatch(what, row["sample"]), close

    def check_points(self, derived: pd.DataFrame, path: Path) -> Iterator[tuple[Mismatch, bool]]:
        """Let the engine judge the stored points again."""
        stored = {}
        if len(derived):
            try:
                stored = {int(s): x for group in read(path).points for s, x in zip(group.sample, group.x, strict=True)}
            except ResultError as error:
                yield Mismatch(str(error)), False
        images = self.certifier.images
        widths = BatchWidths(
            self.certifier.target.module, images.x(np.arange(1)).shape[1:], self.certifier.lanes, images.dtype
        )
        for row in derived.to_dict("records"):
            sample = row["sample"]
            at = self.find_positions(pd.Series([sample]))
            x, point = images.x(at), torch.from_numpy(np.array(stored[sample])) if sample in stored else None
            if point is None or point.shape != x.shape[1:]:
                yield Mismatch("is stored as broken, and no point of its shape is stored", sample), False
                continue
            given = FixedPoints(point[None].to(x.dtype), torch.tensor([sample]))
            found = self.certifier.judge(given, "program", x, images.y[at], images.index[at], widths)
            if sample not in found:
                yield Mismatch("the stored point does not break the image", sample), False
            elif found[sample][0] != row["prediction"]:
                what = f"class {row['prediction']} is stored for the point; the model says {found[sample][0]}"
                yield Mismatch(what, sample), False

    def check_proofs(self, derived: pd.DataFrame, method: Balls) -> Iterator[tuple[Mismatch, bool]]:
        """Prove images again. A stored margin must not exceed the margin of the clean image."""
        images = self.certifier.images
        graph = (
            trace_target(self.certifier.target, images.x(np.arange(1)), self.certifier.lanes) if len(derived) else None
        )
        for row in derived.to_dict("records"):
            assert graph is not None
            at = self.find_positions(pd.Series([row["sample"]]))
            x, y = images.x(at), int(images.y[at][0])
            logits = compute_logits(self.certifier.target, x, self.certifier.lanes)[0].double()
            others = logits.clone()
            others[y] = -torch.inf
            clean = float(logits[y] - others.max())
            seconds = max(_MORE_TIME * row["limit"], 1.0)
            again = decide(graph, x[0], y, method.threat, method.method, seconds)
            if not again.is_proven:
                reason = "a point breaks it" if again.point is not None else f"not within {seconds:g} s"
                yield Mismatch(f"is stored as proven, and is not proven again: {reason}", row["sample"]), False
            elif row["margin"] > clean:
                what = f"margin {row['margin']:g} is stored; the clean image has {clean:g}"
                yield Mismatch(what, row["sample"]), False
            elif row["margin"] > again.margin + 1e-6 * (1 + abs(again.margin)):
                what = f"margin {row['margin']:g} is stored; the bound derived again is {again.margin:g}"
                yield Mismatch(what, row["sample"]), True
