"""Compares the attacks of the suite `sanity` on the images that the usual PGD did not break. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.types import Status
from robbench.masking.measurements import Challenge, Role
from robbench.results.schema import ResultFile

__all__ = ["compare_attacks", "compute_zero_share", "mark_robust"]

_GRADIENT = ("control", "single step", "more steps", "other loss", "other steps", "hunt")
"""Roles of the attacks that use the model's gradient."""


def _find_role(config: Mapping[str, Any], usual: Mapping[str, Any], weights: object) -> Role:
    """Return in what an attack differs from the usual PGD. Transfer from the model itself counts as another loss."""
    if config["kind"] == "transfer" and config["surrogate_weights"] == weights:
        return "other loss"
    if config["kind"] in ("transfer", "square", "noise", "hunt"):
        return cast(Role, config["kind"])
    if config["kind"] == "fgsm":
        return "single step"
    if config["kind"] != "pgd":
        raise ResultError(
            f"An attack of kind {config['kind']!r} has no role in the suite sanity; "
            "allowed: pgd, fgsm, hunt, noise, transfer and square."
        )
    differs = {key for key in config if config[key] != usual.get(key)}
    if not differs:
        return "control"
    if differs == {"steps"}:
        return "more steps"
    return "other loss" if differs == {"objective"} else "other steps"


def mark_robust(rows: pd.DataFrame, attack: str) -> pd.Series[bool]:
    """Return whether each image is robust under one attack, indexed by sample."""
    status = rows[rows["attack"] == attack].set_index("sample")["status"]
    return status == Status.ROBUST


def compare_attacks(result: ResultFile, rows: pd.DataFrame) -> list[Challenge]:
    """Compare each further attack with the control on the images that the first attack did not break.

    Args:
        result: the result of a suite in the mode `challenge`.
        rows: the records of the result.

    Raises:
        ResultError: an attack has no role, or the suite has no control.
    """
    usual = result.attacks[0]
    rows = rows[rows["sample"].isin(mark_robust(rows, usual.name).loc[lambda s: s].index)]
    marked = rows.assign(broken=rows["status"] == Status.BROKEN)
    broken = marked.pivot(index="sample", columns="attack", values="broken")
    roles = {a.name: _find_role(a.config, usual.config, result.identity.get("weights")) for a in result.attacks[1:]}
    controls = [name for name, role in roles.items() if role == "control"]
    if not controls:
        raise ResultError("The suite has no control. List the first attack a second time, under another name.")
    broken = broken.reindex(columns=list(roles)).fillna(False).astype(bool)
    by_gradient = broken[[name for name, role in roles.items() if role in _GRADIENT]].any(axis=1)
    control = broken[controls[0]]
    return [
        Challenge(
            name=name,
            role=role,
            given=len(broken),
            broken=int(broken[name].sum()),
            beyond=int((broken[name] & ~control).sum()),
            behind=int((control & ~broken[name]).sum()),
            alone=int((broken[name] & ~by_gradient).sum()),
        )
        for name, role in roles.items()
    ]


def compute_zero_share(result: ResultFile, rows: pd.DataFrame) -> float:
    """Return the share of exactly zero gradients among all gradients of the usual PGD and the control."""
    usual = result.attacks[0]
    names = [a.name for a in result.attacks if a.config == usual.config]
    usual_rows = rows[rows["attack"].isin(names)]
    gradients = int(usual_rows["backwards"].sum())
    return int(usual_rows["zero_gradients"].sum()) / gradients if gradients else 0.0
