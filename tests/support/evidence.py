"""Stored results whose records, identity and summary agree, made without a model."""

import numpy as np
import pandas as pd

from robbench.results.consistency import derive_summary
from robbench.results.places import locate_result
from robbench.results.records import COLUMNS, OUTCOMES, TIMING_COLUMNS, TIMINGS, pack_rows
from robbench.results.schema import dump_sealed
from robbench.results.selection import describe_selection

TEST_SETS = {
    "digits": ("ea1145f99ab13f12e87d1cb9d2d17af46d83c0f55f259e0cc241ca40a013cb7a", 898, 899),
    "mnist": ("58307ebf296d64db3d8a15e3d10912cb175f169f6a7001b0af629d10c8420c6d", 0, 10_000),
}
"""Digest, lowest index and number of images of the test sets whose images a reader knows by their digest."""


def write_evidence(root, wanted, status=None):
    """Write a result in full mode with the counts of `wanted`, and return it with its derived fields.

    Args:
        root: the results tree.
        wanted: the result (`ResultFile`); its attacks, counts, flags and described fields are taken.
        status: attack -> one status per sample; by default statuses that give the counts of `wanted`.
    """
    status = status or _spread_counts(wanted)
    n = len(next(iter(status.values())))
    data, first, total = TEST_SETS.get(wanted.dataset, ("d" * 64, 0, n))
    identity = {
        "data": data,
        "suite": {"name": wanted.suite, "judge": wanted.judge, "mode": wanted.mode},
        "attacks": [{"name": a.name, **a.config} for a in wanted.attacks],
        "threat": {"norm": wanted.threat.norm, "eps": wanted.threat.eps},
        "seed": int(wanted.overrides.get("seed", 0)),
        "sample_seed": None,
    } | wanted.identity
    rows = make_rows(status)
    rows["sample"] += first
    about = {"identity": identity, "selection": describe_selection(n, total, None)}
    result = derive_summary(wanted.model_copy(update=about), rows)
    folder = locate_result(root, result)
    folder.mkdir(parents=True)
    (folder / OUTCOMES).write_bytes(pack_rows(rows, result.run_id))
    (folder / TIMINGS).write_bytes(pack_rows(rows, result.run_id, TIMING_COLUMNS))
    (folder / "result.json").write_bytes(dump_sealed(result))
    return result


def make_rows(status):
    """Make records: attack -> one status per sample."""
    names = list(status)
    n = len(status[names[0]])
    frame = pd.DataFrame(
        {
            "sample": np.repeat(np.arange(n), len(names)),
            "attack": names * n,
            "status": [status[name][i] for i in range(n) for name in names],
        }
    )
    full = frame.reindex(columns=list(COLUMNS), fill_value=0).assign(forwards=2, backwards=1, seconds=0.001)
    return full.assign(claimed=full["status"] == "broken").astype(COLUMNS)


def _spread_counts(wanted):
    """Attacks leave the images of the worst case, and further ones that are not the same for every attack."""
    n, clean, worst = wanted.n, *(round(a.value * wanted.n) for a in (wanted.clean_accuracy, wanted.robust_accuracy))
    status, begin = {}, worst
    for attack in wanted.attacks:
        more = round(attack.robust_accuracy.value * n) - worst
        column = np.array(["broken"] * clean + ["misclassified"] * (n - clean), dtype=object)
        column[:worst] = "robust"
        column[worst + (begin - worst + np.arange(more)) % max(clean - worst, 1)] = "robust"
        begin += more
        status[attack.name] = column.tolist()
    return status
