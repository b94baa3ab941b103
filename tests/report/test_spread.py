"""Several seeds beside each other: every figure follows from the stored records, image by image."""

import json

import numpy as np
import pandas as pd
import pytest

from robbench.core.errors import ResultError
from robbench.evaluation.run import evaluate
from robbench.report.spread import build_spread, write_spread
from robbench.results.places import locate_result
from support.commands import run

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    root = tmp_path_factory.mktemp("spread") / "results"
    return root, [evaluate("digits/ls095_sigma03", "quick", samples=80, seed=s, results=root) for s in range(3)]


def standing(root, result):
    rows = pd.read_parquet(locate_result(root, result) / "outcomes.parquet")
    return ~rows["status"].isin(["broken", "misclassified"]).groupby(rows["sample"]).any()


def test_the_worst_over_seeds_is_taken_per_image(seeded):
    root, results = seeded
    found = build_spread(root, results)
    stands = np.array([standing(root, r) for r in results])
    worst = found.attacks[-1]
    assert worst.name == "worst case" and worst.values == stands.mean(axis=1).tolist()
    assert worst.worst.value == stands.all(axis=0).mean() < min(worst.values), "seeds break different images"
    assert worst.mean == pytest.approx(stands.mean())
    assert found.attacks[0].values == [r.attacks[0].robust_accuracy.value for r in results]
    assert found.seeds == [0, 1, 2] and found.n == 80 and found.run_ids == [r.run_id for r in results]


def test_other_images_are_refused(seeded):
    root, results = seeded
    fewer = evaluate("digits/ls095_sigma03", "quick", samples=60, seed=0, results=root)
    with pytest.raises(ResultError, match="not on the same images"):
        build_spread(root, [fewer, *results[1:]])


def test_the_command_stores_and_prints_it(seeded):
    root, results = seeded
    args = ["eval", "-m", "digits/ls095_sigma03", "-s", "quick", "--samples", 80, "--seeds", 3, "--results", root]
    table = run(*args).stdout
    path = root / "digits/ls095_sigma03/quick@seeds-0-2.json"
    assert "Worst over seeds" in table and f"{path.name} written" in table
    stored = json.loads(path.read_text())
    assert stored == json.loads(run(*args, "--json").stdout)
    assert stored["attacks"][-1]["low"] == min(r.robust_accuracy.value for r in results)
    assert write_spread(build_spread(root, results), root) == path and json.loads(path.read_text()) == stored
    assert "at a single radius" in run(*args, "--eps", "0.1,0.2", code=2).stderr
    assert "1 or more" in run("eval", "-m", "digits/at", "--seeds", 0, code=2).stderr


def test_what_is_stored_of_other_seeds_images_or_runs_stays(seeded, tmp_path):
    root, results = seeded
    args = ["eval", "-m", "digits/ls095_sigma03", "-s", "quick", "--results", root]
    stored = {p: p.read_bytes() for p in root.glob("digits/*/*/outcomes.parquet")}
    whole = write_spread(build_spread(root, results[:2]), root)
    before = whole.read_bytes()
    run(*args, "--samples", 40, "--seeds", 2, "--eps", "1/5")
    run(*args, "--samples", 40, "--seeds", 2)
    assert whole.read_bytes() == before, "80 images stay"
    (beside,) = whole.parent.glob("quick@seeds-0-1-*.json")
    assert json.loads(beside.read_text())["n"] == 40
    assert {p: p.read_bytes() for p in root.glob("digits/*/*/outcomes.parquet")} == stored, "no run was made again"
    other = [r.model_copy(update={"run_id": f"{i}"}) for i, r in enumerate(results[:2])]
    whole.write_text(json.dumps({**json.loads(before), "run_ids": [r.run_id for r in other]}))
    assert build_spread(root, results[:2]).stem != whole.stem.removesuffix(".json"), "another run is not replaced"
    assert build_spread(root, results[:2]).stem.startswith("digits/ls095_sigma03/quick@seeds-0-1-")
    whole.write_text("[1")
    assert build_spread(root, results[:2]).stem.endswith("quick@seeds-0-1")
    assert list(whole.parent.glob("*.damaged")), "a damaged file is set aside"
