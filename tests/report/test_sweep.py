"""A sweep over radii: what the table, the CSV and the curve say follows from the stored records."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from robbench.core.errors import ResultError
from robbench.core.numbers import parse_radii
from robbench.evaluation.run import evaluate
from robbench.report.sweep import build_sweep, extend_sweep, write_sweep
from robbench.results.places import locate_result
from robbench.results.reader import read_results
from robbench.results.schema import AttackResult, ResultFile, ThreatResult
from robbench.results.summary import make_accuracy
from support.commands import run
from support.evidence import write_evidence
from support.stored import write_suite


def stored(root, eps, standing, n=None, **identity):
    """Store a result in full mode: per attack, which of the samples it leaves standing (sample 0 is misclassified)."""
    status = {name: np.where(stands, "robust", "broken").astype(object)[:n] for name, stands in standing.items()}
    for column in status.values():
        column[0] = "misclassified"
    zero = make_accuracy(0, 1)
    costs = {"forwards": 0, "backwards": 0, "seconds": 0.0}
    unmeasured = {"robust_accuracy": zero, "config": {}, "refuted": 0, "zero_gradient_share": 0.0} | costs
    wanted = ResultFile(
        schema_version=2, run_id="", model="m", dataset="d", threat=ThreatResult(norm="Linf", eps=eps), suite="s", n=1,
        seed=0, clean_accuracy=zero, robust_accuracy=zero, judge="any", mode="full", overrides={"eps": eps}, flags={},
        attacks=[AttackResult(name=name, **unmeasured) for name in standing], identity=identity, selection="", lanes=1,
        hardware="", versions={}, date="", **costs,
    )  # fmt: skip
    return write_evidence(root, wanted, status)


def first(k, n=100):
    return np.arange(n) < k


def test_a_break_at_a_smaller_radius_counts_at_the_larger(tmp_path):
    small = stored(tmp_path, "0.1", {"A": first(60), "B": first(70)})
    large = stored(tmp_path, "0.2", {"A": first(30) | ~first(98), "B": first(50) | ~first(95)})
    s = build_sweep(tmp_path, [large, small], clean=True)
    assert [p.eps for p in s.points] == ["0", "0.1", "0.2"]
    assert [p.worst_case.value for p in s.points] == [0.99, 0.59, 0.29]
    assert [p.measured.value for p in s.points] == [0.99, 0.59, 0.31]
    assert [p.missed for p in s.points] == [0, 0, 2]
    assert [p.attacks["B"].value for p in s.points] == [0.99, 0.69, 0.54]
    (note,) = s.notes
    assert "Linf 0.2: the attacks missed 2 images" in note and "29.0 instead of the measured 31.0" in note
    assert s.points[0].run_id is None and s.points[2].run_id == large.run_id


def test_a_rise_that_chance_does_not_explain_is_told(tmp_path):
    small = stored(tmp_path, "0.1", {"A": first(60), "B": first(70)})
    large = stored(tmp_path, "0.2", {"A": first(80), "B": first(72)})
    rises = [note for note in build_sweep(tmp_path, [small, large]).notes if "RISES" in note]
    assert len(rises) == 2, "A and the worst case; two images more are chance"
    assert rises[0].startswith(
        "A: robust accuracy RISES from 59.0 at Linf 0.1 to 79.0 at 0.2 (robust only at the larger radius: 20 images"
    )
    assert rises[1].startswith("worst case:")


def test_only_the_images_that_were_asked_for_count(tmp_path):
    stored_ones = stored(tmp_path, "0.1", {"A": first(60)}), stored(tmp_path, "0.2", {"A": first(30)})
    small, large = (r.model_copy(update={"n": 50}) for r in stored_ones)
    s = build_sweep(tmp_path, [small, large])
    assert s.n == 50 and [p.worst_case.value for p in s.points] == [0.98, 0.58]
    other = stored(tmp_path, "0.3", {"A": first(30)}).model_copy(update={"n": 60})
    with pytest.raises(ResultError, match="same images"):
        build_sweep(tmp_path, [small, other])


def test_csv_and_curve_of_a_sweep_hold_its_points(tmp_path):
    many = {f"attack {i}": first(90 - 5 * i) for i in range(9)}
    results = [stored(tmp_path, "2/255", many), stored(tmp_path, "4/255", {k: v & first(40) for k, v in many.items()})]
    s = build_sweep(tmp_path, results, clean=True)
    table, curve = write_sweep(s, tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in (table, curve)] == [
        f"d/m/s@sweep-Linf.{suffix}" for suffix in ("csv", "png")
    ]
    read = pd.read_csv(table)
    assert read["eps"].tolist() == ["0", "2/255", "4/255"]
    assert read["worst_case"].tolist() == [p.worst_case.value for p in s.points]
    assert read["attack 3"].tolist() == [p.attacks["attack 3"].value for p in s.points]
    before = table.read_bytes(), curve.read_bytes()
    write_sweep(s, tmp_path)
    assert (table.read_bytes(), curve.read_bytes()) == before, "the same results give the same bytes"
    picture = imread(curve)
    assert picture.shape[0] > 400 and picture.shape[1] > 700
    assert (picture[..., :3].min(axis=2) < 0.2).mean() > 0.005, "lines and letters"
    assert len(read_results(tmp_path).results) == 2, "no result among them"


def test_a_cascades_columns_are_those_of_its_results(problem, tmp_path):
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "results": tmp_path / "r", "seed": 3}
    results = [evaluate(model, write_suite(tmp_path, "cascade"), eps=e, **call) for e in (0.02, 0.05)]
    s = build_sweep(tmp_path / "r", results)
    assert s.stem == "custom/small/s@sweep-Linf-seed-3"
    for p, r in zip(s.points, results, strict=True):
        assert p.measured == r.robust_accuracy
        assert p.attacks == {a.name: a.robust_accuracy for a in r.attacks}


def radii(root, name="d/m/s@sweep-Linf"):
    """Read the radii of a stored sweep."""
    return pd.read_csv(root / f"{name}.csv", dtype=str)["eps"].tolist()


def test_a_sweep_keeps_the_points_of_an_earlier_one(tmp_path):
    first_two = [stored(tmp_path, e, {"A": first(k)}) for e, k in (("0.1", 60), ("0.3", 20))]
    write_sweep(extend_sweep(tmp_path, first_two, clean=True), tmp_path)
    middle = stored(tmp_path, "0.2", {"A": first(10)})
    merged = extend_sweep(tmp_path, [middle])
    write_sweep(merged, tmp_path)
    assert radii(tmp_path) == ["0", "0.1", "0.2", "0.3"]
    assert [p.worst_case.value for p in merged.points] == [0.99, 0.59, 0.09, 0.09], "also at the radii of before"
    assert merged.points[3].missed == 10 and merged.points[2].run_id == middle.run_id
    before = (tmp_path / "d/m/s@sweep-Linf.csv").read_bytes()
    write_sweep(extend_sweep(tmp_path, first_two), tmp_path)
    assert (tmp_path / "d/m/s@sweep-Linf.csv").read_bytes() == before, "fewer radii take nothing away"


def test_a_sweep_of_fewer_images_or_of_another_run_is_written_beside(tmp_path):
    write_sweep(extend_sweep(tmp_path, [stored(tmp_path, "0.1", {"A": first(60)})], clean=True), tmp_path)
    kept = (tmp_path / "d/m/s@sweep-Linf.csv").read_bytes()
    fewer = extend_sweep(tmp_path, [stored(tmp_path, "0.2", {"A": first(30)}, n=50)], clean=True)
    retrained = extend_sweep(tmp_path, [stored(tmp_path, "0.3", {"A": first(30)}, weights="other")], clean=True)
    assert len({fewer.stem, retrained.stem, "d/m/s@sweep-Linf"}) == 3
    for sweep, eps in ((fewer, "0.2"), (retrained, "0.3")):
        write_sweep(sweep, tmp_path)
        assert "stays as it is" in sweep.notes[-1] and radii(tmp_path, sweep.stem) == ["0", eps]
    assert (tmp_path / "d/m/s@sweep-Linf.csv").read_bytes() == kept
    again = extend_sweep(tmp_path, [stored(tmp_path, "0.05", {"A": first(70)}, n=50)], clean=True)
    assert again.stem == fewer.stem and [p.eps for p in again.points] == ["0", "0.05", "0.2"], (
        "that one is added to, too"
    )


def test_more_images_replace_a_sweep_only_if_every_radius_has_them(tmp_path):
    both = [stored(tmp_path, e, {"A": first(60)}, n=50) for e in ("0.1", "0.2")]
    write_sweep(extend_sweep(tmp_path, both, clean=True), tmp_path)
    more = []
    for result, eps in zip(both, ("0.1", "0.2"), strict=True):
        shutil.rmtree(locate_result(tmp_path, result))
        more.append(stored(tmp_path, eps, {"A": first(60)}))
        if eps == "0.1":
            assert extend_sweep(tmp_path, more, clean=True).stem != "d/m/s@sweep-Linf", "0.2 would be lost"
    whole = extend_sweep(tmp_path, more, clean=True)
    assert whole.stem == "d/m/s@sweep-Linf" and whole.n == 100


def test_a_damaged_sweep_is_set_aside_and_damaged_records_lose_no_point(tmp_path):
    result = stored(tmp_path, "0.1", {"A": first(60)})
    path = tmp_path / "d/m/s@sweep-Linf.csv"
    for content in (b"", b"eps,n\n0.1,5\n", b"\xff\xfe", b"run_id,n\nx,many\n"):
        path.write_bytes(content)
        write_sweep(extend_sweep(tmp_path, [result], clean=True), tmp_path)
        assert radii(tmp_path) == ["0", "0.1"]
    assert len(list(path.parent.glob("*.damaged*"))) == 4
    kept = path.read_bytes()
    (tmp_path / f"d/m/s@{result.run_id[:8]}/outcomes.parquet").write_bytes(b"")
    write_sweep(extend_sweep(tmp_path, [stored(tmp_path, "0.2", {"A": first(30)})], clean=True), tmp_path)
    assert path.read_bytes() == kept


def test_radii_are_read_exactly_and_ordered():
    assert parse_radii("8/255, 0,2/255,0.0") == ["0.0", "2/255", "8/255"]
    assert parse_radii("0.3") == ["0.3"]
    for text, given in (("0.1,x", "'x'"), ("0.1,", "''"), ("0.1,-1", "'-1'")):
        with pytest.raises(ValueError, match=f"eps: {given} given"):
            parse_radii(text)


@pytest.mark.whole
def test_the_sweep_command_writes_and_prints(tmp_path):
    args = ["eval", "-m", "digits/at", "-s", "quick", "--samples", 20]
    done = run(*args, "--eps", "0,0.1,0.2", cwd=tmp_path)
    folder = tmp_path / "results/digits/at"
    assert "digits/at · quick · Linf: accuracy, %, n = 20" in done.stdout and "sweep-Linf.csv" in done.stdout
    assert len(list(folder.glob("quick@*/result.json"))) == 1, "radius 0 is not attacked, and 0.2 is the suite's own"
    assert (folder / "quick@sweep-Linf.png").exists()
    parsed = json.loads(run(*args, "--eps", "0,0.1,0.2", "--json", cwd=tmp_path).stdout)
    assert [p["eps"] for p in parsed["points"]] == ["0", "0.1", "0.2"]
    stored_ones = {r.threat.eps: r.robust_accuracy for r in read_results(tmp_path / "results").results}
    assert {p["eps"]: p["measured"] for p in parsed["points"][1:]} == {
        k: v.model_dump() for k, v in stored_ones.items()
    }
    more = json.loads(run(*args, "--eps", "0.05,1/5", "--json", cwd=tmp_path).stdout)
    assert [p["eps"] for p in more["points"]] == ["0", "0.05", "0.1", "0.2"], "the earlier points stay"
    assert more["points"][2:] == parsed["points"][1:]
    assert "8/255" in run(*args, "--eps", "0.1,8", cwd=tmp_path, code=2).stderr
    assert len(list(folder.glob("quick*/result.json"))) == 3, "and nothing was computed before it was told"
