"""Certifies the images of a test set, one after the other. Every image is stored soon after it is decided."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.attacks import PGD, Attack
from robbench.certify.balls import Balls
from robbench.certify.decide import decide
from robbench.certify.layers import Graph
from robbench.certify.record import (
    COLUMNS,
    SUMMARY,
    VERSIONS,
    CertifiedFile,
    certified_folder,
    make_empty_rows,
    read_certified,
    read_unfinished,
    summarize_certified,
    write_certified,
)
from robbench.certify.smoothing import Smoothing
from robbench.certify.trace import trace_graph
from robbench.classifier.batch_width import BatchWidths, choose_lanes
from robbench.classifier.checks import classify, compute_logits
from robbench.classifier.guard import Guarded, list_flags
from robbench.classifier.prepare import Target
from robbench.core import rng
from robbench.core.errors import ModelError, ResultError, RobbenchError
from robbench.core.files import digest
from robbench.core.machine import describe_device, versions
from robbench.core.threat import Ball
from robbench.core.words import format_count
from robbench.engine import engine
from robbench.evaluation.inputs import Images, identify, make_probe, resolve, select
from robbench.evaluation.options import Options
from robbench.evaluation.transfer import FixedPoints
from robbench.models.spec import ModelSpec
from robbench.results.adversarials import FILE as POINTS
from robbench.results.adversarials import Points, merge, pack, read
from robbench.results.locking import lock_result
from robbench.results.selection import describe_selection

__all__ = ["Balls", "Certifier", "certify", "trace_target"]

_PAUSE = 20.0  # seconds between two writes
_SAME = 1e-4  # share of the logits' size by which model and graph may differ; float32 rounds by far less
_SEARCH, _PROGRAM = "search", "program"  # who proposed a point
Note = Callable[[str], None]


def certify(
    spec: ModelSpec, method: Balls | Smoothing, options: Options, note: Note = lambda text: None
) -> CertifiedFile:
    """Certify the first images of a test set, and store the certificates if there is a results tree.

    Images that are stored are not computed again, unless they are open and the time limit is longer now.

    Args:
        spec: the model and, if they are the user's own, the images.
        method: what to do with each image.
        options: samples, lanes, device, data_dir, models, results, overwrite and wait count.
        note: hears what happens.

    Raises:
        RobbenchError: the model has a layer that is not understood, answers at random, or does not fit the images.
    """
    options = replace(options, fast_layers=False)  # the graph is made of the layers of the model itself
    target, images = resolve(spec, options)
    certifier = Certifier.of(target, images, method, options, note)
    if options.results is None:
        return certifier.run(None)
    root = Path(options.results)
    folder = certified_folder(root, images.dataset, target.name, certifier.identity)
    with lock_result(root, folder, options.wait, note):
        return certifier.run(folder)


def _make_identity(target: Target, images: Images, method: Balls | Smoothing) -> dict[str, Any]:
    """Name everything that the verdict of an image depends on."""
    described = method.describe()
    return {"certify": VERSIONS[described["method"]], **described, **identify(target, images)}


@dataclass(eq=False)
class Certifier:
    """One model, its images, and one method.

    Attributes:
        target: the model, with its own layers.
        images: the test set.
        method: what to do with each image.
        identity: what the verdicts depend on.
        at: positions of the images that are asked for.
        lanes: batch width.
        overwrite: replace a stored certificate that cannot be used.
        note: hears what happens.
    """

    target: Target
    images: Images
    method: Balls | Smoothing
    identity: dict[str, Any]
    at: NDArray[np.int64]
    lanes: int
    overwrite: bool
    note: Note

    @classmethod
    def of(cls, target: Target, images: Images, method: Balls | Smoothing, options: Options, note: Note) -> Certifier:
        """Take what a run is given.

        Raises:
            RobbenchError: samples were to be drawn at random; certificates are of the first images.
        """
        if options.sample_seed is not None:
            raise RobbenchError("sample_seed given; certificates are of the first images of a test set.")
        at = select(len(images.y), options)
        lanes = choose_lanes(options.lanes, len(at), images.x(np.arange(1)).shape[1:], target.device)
        identity = _make_identity(target, images, method)
        return cls(target, images, method, identity, at, lanes, options.overwrite, note)

    def run(self, folder: Path | None) -> CertifiedFile:
        """Decide about every image that is not decided yet, and store the verdicts in a folder."""
        begin, known, points = time.monotonic(), make_empty_rows(), list[Points]()
        probe = make_probe(self.target, self.images, self.lanes)
        if folder is not None:
            known, points = self.load(folder)
        answers = probe.record()
        rows: dict[int, Any] = {r["sample"]: dict(r) for r in known.to_dict("records")}
        again = {s for s, r in rows.items() if r["verdict"] == "open" and r["limit"] < self.limit}
        todo = np.array([p for p in self.at if (s := int(self.images.index[p])) not in rows or s in again], np.int64)
        title = f"{self.images.dataset}/{self.target.name}"
        self.note(f"{title}: {self.identity['method']} on {format_count(len(self.at), 'image')}, {len(todo)} to decide")
        written = begin
        file = None
        decided = self.decide_all(todo) if len(todo) else iter(())
        for row, point in decided:
            rows[row["sample"]] = row
            points += [point] if point is not None else []
            if folder is not None and time.monotonic() - written > _PAUSE and self.is_prefix(rows):
                file, written = self.store(folder, rows, points, answers), time.monotonic()
                self.note(f"{title}: {self.format_counts(file)}")
        file = self.store(folder, rows, points, answers)
        self.note(f"{title}: {self.format_counts(file)}")
        return file

    @property
    def limit(self) -> float:
        """The time limit of an image."""
        return self.method.seconds if isinstance(self.method, Balls) else 0.0

    def format_counts(self, file: CertifiedFile) -> str:
        """Say how many images have which verdict."""
        return f"{format_count(file.n, 'image')}: " + ", ".join(f"{n} {name}" for name, n in file.counts.items())

    def is_prefix(self, rows: dict[int, Any]) -> bool:
        """Tell whether the rows are of the first images of the test set, as a stored selection must be."""
        return set(self.images.index[: len(rows)].tolist()) == set(rows)

    def load(self, folder: Path) -> tuple[pd.DataFrame, list[Points]]:
        """Read what is stored for this identity.

        Raises:
            ResultError: it is damaged, or the model answers differently since. `overwrite` drops it.
        """
        try:
            if (folder / SUMMARY).exists():
                file, rows = read_certified(folder)
                probe = make_probe(self.target, self.images, self.lanes)
                if file.identity != self.identity or (change := probe.describe_change(file.answers)):
                    raise ResultError(f"{folder} holds certificates of another function. {change}")
            else:
                found = read_unfinished(folder, digest(self.identity))
                rows = make_empty_rows() if found is None else found
            kept = read(folder / POINTS).points if (folder / POINTS).exists() and len(rows) else []
        except ResultError:
            if not self.overwrite:
                raise
            return make_empty_rows(), []
        return rows, kept

    def store(
        self, folder: Path | None, rows: dict[int, dict[str, Any]], points: list[Points], answers: list[str]
    ) -> CertifiedFile:
        """Summarize the rows, and write them if there is a folder."""
        frame = pd.DataFrame([rows[s] for s in sorted(rows)], columns=list(COLUMNS)).astype(COLUMNS)
        described = {
            "model": self.target.name,
            "dataset": self.images.dataset,
            "total": len(self.images.y),
            "selection": describe_selection(len(frame), len(self.images.y), None),
            "hardware": describe_device(self.target.device),
            "versions": versions(),
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "answers": answers,
            "files": {},
        }
        file = summarize_certified(frame, self.identity, described)
        if folder is None:
            return file
        broken = frame[frame["verdict"] == "broken"]
        wanted = pd.concat([broken.assign(attack=name) for name in (_SEARCH, _PROGRAM)])
        packed = pack(merge(points, wanted), file.run_id, [_SEARCH, _PROGRAM]) if len(broken) else None
        return write_certified(folder, file, frame, packed)

    def decide_all(self, todo: NDArray[np.int64]) -> Any:
        """Yield a row for each position, and the point that breaks the image or None."""
        x, y, index = self.images.x(todo), self.images.y[todo], self.images.index[todo]
        if isinstance(self.method, Smoothing):
            for i in range(len(todo)):
                yield self.method.decide(self.target, x[i], int(y[i]), int(index[i]), self.lanes), None
            return
        graph = trace_target(self.target, x, self.lanes)
        widths = BatchWidths(self.target.module, x.shape[1:], self.lanes, self.images.dtype)
        prediction, _ = classify(self.target, x, y, self.images.num_classes, self.lanes)
        right = np.flatnonzero(prediction == y.numpy())
        found: dict[int, tuple[int, Points]] = {}
        share = 0.0
        if len(right):
            begin = time.process_time()
            attack = PGD(objective="margin", steps=50)
            found = self.judge(attack, _SEARCH, x[right], y[right], index[right], widths)
            share = (time.process_time() - begin) / len(right)
        for i in range(len(todo)):
            row = self.make_row(int(index[i]), int(y[i]), int(prediction[i]))
            begin = time.process_time()
            if row["prediction"] != row["label"]:
                yield row | {"verdict": "misclassified"}, None
                continue
            sample = row["sample"]
            if sample not in found:
                decision = decide(graph, x[i], row["label"], self.method.threat, self.method.method, self.limit)
                row |= {"margin": decision.margin}
                if decision.is_proven:
                    row |= {"verdict": "proven", "radius": float(self.method.threat.eps)}
                if decision.point is not None:
                    given = FixedPoints(self.fit(x[i], decision.point), torch.tensor([sample]))
                    one = slice(i, i + 1)
                    found |= self.judge(given, _PROGRAM, x[one], y[one], index[one], widths)
            point = None
            if sample in found:
                row |= {"verdict": "broken", "prediction": found[sample][0], "margin": float("nan")}
                point = found[sample][1]
            yield row | {"seconds": round(time.process_time() - begin + share, 4)}, point

    def make_row(self, sample: int, label: int, prediction: int) -> dict[str, Any]:
        """Make the row of an image about which nothing is known."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS, 0.0)
        return row | {
            "sample": sample,
            "label": label,
            "verdict": "open",
            "prediction": prediction,
            "margin": float("nan"),
            "count": 0,
            "limit": self.limit,
        }

    def fit(self, x: Tensor, point: Tensor) -> Tensor:
        """Move a point of the region, which is a little larger, into the ball: -> [1, C, H, W]."""
        assert isinstance(self.method, Balls)
        return Ball.of(self.method.threat).project(x[None], point[None].to(x.dtype))

    def judge(
        self, attack: Attack, name: str, x: Tensor, y: Tensor, index: NDArray[np.int64], widths: BatchWidths
    ) -> dict[int, tuple[int, Points]]:
        """Let the engine judge what an attack proposes: broken sample -> its class there, and the point."""
        assert isinstance(self.method, Balls)
        rows = engine.attack_samples(
            self.target.module,
            attack,
            x,
            y,
            index,
            Ball.of(self.method.threat),
            key=rng.make_key(0, name),
            widths=widths,
            keep_adversarials=True,
        )
        assert rows.x_adv is not None
        x_adv, run_id = rows.x_adv.cpu().numpy(), digest(self.identity)
        return {
            int(rows.sample[i]): (
                int(rows.prediction[i]),
                Points.of(run_id, rows.sample[i : i + 1], np.array([name]), x_adv[i : i + 1]),
            )
            for i in np.flatnonzero(rows.broken)
        }


def trace_target(target: Target, x: Tensor, lanes: int) -> Graph:
    """Turn the user's network inside the guard into a graph; see `trace_graph`.

    Raises:
        ModelError: a layer is not understood, or the model as it is asked answers images x otherwise than the graph.
    """
    inner = target.module.inner
    assert isinstance(inner, torch.nn.Module)
    assert isinstance(target.module, Guarded)
    if x.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"The model cannot be certified: it runs in {x.dtype}, and proofs are for float32 and float64. Give the "
            "images as x.float() and the model as model.float()."
        )
    graph = trace_graph(inner, x[:2], target.module.output, target.module.binary)
    asked = compute_logits(target, x, lanes).double()
    if coarse := list_flags(target.module).get("dtype"):
        raise ModelError(f"The model cannot be certified: proofs are for float32 and float64. {coarse}")
    change = float((torch.cat([graph.run(part.double()) for part in x.split(lanes)]) - asked).abs().max())  # type: ignore[no-untyped-call]
    if not change <= _SAME * float(asked.abs().max()):
        raise ModelError(
            f"The model cannot be certified: its logits differ by {change:.3g} from those of its layers in float64. "
            "Look for noise, and for code that depends on the number format."
        )
    return graph
