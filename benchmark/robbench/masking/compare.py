"""Records of the suite `sanity` → what each attack did with what the usual PGD left. A pure function; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pandas as pd

from robbench.core.errors import ResultError
from robbench.core.types import Status
from robbench.masking.measurements import Challenge, Role
from robbench.results.schema import ResultFile

__all__ = ["challenges", "standing"]

_GRADIENT = ("control", "single step", "more steps", "other loss", "other steps")
"""Roles of the attacks that climb the model's gradient."""


def _role(config: Mapping[str, Any], usual: Mapping[str, Any], weights: object) -> Role:
    """Tell what an attack differs in from the usual PGD; a model's transfer to itself is another loss."""
    if config["kind"] == "transfer" and config["surrogate_weights"] == weights:
        return "other loss"
    if config["kind"] in ("transfer", "square", "noise"):
        return cast(Role, config["kind"])
    if config["kind"] == "fgsm":
        return "single step"
    if config["kind"] != "pgd":
        raise ResultError(f"An attack of kind {config['kind']!r} has no role in the suite sanity.")
    differs = {key for key in config if config[key] != usual.get(key)}
    if not differs:
        return "control"
    if differs == {"steps"}:
        return "more steps"
    return "other loss" if differs == {"objective"} else "other steps"


def standing(rows: pd.DataFrame, attack: str) -> pd.Series[bool]:
    """Tell per sample whether it is classified correctly and an attack did not break it; indexed by sample."""
    mine = rows[rows["attack"] == attack].set_index("sample")["status"]
    return mine == Status.ROBUST


def challenges(result: ResultFile, rows: pd.DataFrame) -> list[Challenge]:
    """Compare each further attack with the control on the images that the first one left standing.

    Args:
        result: of a suite in the mode `challenge`.
        rows: its records.

    Raises:
        ResultError: an attack has no role, or there is no control.
    """
    usual = result.attacks[0]
    rows = rows[rows["sample"].isin(standing(rows, usual.name).loc[lambda s: s].index)]
    broke = rows.assign(broken=rows["status"] == Status.BROKEN).pivot(index="sample", columns="attack", values="broken")
    roles = {a.name: _role(a.config, usual.config, result.identity.get("weights")) for a in result.attacks[1:]}
    controls = [name for name, role in roles.items() if role == "control"]
    if not controls:
        raise ResultError("The suite has no control: PGD as the first attack is, a second time.")
    broke = broke.reindex(columns=list(roles)).fillna(False).astype(bool)
    climbed = broke[[name for name, role in roles.items() if role in _GRADIENT]].any(axis=1)
    control = broke[controls[0]]
    return [
        Challenge(
            name=name,
            role=role,
            given=len(broke),
            broken=int(broke[name].sum()),
            beyond=int((broke[name] & ~control).sum()),
            behind=int((control & ~broke[name]).sum()),
            alone=int((broke[name] & ~climbed).sum()),
        )
        for name, role in roles.items()
    ]
