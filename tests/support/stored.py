"""Suites to run, and what a run leaves on disk."""

import pandas as pd

TWO_ATTACKS = """
version = 1
mode = "MODE"

[[attack]]
name = "FGSM"
kind = "fgsm"

[[attack]]
name = "PGD"
kind = "pgd"
objective = "margin"
steps = 10
"""


def write_suite(root, mode="full"):
    """Write a small suite that leaves work for its second attack."""
    path = root / "s.toml"
    path.write_text(TWO_ATTACKS.replace("MODE", mode))
    return str(path)


TRANSFER = """
version = 1
judge = "final"
[threat]
digits = { norm = "Linf", eps = "0.2" }

[[attack]]
name = "BB"
kind = "transfer"
surrogate = "SURROGATE"
attack = "pgd"
objective = "margin"
steps = 7
"""


def write_transfer_suite(tmp_path, text=TRANSFER, surrogate="natural"):
    """Write a suite of one transfer attack."""
    path = tmp_path / "s.toml"
    path.write_text(text.replace("SURROGATE", surrogate))
    return str(path)


def folder(root):
    """Find the folder of the only result in a tree."""
    return next(root.glob("[!.]*/*/*"))


def outcomes(folder):
    """Read the records of a result."""
    return pd.read_parquet(folder / "outcomes.parquet")


def stable(rows):
    """Drop what differs between two runs of the same attacks: wall time."""
    return rows.drop(columns=["seconds"], errors="ignore")
