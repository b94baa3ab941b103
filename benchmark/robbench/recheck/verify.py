"""Verifies a stored result: it checks every break again with the stored adversarial example. It runs no attack.

Only breaks can be verified. No file can show that a sample is robust, because another attack may still break it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.classifier.batch_width import BatchWidths, choose_lanes
from robbench.classifier.checks import RANDOMIZED_DRAWS, choose_width, classify, compute_logits
from robbench.classifier.prepare import Target
from robbench.core.errors import ResultError
from robbench.core.numbers import parse_threat
from robbench.core.threat import Ball
from robbench.core.types import Status
from robbench.engine.judge import read_logits
from robbench.evaluation.inputs import Images, identify, make_probe, resolve
from robbench.evaluation.options import Options, check_names
from robbench.evaluation.stages import count_classes
from robbench.evaluation.targets import Targets
from robbench.recheck.recall import VerifyFields, find_result, recall_spec, recall_target
from robbench.results.adversarials import FILE, Adversarials, Points, read, row_digest
from robbench.results.consistency import Mismatch, Verification, find_mismatches
from robbench.results.records import read_own_rows
from robbench.results.schema import ResultFile, read_result
from robbench.results.selection import describe_selection, order_positions

__all__ = ["Mismatch", "Verification", "verify"]

_ROUNDING = 1e-4  # of the logits' norm. Another kernel, batch width or device can change logits by this much.


def verify(result: str | Path, model: str | nn.Module | None = None, **fields: Unpack[VerifyFields]) -> Verification:
    """Check every break of a stored result again.

    Args:
        result: the folder of a result that was made with save_adversarials, or its result.json.
        model: the model, given as for `evaluate`; None means the registered model that the result names. A source is
            loaded only if the user gives it.
        **fields: x and y are the images and labels of the result, if the user gave them in Python. architecture,
            mean, std, device, lanes, data_dir and models are those of `evaluate`. Without lanes, the batch width is
            that of the result.

    Returns:
        The number of confirmed breaks, and everything that differs.

    Raises:
        ResultError: the result does not exist, it holds no adversarial examples, or a file of it cannot be read.
        RobbenchError: the model or the data cannot be loaded.
    """
    check_names(fields, VerifyFields)
    options = Options.take(fields)
    path = find_result(result)
    stored = read_result(path, changed=True)
    goal = recall_target(stored, options.target)
    options = replace(options, one_by_one="one_by_one" in stored.overrides, target=goal)
    options = replace(options, levels=stored.identity.get("levels"))
    target, images = resolve(recall_spec(stored, model, fields), options)
    rows = read_own_rows(path.with_name("outcomes.parquet"), stored.run_id)
    breaks = int((rows["status"] == Status.BROKEN).sum())
    kept = path.with_name(FILE)
    if breaks and not kept.exists():
        raise ResultError(
            f"{kept.parent} holds {breaks} breaks and no {FILE}, so no break can be checked again. Repeat the "
            "command that made the result, with --save-adversarials. It attacks these images again and stores the "
            "adversarial examples."
        )
    refuted = list(find_mismatches(stored, rows))
    try:
        read_result(path)
    except ResultError as error:
        refuted.append(Mismatch(str(error)))
    try:
        threat = parse_threat(stored.identity["threat"]["norm"], stored.identity["threat"]["eps"])
    except (KeyError, TypeError, ValueError):  # `find_summary_mismatches` has reported it
        return Verification(stored, breaks, 0, refuted, [])
    lanes = choose_lanes(options.lanes or stored.lanes, len(images.y), images.shape, target.device)
    foreign = list(_compare_model(stored, target, images, lanes))
    if foreign:  # with another model or data set, breaks need not hold
        return Verification(stored, breaks, 0, [*foreign, *refuted], [])
    adversarials = read(kept) if kept.exists() else Adversarials(stored.run_id, [], [])
    verifier = _Verifier(stored, rows, target, images, Ball.of(threat, options.levels), lanes, goal)
    refuted += [*verifier.check_labels(), *verifier.check_selection()]
    clean = list(verifier.check_clean_images())
    points = list(verifier.check_points(adversarials))
    refuted += [f for f, close in [*clean, *points] if not close]
    doubted = {(f.sample, f.attack) for f, _ in points} | {(f.sample, f.attack) for f in refuted}
    held = rows.loc[rows["status"] == Status.BROKEN, ["sample", "attack"]].itertuples(index=False, name=None)
    confirmed = sum(key not in doubted for key in held)
    return Verification(stored, breaks, confirmed, refuted, [f for f, close in [*clean, *points] if close])


def _compare_model(stored: ResultFile, target: Target, images: Images, lanes: int) -> Iterator[Mismatch]:
    """Yield how the model and data set given here differ from those of the result: identity, or else answers."""
    here = identify(target, images)
    differing = {field: value for field, value in here.items() if stored.identity.get(field) != value}
    for field, value in differing.items():
        yield Mismatch(
            f"{field}: {stored.identity.get(field)} was measured, {value} is here; no break was derived again"
        )
    if not differing and (change := make_probe(target, images, lanes).describe_change(stored.answers)):
        yield Mismatch(f"answers: the model answers differently since: {change}; no break was derived again")


class _Verifier:
    """Checks the records of a result with the model and the data set."""

    def __init__(
        self,
        stored: ResultFile,
        rows: pd.DataFrame,
        target: Target,
        images: Images,
        ball: Ball,
        lanes: int,
        goal: str | tuple[int, ...] | None,
    ) -> None:
        self.stored, self.rows, self.target, self.images = stored, rows, target, images
        self.ball, self.lanes = ball, lanes
        self.exists = np.isin(rows["sample"], images.index)
        self.label = images.y.numpy()[self.find_positions(rows["sample"].where(self.exists, images.index[0]))]
        self.randomized = False
        self.targets = None
        if goal is not None:
            self.targets = Targets(goal, images.num_classes or count_classes(target, images), stored.seed)
            self.targets.check(images)

    def choose_goals(self, sample: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the target of each sample; None where every other class is a break."""
        if self.targets is None:
            return None
        logits = None
        if self.targets.needs_logits:
            logits = compute_logits(self.target, self.images.x(self.find_positions(sample)), self.lanes)
        goals: NDArray[np.int64] = self.targets.choose(self.images, sample, logits).numpy()
        return goals

    def find_positions(self, sample: Any) -> NDArray[np.int64]:
        """Return the positions of official indices in the test set."""
        at: NDArray[np.int64] = np.searchsorted(self.images.index, np.asarray(sample))
        return at

    def check_selection(self) -> Iterator[Mismatch]:
        """Yield a mismatch unless the samples are exactly those that the selection names."""
        samples = pd.unique(self.rows["sample"].to_numpy())
        total, seed = len(self.images.y), self.stored.identity.get("sample_seed")
        expected = self.images.index[order_positions(total, seed)[: len(samples)]]
        selection = describe_selection(len(samples), total, seed)
        if self.stored.selection != selection:
            yield Mismatch(f"result.json: selection is {self.stored.selection!r}; expected {selection!r}")
        for sample in expected[~np.isin(expected, samples)].tolist():
            yield Mismatch("is named by the selection and has no record", sample)
        for sample in samples[~np.isin(samples, expected)].tolist():
            yield Mismatch("has records and is not named by the selection", sample)

    def check_labels(self) -> Iterator[Mismatch]:
        """Yield samples that the data set does not have, and labels that differ from the data set."""
        for sample, attack in self.rows.loc[~self.exists, ["sample", "attack"]].itertuples(index=False):
            yield Mismatch(f"is no sample of {self.images.dataset}", sample, attack)
        wrong = self.exists & (self.rows["label"] != self.label)
        found = self.rows[wrong].assign(true=self.label[wrong])
        for sample, attack, label, true in found[["sample", "attack", "label", "true"]].itertuples(index=False):
            yield Mismatch(f"label {label} is recorded; the data set says {true}", sample, attack)

    def check_clean_images(self) -> Iterator[tuple[Mismatch, bool]]:
        """Classify the clean images again. Yield each difference, and whether rounding errors explain it."""
        rows = self.rows.assign(true=self.label)[self.exists]
        position = np.unique(self.find_positions(rows["sample"]))
        if not len(position):
            return
        x, y = self.images.take(position), self.images.y[position]
        widths = BatchWidths(self.target.module, self.images.shape, self.lanes, self.images.dtype)
        prediction, flags = classify(self.target, x, y, self.images.num_classes, choose_width(widths, len(x)))
        self.randomized = "randomized" in flags or "randomized" in self.stored.flags
        if self.randomized:
            return
        lost = rows["status"] == Status.MISCLASSIFIED
        rows = rows.assign(
            now=prediction[np.searchsorted(position, self.find_positions(rows["sample"]))],
            expected=rows["prediction"].where(lost, rows["true"]),
            attack=rows["attack"].where(lost, None),
        )
        wrong = rows[(rows["now"] != rows["expected"]) | (lost & (rows["now"] == rows["true"]))]
        for sample, attack, now, expected in (
            wrong[["sample", "attack", "now", "expected"]].drop_duplicates().itertuples(index=False)
        ):
            logits = compute_logits(self.target, self.images.x(self.find_positions([sample])), self.lanes)
            what = f"the clean image is predicted as {now}; {expected} is recorded"
            where = attack if isinstance(attack, str) else None
            yield Mismatch(what, int(sample), where), _is_tie(logits[0], now, expected)

    def check_points(self, kept: Adversarials) -> Iterator[tuple[Mismatch, bool]]:
        """Check every break again. Yield each difference, and whether rounding errors explain it."""
        if kept.run_id != self.stored.run_id:
            yield Mismatch(f"{FILE} is of run {kept.run_id}; the result is of run {self.stored.run_id}"), False
        recorded = self.rows.assign(true=self.label, exists=self.exists).drop_duplicates(["sample", "attack"])
        seen: set[tuple[int, str]] = set()
        changed = False
        for group in kept.points:
            keys = list(zip(group.sample.tolist(), group.attack.tolist(), strict=True))
            for i, key in enumerate(keys):
                if key in seen:
                    yield Mismatch("has more than one adversarial example", *key), False
                seen.add(key)
                if row_digest(kept.run_id, *key, group.x[i]) != group.sha256[i].tobytes():
                    changed = True
                    yield Mismatch("the adversarial example is not the one that was stored (SHA-256)", *key), False
            found = pd.DataFrame({"sample": group.sample, "attack": group.attack, "row": np.arange(len(keys))})
            found = found.merge(recorded, on=["sample", "attack"], how="left")
            lone = found["status"] != Status.BROKEN
            for sample, attack, status in found.loc[lone, ["sample", "attack", "status"]].itertuples(index=False):
                entry = status if isinstance(status, str) else "nothing"
                yield Mismatch(f"an adversarial example is stored; recorded is: {entry}", sample, attack), False
            found = found[~lone & found["exists"].eq(True)]
            if group.x.shape[1:] != self.images.shape:
                yield Mismatch(f"{FILE} holds points of shape {group.x.shape[1:]}; the images have another"), False
                continue
            for begin in range(0, len(found), self.lanes):
                yield from self.check_batch(group, found.iloc[begin : begin + self.lanes])
        if kept.altered and not changed:
            yield Mismatch(f"{FILE}: not as it was written (SHA-256): {', '.join(kept.altered)}"), False
        broken = self.rows[self.rows["status"] == Status.BROKEN]
        for key in broken[["sample", "attack"]].itertuples(index=False, name=None):
            if key not in seen:
                yield Mismatch("is recorded as broken, and no adversarial example is stored", *key), False

    def check_batch(self, group: Points, found: pd.DataFrame) -> Iterator[tuple[Mismatch, bool]]:
        """Compare points with their records: ball and box, distance, prediction."""
        x0 = self.images.x(self.find_positions(found["sample"]))
        x = torch.from_numpy(group.x[found["row"].to_numpy()]).to(self.images.dtype)
        inside, distance = self.ball.contains(x0, x).tolist(), self.ball.distance(x0, x).tolist()
        slack = torch.zeros(len(x))
        if group.x.dtype == np.float16:  # rounding moved each pixel by less than one step of float16
            slack = self.ball.distance(x, x + (x * 2**-10 + 2**-24))
        logits = compute_logits(self.target, x, self.lanes)
        votes: list[int | None] = [None] * len(x)
        goals = self.choose_goals(found["sample"].to_numpy(np.int64))
        if self.randomized:
            y = torch.tensor(found["true"].to_numpy(np.int64))
            votes = self.count_wrong_answers(x, logits, y, None if goals is None else torch.from_numpy(goals))
        for i, row in enumerate(found.to_dict("records")):
            place = _check_place(x[i], inside[i], distance[i], row["distance"], float(slack[i]))
            answer = list(_check_prediction(row, logits[i], votes[i]))
            if goals is not None and row["prediction"] != goals[i]:
                answer = [(f"prediction {row['prediction']} is recorded; the target is {goals[i]}", False)]
            for what, close in (*place, *answer):
                yield Mismatch(what, int(row["sample"]), row["attack"]), close

    def count_wrong_answers(
        self, x: Tensor, logits: Tensor, y: Tensor, goals: Tensor | None = None
    ) -> list[int | None]:
        """Count the wrong answers among `RANDOMIZED_DRAWS` answers per point, for models that answer at random."""
        count = torch.zeros(len(x), dtype=torch.int64)
        for draw in range(RANDOMIZED_DRAWS):
            if draw:
                logits = compute_logits(self.target, x, self.lanes)
            count += read_logits(logits, y, goals)[1]
        counted: list[int | None] = count.tolist()
        return counted


def _check_place(x: Tensor, inside: bool, distance: float, recorded: float, slack: float) -> Iterator[tuple[str, bool]]:
    """Yield what is wrong with the place of a point: finite, in the box, in the ball, at the recorded distance."""
    if not bool(x.isfinite().all()):
        yield "the adversarial example holds NaN or infinity", False
        return
    if float(x.min()) < 0 or float(x.max()) > 1:
        yield f"the adversarial example spans [{float(x.min()):g}, {float(x.max()):g}], outside [0, 1]", False
    elif not inside:
        yield f"the adversarial example lies {distance:.6g} from the image, outside the ball", False
    if not abs(distance - recorded) <= slack + 1e-9 * (1 + distance):  # also where it is NaN
        yield f"distance {recorded:.6g} is recorded; it is {distance:.6g}", False


def _check_prediction(row: dict[Any, Any], logits: Tensor, votes: int | None) -> Iterator[tuple[str, bool]]:
    """Yield what is wrong with the prediction for a point, and whether rounding errors explain it."""
    now, true, recorded = int(logits.argmax()), int(row["true"]), int(row["prediction"])
    if votes is not None:
        if 2 * votes <= RANDOMIZED_DRAWS:
            yield f"{votes} of {RANDOMIZED_DRAWS} answers to the adversarial example are wrong", votes > 0
    elif not bool(logits.isfinite().all()):
        yield "the answer to the adversarial example is not finite", False
    elif now in (true, recorded) and recorded == true:
        yield f"the recorded prediction, {recorded}, is the true class", False
    elif now != recorded:
        right = ", its true class" if now == true else ""
        what = f"the adversarial example is predicted as {now}{right}; {recorded} is recorded"
        yield what, recorded != true and _is_tie(logits, now, recorded)


def _is_tie(logits: Tensor, now: int, expected: int) -> bool:
    """Return whether the logits of two classes are equal up to rounding errors."""
    if not 0 <= expected < len(logits):
        return False
    return float(logits[now] - logits[expected]) <= _ROUNDING * float(logits.norm())
