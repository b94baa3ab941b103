"""What Shafahi et al. 2019 say about their histograms and activations, checked against the models here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from robbench.analysis.logits import Estimate, estimate_median
from robbench.linear.theory import Linearization, Values
from robbench.models.card import Entry
from robbench.papers.figures.logits import describe_finding
from robbench.report.figures.claims import format_mean, shorten

__all__ = [
    "FINDINGS",
    "_LABELS",
    "Claim",
    "Finding",
    "compare_models",
    "describe_claims",
    "find_kind",
    "make_claims",
]

Kind = Literal["natural", "at", "ls", "lsq", "ls_noise", "lsq_noise", "noise", "other"]
Change = Literal["smaller", "larger"]

Claim = tuple[str, str, Estimate]
"""Model, quantity, and its estimate."""

_LABELS = {
    "logit_gap": "logit gap",
    "gradient_gap": "gradient gap",
    "radius": "L",
    "logits": "mean |logit|",
    "gradient": "mean gradient magnitude",
}


@dataclass(frozen=True)
class Finding:
    """What a paper says about a figure.

    Attributes:
        said: the finding, as the end of "The paper says that".
        expected: kind of model -> quantity -> whether it is smaller or larger than that of the natural model.
    """

    said: str
    expected: Mapping[Kind, Mapping[str, Change]]

    def check_ratios(self, kinds: Mapping[str, Kind], claims: Sequence[Claim]) -> list[tuple[str, bool]]:
        """Return what the paper says about each model of these kinds, and whether the interval is beyond 1."""
        return [
            (f"{_LABELS[quantity]} of {shorten(name)}", found.high < 1 if change == "smaller" else found.low > 1)
            for name, quantity, found in claims
            if (change := self.expected.get(kinds[name], {}).get(quantity)) is not None
        ]

    def describe(self, checked: Sequence[tuple[str, bool]]) -> str:
        """Say what the paper says, whether it shows here, and for which models it does not."""
        failed = [what for what, shows in checked if not shows]
        shows = describe_finding(not failed) if checked else "No model of such a training is measured."
        return f"The paper says that {self.said}.\n{shows}" + (f" It fails for: {', '.join(failed)}." if failed else "")


FINDINGS: dict[str, Finding] = {
    "training": Finding(
        "adversarial training shrinks both gaps, the gradient gap more, so that L grows",
        {"at": {"logit_gap": "smaller", "gradient_gap": "smaller", "radius": "larger"}},
    ),
    "logits": Finding("adversarial training makes the logits smaller", {"at": {"logits": "smaller"}}),
    "smoothing": Finding(
        "label smoothing alone makes L smaller, and with noise L grows, because the gradient gap shrinks",
        {"ls": {"radius": "smaller"}, "ls_noise": {"gradient_gap": "smaller", "radius": "larger"}},
    ),
    "both": Finding(
        "noise with smoothing shrinks the gradient gap, and noise with squeezing also makes the logit gap larger",
        {
            "ls_noise": {"gradient_gap": "smaller"},
            "lsq_noise": {"gradient_gap": "smaller", "logit_gap": "larger"},
        },
    ),
    "gradients": Finding(
        "label smoothing shrinks the gradients", {"ls": {"gradient": "smaller"}, "ls_noise": {"gradient": "smaller"}}
    ),
    "penultimate": Finding(
        "adversarial training, and smoothing or squeezing with noise, leave many more neurons without any activity",
        {kind: {"inactive": "larger"} for kind in ("at", "ls_noise", "lsq_noise")},
    ),
    "squeezing": Finding(
        "logit squeezing with noise makes L larger than natural training does", {"lsq_noise": {"radius": "larger"}}
    ),
}
"""Figure -> what the paper says about it."""


def find_kind(entry: Entry | None) -> Kind:
    """Return the kind of training of a card's recipe."""
    recipe = entry.card.recipe if entry else None
    if recipe is None:
        return "other"
    if recipe.adversary is not None:
        return "at"
    if recipe.alpha or recipe.beta:
        return ("ls_noise" if recipe.sigma else "ls") if recipe.alpha else ("lsq_noise" if recipe.sigma else "lsq")
    return "noise" if recipe.sigma else "natural"


def compare_models(
    measured: Mapping[str, Linearization], kinds: Mapping[str, Kind], quantities: Sequence[str]
) -> list[Claim]:
    """Compare every model with the natural one: median over the images of the ratio of a quantity, with its interval.

    Gaps and L are those of the nearest wrong class, of the images that both models classify correctly. Logits and
    gradients are means over the classes, of all images that both were measured on.
    """
    reference = next((name for name in measured if kinds[name] == "natural"), None)
    claims: list[Claim] = []
    if reference is None:
        return claims
    base = measured[reference]
    for name, other in measured.items():
        if name == reference:
            continue
        _, here, there = np.intersect1d(base.sample, other.sample, return_indices=True)
        right = (base.take_at_nearest("logit_gap")[here] > 0) & (other.take_at_nearest("logit_gap")[there] > 0)
        for quantity in quantities:
            first, second = _take_values(base, quantity)[here], _take_values(other, quantity)[there]
            known = (first > 0) & (second > 0) & np.isfinite(first) & np.isfinite(second)
            known &= right if quantity in ("logit_gap", "gradient_gap", "radius") else True
            if known.any():
                claims.append((name, quantity, estimate_median(second[known] / first[known])))
    return claims


def _take_values(measured: Linearization, quantity: str) -> Values:
    """Return a quantity of each image, [n]."""
    if quantity in ("logits", "gradient"):
        values: Values = np.abs(getattr(measured, quantity)).mean(1)
        return values
    return measured.take_at_nearest(quantity)


def make_claims(claims: Sequence[Claim]) -> pd.DataFrame:
    """Make the rows of the CSV with the numbers of the footnote."""
    columns = ["panel", "model", "what", "value", "low", "high", "images"]
    rows = [("claim", name, quantity, e.value, e.low, e.high, e.n) for name, quantity, e in claims]
    # Without a row, the types of the columns must still be those of numbers.
    return pd.DataFrame(rows, columns=columns).astype({"value": float, "low": float, "high": float, "images": int})


def describe_claims(claims: Sequence[Claim], finding: Finding, kinds: Mapping[str, Kind]) -> str:
    """Return the footnote of a figure: the ratios of each model, and what the paper says."""
    lines = ["Median over the images of the ratio to the natural model, with its 95 % interval:"]
    for name in dict.fromkeys(model for model, *_ in claims):
        parts = [f"{_LABELS[quantity]} × {format_mean(e)}" for model, quantity, e in claims if model == name]
        n = min(e.n for model, _, e in claims if model == name)
        lines.append(f"{shorten(name)}: {', '.join(parts)} (n = {n})")
    if not claims:
        lines = ["The natural model is not measured, so there is nothing to compare with."]
    return "\n".join([*lines, finding.describe(finding.check_ratios(kinds, claims))])
