"""What `robbench certify` prints: verdicts, the interval of the truth, and the table of certified radii."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from robbench.certify.interval import CertificateIndex, find_contradictions
from robbench.certify.record import CertifiedFile, certified_folder, read_certified
from robbench.core.errors import RobbenchError
from robbench.core.numbers import parse_threat
from robbench.core.words import format_count
from robbench.report.console import make_console
from robbench.report.tables import print_rows
from robbench.results.reader import read_results

__all__ = ["make_radius_rows", "print_certified"]

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""The L2 radii of the table of smoothing, in pixel units."""


def print_certified(file: CertifiedFile, root: Path) -> None:
    """Print a summary and, where attacks were run on the same images and threat, the interval of the truth.

    Raises:
        RobbenchError: an image is both proven and broken.
    """
    console = make_console()
    name = f"{file.dataset}/{file.model}"
    counts = ", ".join(f"{count} {verdict}" for verdict, count in file.counts.items())
    console.print(f"{name} · {file.method}: {format_count(file.n, 'image')}: {counts}", soft_wrap=True)
    if file.method == "smoothing":
        title = f"{name}, sigma {file.settings['sigma']}: certified accuracy of the smoothed classifier, %"
        print_rows(console, make_radius_rows([file], root), title=title)
        return
    index, threat = CertificateIndex(root), file.identity["threat"]
    for result in read_results(root, name).results:
        same = parse_threat(result.threat.norm, result.threat.eps) == parse_threat(threat["norm"], threat["eps"])
        if same and (interval := index.find(result)) is not None:
            line = f"  [certified, attacked by {result.suite}]: {interval.format(result.n)} %"
            console.print(line, soft_wrap=True)
    if wrong := find_contradictions(root, name):
        raise RobbenchError("\n".join(wrong))


def make_radius_rows(files: list[CertifiedFile], root: Path) -> list[dict[str, str]]:
    """Make the rows of a table of smoothing: certified accuracy at `RADII`, and the share that abstains.

    At radius 0 stands the share of images whose class is certified and true. "Votes" is the share of images whose
    class is true, whether or not it is certified: the accuracy without abstention.
    """
    rows = []
    for file in files:
        _, found = read_certified(certified_folder(root, file.dataset, file.model, file.identity))
        right, radius = (found["prediction"] == found["label"]).to_numpy(), found["radius"].to_numpy()
        shares = {f"r {r:g}": right & (radius > r) for r in RADII}
        shares = {"Votes": right} | shares | {"Abstains": radius == 0}
        rows.append(
            {
                "Model": f"{file.dataset}/{file.model}",
                "Sigma": f"{file.settings['sigma']:g}",
                **{name: f"{100 * np.mean(share):.1f}" for name, share in shares.items()},
                "n": str(file.n),
            }
        )
    return rows
