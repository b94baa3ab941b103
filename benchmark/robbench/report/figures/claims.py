"""What the figures of results claim: numbers with 95 % intervals, from the stored records. Imports no torch.

The CSV of such a figure has a first column `panel`. Its rows of the panel "claim" are the numbers of the claim, and its
other rows are plotted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robbench.analysis.logits import Estimate, compare_shares, estimate_share
from robbench.core.types import Status
from robbench.report.figures.source import FigureData
from robbench.report.linear import format_radius
from robbench.report.sweep import read_robust_table
from robbench.results.reader import read_vouched_rows
from robbench.results.schema import ResultFile

__all__ = [
    "CLAIM",
    "PLOTTED",
    "Claim",
    "add_claim",
    "claim_classes",
    "claim_prediction",
    "claim_steps",
    "count_steps",
    "format_mean",
    "format_points",
    "format_share",
    "shorten",
]

PLOTTED, CLAIM = "A", "claim"
"""The panels of the CSV."""

Claim = tuple[list[dict[str, Any]], str]
"""Rows of the CSV, and the sentences of the footnote."""


def shorten(name: str) -> str:
    """Return the name of a model without its data set."""
    return name.partition("/")[2]


def format_share(found: Estimate) -> str:
    """Format a share and its interval in percent."""
    return f"{100 * found.value:z.1f} % [{100 * found.low:z.1f}, {100 * found.high:z.1f}]"


def format_points(found: Estimate, sign: str = "") -> str:
    """Format a difference of shares and its interval in points. The sign "+" is printed before numbers above 0."""
    value, low, high = (f"{100 * number:{sign}z.1f}" for number in (found.value, found.low, found.high))
    value, low, high = (text if float(text) else text.lstrip("+") for text in (value, low, high))
    return f"{value} points [{low}, {high}]"


def format_mean(found: Estimate) -> str:
    """Format a number and its interval."""
    return f"{found.value:z.3g} [{found.low:z.3g}, {found.high:z.3g}]"


def add_claim(plotted: pd.DataFrame, claim: Claim) -> tuple[pd.DataFrame, str]:
    """Return the numbers of a figure's CSV, and the claim's sentences."""
    rows, text = claim
    parts = [plotted.assign(panel=PLOTTED), *([pd.DataFrame(rows).assign(panel=CLAIM)] if rows else [])]
    return pd.concat(parts, ignore_index=True)[["panel", *plotted.columns]], text


def claim_prediction(
    data: FigureData, plotted: pd.DataFrame, results: Sequence[ResultFile], eps: Fraction | None
) -> Claim:
    """Compare what Eq. 4 predicts with what the strongest suite leaves, on the images that both have.

    Args:
        data: the data of figures.
        plotted: the plotted numbers. The strongest suite is that with the lowest upper end of its interval.
        results: the results of the plotted suites.
        eps: the usual radius; None if the data set has none.
    """
    if eps is None:
        return [], "This data set has no usual radius, so nothing is claimed."
    found: dict[str, tuple[str, Estimate]] = {}
    attacked = plotted[plotted["series"].str.startswith("worst case") & (plotted["eps"] == float(eps))]
    for name in dict.fromkeys(attacked["model"]):
        worst = attacked[attacked["model"] == name]
        suite, images = worst.loc[worst["high"].idxmin(), ["suite", "images"]]
        # As in the plotted worst case, what breaks an image at a smaller radius counts too.
        tables = [
            read_robust_table(data.root, r)["worst case"]
            for r in results
            if (f"{r.dataset}/{r.model}", r.suite, r.n) == (name, suite, images) and Fraction(r.threat.eps) <= eps
        ]
        robust = pd.concat(tables, axis=1).all(axis=1)
        measured = data.read_linear(name)
        if measured is None:
            continue
        predicted = pd.Series(measured.predict_robust(float(eps)), measured.sample)
        if len(both := robust.index.intersection(predicted.index)):
            found[name] = suite, compare_shares(predicted[both].to_numpy(bool), robust[both].to_numpy(bool))
    if not found:
        return [], "No model has a prediction and an attack at the usual radius, so nothing is claimed."
    rows = [
        {"model": name, "series": "Equation 4 minus worst case", "suite": suite, "eps": float(eps), **_describe(e)}
        for name, (suite, e) in found.items()
    ]
    above = sum(e.low > 0 for _, e in found.values())
    name, (suite, most) = max(found.items(), key=lambda item: item[1][1].value)
    return rows, (
        f"At ε = {format_radius(eps)}, Equation 4 promises more than attacks leave for {above} of {len(found)} models: "
        f"the interval of the difference is above 0.\n"
        f"The largest difference has {shorten(name)}: {format_points(most)} (suite {suite}, n = {most.n}, paired "
        "95 % interval)."
    )


def count_steps(rows: pd.DataFrame, config: Mapping[str, Any]) -> tuple[int, NDArray[np.int64]]:
    """Return the number of steps of an attack over all of its trials, and the step of each break.

    Args:
        rows: the records of the attack.
        config: its configuration, with `steps`.
    """
    total = config["steps"] * config.get("restarts", 1) * config.get("targets", 1)
    broken = rows[rows["status"] == Status.BROKEN]
    return total, (broken["trial"] * config["steps"] + broken["step"]).to_numpy(np.int64)


def claim_steps(data: FigureData, results: Sequence[ResultFile]) -> Claim:
    """Count how many of the breaks of the usual PGD come in the first half of its steps."""
    rows, found = [], {}
    for result in results:
        name = f"{result.dataset}/{result.model}"
        attack = next((a for a in result.attacks if a.name.startswith("PGD-") and a.name.endswith("-xent")), None)
        if attack is None:
            continue
        records = read_vouched_rows(data.locate_result(result))
        total, broken_at = count_steps(records[records["attack"] == attack.name], attack.config)
        if not len(broken_at):
            continue
        early = estimate_share(broken_at <= total // 2)
        found[name] = attack.name, total, early
        rows.append(
            {
                "model": name,
                "attack": f"{attack.name}: breaks in the first half of its steps",
                "step": total // 2,
                **_describe(early),
                "threat": f"{result.threat.norm} {result.threat.eps}",
            }
        )
    if not found:
        return [], "No model has breaks of PGD on cross-entropy, so nothing is claimed about its steps."
    name, (attack_name, total, least) = min(found.items(), key=lambda item: item[1][2].value)
    return rows, (
        f"Of the images that {attack_name} breaks, its first {total // 2} of {total} steps break at least "
        f"{format_share(least)} in each of {len(found)} models.\n"
        f"The lowest share is that of {shorten(name)} (n = {least.n} broken images, Wilson 95 % interval)."
    )


def claim_classes(plotted: Sequence[Mapping[str, Any]]) -> Claim:
    """Compare the most and the least robust class of each model."""
    rows, found = [], {}
    overall = {row["model"]: row["value"] for row in plotted if row["class"] == "all"}
    for name in overall:
        each = [row for row in plotted if row["model"] == name and row["class"] != "all"]
        ends = max(each, key=lambda row: row["value"]), min(reversed(each), key=lambda row: row["value"])
        rows += [
            {**end, "class": f"{what} robust: {end['class']}"}
            for what, end in zip(("most", "least"), ends, strict=True)
        ]
        found[name] = [(end["class"], Estimate(end["value"], end["low"], end["high"], end["images"])) for end in ends]
    if not found:
        return [], ""
    apart = sum(most.is_apart_from(least) for (_, most), (_, least) in found.values())
    best = max(overall, key=lambda name: overall[name])
    (most_class, most), (least_class, least) = found[best]
    return rows, (
        f"Of {shorten(best)}, the most robust model, class {most_class} keeps {format_share(most)} and "
        f"class {least_class} keeps {format_share(least)}.\n"
        f"The Wilson 95 % intervals of the most and the least robust class are apart for {apart} of {len(found)} "
        "models."
    )


def _describe(found: Estimate) -> dict[str, Any]:
    return {"value": found.value, "low": found.low, "high": found.high, "images": found.n}
